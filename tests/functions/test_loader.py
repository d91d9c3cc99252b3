from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from functions.loader import MAX_BYTES, Problem, SpecError, load_file, load_object, load_text

FUNCTIONS = Path(__file__).parents[2] / "functions"
HEAD = "name: tiny\nmodel: {source: org/tiny}\n"


def problems_of(text: str) -> tuple[Problem, ...]:
    with pytest.raises(SpecError) as caught:
        load_text(text, origin="tiny.yaml")
    return caught.value.problems


def only_problem(text: str) -> Problem:
    (problem,) = problems_of(text)
    return problem


@pytest.mark.parametrize("path", sorted(FUNCTIONS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_functions_are_valid(path: Path) -> None:
    assert load_file(path).name == path.stem


@pytest.mark.parametrize(
    ("addition", "key", "hint"),
    [
        ("scaling: {idle_timout: 5m}", "scaling.idle_timout", "did you mean 'idle_timeout'?"),
        ("scalling: {}", "scalling", "did you mean 'scaling'?"),
        ("idle_timeout: 5m", "idle_timeout", "did you mean 'scaling.idle_timeout'?"),
        ("queue: {zzz: 1}", "queue.zzz", "known keys here: max_requests, max_bytes"),
        (
            "schedules: [{cron: '0 8 * * *', duration: 1h, time_zone: UTC}]",
            "schedules[0].time_zone",
            "did you mean 'timezone'?",
        ),
    ],
)
def test_unknown_key_names_the_nearest_known_one(addition: str, key: str, hint: str) -> None:
    problem = only_problem(HEAD + addition)
    assert (problem.key, problem.message) == (key, "unknown key")
    assert problem.hint is not None
    assert problem.hint.startswith(hint)


@pytest.mark.parametrize(
    ("addition", "hint"),
    [
        ("queue: {on_cold: rejct}", "did you mean 'reject'?"),
        ("engine: {enable_prefix_caching: yes}", "did you mean true?"),
        ("engine: {enable_prefix_caching: Off}", "did you mean false?"),
        (
            "schedules: [{cron: '0 8 * * *', duration: 1h, timezone: europe/berlin}]",
            "did you mean 'Europe/Berlin'?",
        ),
    ],
)
def test_wrong_value_names_the_nearest_right_one(addition: str, hint: str) -> None:
    assert only_problem(HEAD + addition).hint == hint


def test_bad_name_gets_a_proposal() -> None:
    problem = only_problem("name: My Model_7B\nmodel: {source: org/tiny}")
    assert problem.hint == "did you mean 'my-model-7b'?"


def test_number_as_name_asks_for_quotes() -> None:
    assert only_problem("name: 123\nmodel: {source: org/tiny}").hint == "put it in quotes"


def test_every_problem_is_listed_with_its_place() -> None:
    text = "\n".join(
        [
            "name: Tiny",
            "model:",
            "  source: org/tiny",
            "  dtype: bf16",
            "scaling:",
            "  idle_timeout: soon",
            "  max_replicas: '3'",
            "queue: 3",
        ]
    )
    found = {problem.key: (problem.line, problem.column) for problem in problems_of(text)}
    assert found == {
        "name": (1, 7),
        "model.dtype": (4, 10),
        "scaling.idle_timeout": (6, 17),
        "scaling.max_replicas": (7, 17),
        "queue": (8, 8),
    }


def test_error_text_reads_as_file_line_column_key_and_remedy() -> None:
    with pytest.raises(SpecError) as caught:
        load_text(HEAD + "scaling:\n  max_replicas: many\n", origin="tiny.yaml")
    expected = "tiny.yaml:4:17: scaling.max_replicas: must be a whole number, got 'many'"
    assert str(caught.value) == expected


def test_missing_key_points_at_the_mapping_around_it() -> None:
    problem = only_problem("name: tiny\nmodel:\n  dtype: auto\n")
    assert (problem.key, problem.message) == ("model.source", "is required and missing")
    assert problem.line == 2


def test_contradiction_points_at_the_key_that_should_change() -> None:
    problem = only_problem(HEAD + "scaling:\n  max_replicas: 1\n  min_replicas: 2\n")
    assert (problem.key, problem.line) == ("scaling.min_replicas", 5)
    assert problem.message == "must be at most scaling.max_replicas (1)"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("# nothing\n", "is empty"),
        ("- a\n- b\n", "must be a mapping"),
        ("just words", "must be a mapping"),
        ("42", "must be a mapping"),
        ("~", "must be a mapping"),
        ("name: [", "is not YAML"),
        ("name: 'a", "is not YAML"),
        ("name:\ttiny\n\tmodel: x", "is not YAML"),
        ("name: a\x07", "is not YAML"),
        (HEAD + "---\n" + HEAD, "second document"),
        ("name: &a tiny\nmodel: {source: *a}", "anchor or alias"),
        ("name: tiny\nmodel: {<<: {source: a/b}, source: a/b}", "unknown key"),
        ("name: !!python/object/apply:os.system [id]\n", "uses the tag"),
        ("name: !!str tiny\n", "uses the tag"),
        ("name: tiny\n1: x\n", "key that is not text"),
        ("name: tiny\n? [a]\n: x\n", "key that is not text"),
        ("name: tiny\nnull: x\n", "key that is not text"),
        ("a: " + "[" * 10_000, "nested deeper"),
        ("x" * (MAX_BYTES + 1), "is over 256 KiB"),
    ],
)
def test_text_that_is_no_plain_mapping_is_refused(text: str, message: str) -> None:
    assert message in problems_of(text)[0].message


def test_alias_bomb_is_refused_before_it_grows() -> None:
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    assert "anchor or alias" in only_problem("\n".join(levels)).message


def test_duplicate_keys_are_refused_with_both_places() -> None:
    text = HEAD + "scaling:\n  max_replicas: 1\n  max_replicas: 2\nname: other\n"
    found = [(problem.key, problem.line, problem.message) for problem in problems_of(text)]
    assert found == [
        ("scaling.max_replicas", 5, "is given twice, first in line 4"),
        ("name", 6, "is given twice, first in line 1"),
    ]


@pytest.mark.parametrize("word", ["no", "on", "1_000", "0x10", "2024-01-01", "1:30"])
def test_plain_words_are_not_turned_into_something_else(word: str) -> None:
    spec = load_text(f"name: tiny\nmodel: {{source: ./{word}, served_names: ['{word}']}}")
    assert spec.served_names == (word,)
    problem = only_problem(HEAD + f"scaling: {{max_replicas: {word}}}")
    assert problem.message == f"must be a whole number, got {word!r}"


def test_long_values_are_cut_in_messages() -> None:
    problem = only_problem(f"name: {'a' * 300}\nmodel: {{source: org/tiny}}")
    assert len(problem.message) < 200
    assert "(302 characters)" in problem.message


def test_relative_source_starts_at_the_file(tmp_path: Path) -> None:
    (tmp_path / "specs").mkdir()
    path = tmp_path / "specs" / "tiny.yaml"
    path.write_text("name: tiny\nmodel: {source: ../models/tiny.gguf}\n")
    assert load_file(path).model.source == str(tmp_path.resolve() / "models" / "tiny.gguf")


@pytest.mark.parametrize("source", ["tiny.gguf", "./tiny.gguf"])
def test_file_beside_the_yaml_is_found(tmp_path: Path, source: str) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(f"name: tiny\nmodel: {{source: {source}}}\n")
    assert load_file(path).model.source == str(tmp_path.resolve() / "tiny.gguf")


def test_linked_model_file_keeps_its_name(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"")
    (tmp_path / "tiny.gguf").symlink_to(tmp_path / "blob")
    path = tmp_path / "tiny.yaml"
    path.write_text("name: tiny\nmodel: {source: ./tiny.gguf}\n")
    assert load_file(path).model.source.endswith("/tiny.gguf")


def test_hub_id_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(HEAD)
    assert load_file(path).model.source == "org/tiny"


@pytest.mark.parametrize("data", [b"name: \xff", b"\xfe\xff\x00n", b"name: a\x00"])
def test_binary_files_are_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_bytes(data)
    with pytest.raises(SpecError):
        load_file(path)


@pytest.mark.parametrize("name", ["missing.yaml", "."])
def test_unreadable_file_says_why(tmp_path: Path, name: str) -> None:
    with pytest.raises(SpecError, match=r"cannot be read: (No such file|Is a directory)"):
        load_file(tmp_path / name)


def test_byte_order_mark_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(HEAD, encoding="utf-8-sig")
    assert load_file(path).name == "tiny"


@pytest.mark.parametrize(
    "value", [None, [], "x", 3, {"name": 1}, {1: 2}, {"name": "a", "model": []}]
)
def test_objects_are_checked_without_lines(value: object) -> None:
    with pytest.raises(SpecError) as caught:
        load_object(value, origin="spec")
    assert all(problem.line is None for problem in caught.value.problems)
    assert str(caught.value).startswith("spec:")


@given(st.text(max_size=200))
def test_any_text_is_a_spec_or_a_spec_error(text: str) -> None:
    with pytest.raises(SpecError):
        load_text(text)


_leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
_keys = st.sampled_from(["name", "model", "source", "scaling", "schedules", "cron", "queue", "x"])
_values = st.recursive(
    _leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_keys, inner, max_size=4),
    max_leaves=12,
)


@given(_values)
def test_any_value_is_a_spec_or_a_spec_error(value: object) -> None:
    with suppress(SpecError):
        load_object(value)
    with suppress(SpecError):
        load_text(yaml.safe_dump(value))
