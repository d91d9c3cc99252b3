from decimal import Decimal
from typing import Any

import pytest
from pydantic import ValidationError

from functions.spec import FunctionSpec, SourceKind, revision


def spec_of(**sections: Any) -> FunctionSpec:
    value = {"name": "tiny", "model": {"source": "org/tiny"}}
    return FunctionSpec.model_validate(value | sections)


def test_name_and_source_are_enough() -> None:
    spec = spec_of()
    assert spec.served_names == ("tiny",)
    assert spec.scaling.idle_timeout == 300.0
    assert spec.queue.max_bytes == 256 << 20
    assert spec.cost.gpu_hour_usd is None


@pytest.mark.parametrize(
    "name",
    [
        "", "-a", "a-", "A", "a_b", "a.b", "../../etc", "a/b", "a b", "a\n", "\ta",
        "а",  # noqa: RUF001  # a Cyrillic letter
        "ａ", "é", "a" * 64, "a" * 300, "a\x00",  # noqa: RUF001
    ],
)  # fmt: skip
def test_bad_names_are_refused(name: str) -> None:
    with pytest.raises(ValidationError):
        spec_of(name=name)


@pytest.mark.parametrize("name", ["a", "0", "a-b", "a" * 63, "qwen3-8b"])
def test_good_names_are_taken(name: str) -> None:
    assert spec_of(name=name).name == name


@pytest.mark.parametrize(
    ("source", "kind", "location", "revision_"),
    [
        ("Qwen/Qwen3-8B", SourceKind.HUB, "Qwen/Qwen3-8B", None),
        ("Qwen/Qwen3-8B@main", SourceKind.HUB, "Qwen/Qwen3-8B", "main"),
        ("a/b@refs/pr/1", SourceKind.HUB, "a/b", "refs/pr/1"),
        ("/models/x", SourceKind.DIRECTORY, "/models/x", None),
        ("./x@y", SourceKind.DIRECTORY, "./x@y", None),
        ("~/x", SourceKind.DIRECTORY, "~/x", None),
        ("x.gguf", SourceKind.GGUF, "x.gguf", None),
        ("/a b/x.gguf", SourceKind.GGUF, "/a b/x.gguf", None),
    ],
)
def test_spelling_of_a_source_says_what_it_is(
    source: str, kind: SourceKind, location: str, revision_: str | None
) -> None:
    model = spec_of(model={"source": source}).model
    assert (model.kind, model.location, model.revision) == (kind, location, revision_)


@pytest.mark.parametrize(
    "source",
    ["", "Qwen3-8B", "a/b/c", "-a/b", "a/-b", "a/b@", "a/b@-x", "https://x/y", "a/b c", "/a\nb", "/" + "a" * 5000],
)  # fmt: skip
def test_bad_sources_are_refused(source: str) -> None:
    with pytest.raises(ValidationError):
        spec_of(model={"source": source})


def test_timeouts_tell_zero_from_never() -> None:
    scaling = spec_of(scaling={"idle_timeout": 0, "park_timeout": None}).scaling
    assert scaling.idle_timeout == 0.0
    assert scaling.park_timeout is None


@pytest.mark.parametrize(
    ("section", "value"),
    [
        ("scaling", {"scale_down_delay": None}),
        ("scaling", {"max_replicas": 0}),
        ("scaling", {"max_replicas": True}),
        ("scaling", {"max_replicas": "2"}),
        ("scaling", {"max_replicas": 2.0}),
        ("scaling", {"min_replicas": -1}),
        ("resources", {"gpus": True}),
        ("resources", {"gpus": 3}),
        ("resources", {"cpu": 0}),
        ("resources", {"memory": "lots"}),
        ("engine", {"gpu_memory_utilization": 0}),
        ("engine", {"gpu_memory_utilization": 1.01}),
        ("engine", {"gpu_memory_utilization": float("nan")}),
        ("engine", {"enable_prefix_caching": 1}),
        ("engine", {"block_size": 17}),
        ("model", {"source": "a/b", "max_model_len": 0}),
        ("model", {"source": "a/b", "quantization": "fp8"}),
        ("model", {"source": "a/b", "served_names": ["../x"]}),
        ("model", {"source": "a/b", "served_names": "ab"}),
        ("queue", {"timeout": None}),
        ("queue", {"max_requests": 0}),
        ("queue", {"on_cold": "drop"}),
        ("timeouts", {"startup": 0}),
        ("timeouts", {"first_token": 0}),
        ("timeouts", {"stream_idle": "-1s"}),
        ("cost", {"gpu_hour_usd": -1}),
        ("cost", {"gpu_hour_usd": "NaN"}),
        ("cost", {"gpu_hour_usd": True}),
        ("schedules", [{"cron": "0 8 * * 1-5"}]),
        ("schedules", [{"cron": "0 8 * * 1-5", "duration": 0}]),
        ("schedules", [{"cron": "0 8 * * 1-5", "duration": "1h", "timezone": "Mars/Olympus"}]),
        ("schedules", [{"cron": "0 8 * * 1-5", "duration": "1h", "timezone": "../etc/passwd"}]),
        ("schedules", [{"cron": "0 8 * * 1-5", "duration": "1h", "timezone": ""}]),
    ],
)
def test_values_out_of_bounds_are_refused(section: str, value: object) -> None:
    with pytest.raises(ValidationError):
        spec_of(**{section: value})


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"scaling": {"min_replicas": 3}}, "scaling.min_replicas"),
        (
            {"schedules": [{"cron": "0 8 * * *", "duration": "1h", "min_replicas": 9}]},
            "schedules.0.min_replicas",
        ),
        ({"scaling": {"max_concurrency": 8}}, "scaling.target_concurrency"),
        ({"resources": {"gpus": 2}}, "engine.tensor_parallel_size"),
        (
            {"resources": {"gpus": 0}, "engine": {"tensor_parallel_size": 2}},
            "engine.tensor_parallel_size",
        ),
        ({"engine": {"max_num_batched_tokens": 100}}, "engine.max_num_batched_tokens"),
    ],
)
def test_contradictions_between_fields_are_refused(sections: dict[str, Any], key: str) -> None:
    with pytest.raises(ValidationError, match=f"{key} must be"):
        spec_of(**sections)


def test_spec_cannot_be_changed() -> None:
    spec = spec_of()
    with pytest.raises(ValidationError):
        spec.scaling.max_replicas = 5  # type: ignore[misc]  # frozen is what is tested
    assert hash(spec) == hash(spec_of())


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"scaling": {"idle_timeout": "5m"}}, {"scaling": {"idle_timeout": 300}}),
        ({"resources": {"memory": "1Gi"}}, {"resources": {"memory": 1 << 30}}),
        ({"cost": {"gpu_hour_usd": "2.50"}}, {"cost": {"gpu_hour_usd": 2.5}}),
        ({"cost": {"gpu_hour_usd": 100}}, {"cost": {"gpu_hour_usd": "100.00"}}),
        ({}, {"queue": {"on_cold": "hold"}}),
        ({}, {"model": {"source": "org/tiny", "served_names": ["tiny"]}}),
    ],
)
def test_same_meaning_gives_the_same_revision(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert revision(spec_of(**one)) == revision(spec_of(**other))


@pytest.mark.parametrize(
    "change",
    [
        {"name": "other"},
        {"model": {"source": "org/tiny@v2"}},
        {"scaling": {"idle_timeout": None}},
        {"scaling": {"idle_timeout": 0}},
        {"cost": {"gpu_hour_usd": 0}},
    ],
)
def test_another_meaning_gives_another_revision(change: dict[str, Any]) -> None:
    assert revision(spec_of()) != revision(spec_of(**change))


def test_json_form_reads_back_as_the_same_spec() -> None:
    spec = spec_of(
        cost={"gpu_hour_usd": Decimal("0.10")},
        schedules=[{"cron": "0  8 * * 1-5", "timezone": "Europe/Berlin", "duration": "10h"}],
    )
    assert FunctionSpec.model_validate(spec.to_json()) == spec
    assert revision(FunctionSpec.model_validate(spec.to_json())) == revision(spec)


def test_schedule_gives_fields_a_scheduler_reads_alike() -> None:
    spec = spec_of(schedules=[{"cron": "0 8 * * 1-5", "duration": "10h"}])
    assert spec.schedules[0].fields.day_of_week == "mon,tue,wed,thu,fri"
