from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families

from controller.metrics import Metrics
from controller.scaling.generation import GenerationRecord


def samples(metrics: Metrics, name: str) -> dict[tuple[str, ...], float]:
    """Return a series' values by their label values, in the order of the label names."""
    return {
        tuple(value for _, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(metrics.render().decode())
        for sample in family.samples
        if sample.name == f"coldspark_{name}"
    }


def record(**fields: object) -> GenerationRecord:
    known = {"request_id": "r", "function": "f", "tier": "parked", "num_prompt_tokens": 7}
    return GenerationRecord(**{**known, **fields})  # type: ignore[arg-type]  # fields of the record


def test_finished_generation_counts_tokens_queue_and_first_token() -> None:
    metrics = Metrics()
    metrics.generation_finished(
        record(queue_s=0.5, first_token_s=0.75, num_cached_tokens=4, num_output_tokens=9)
    )
    assert samples(metrics, "tokens_total") == {
        ("prompt", "f"): 7,
        ("cached", "f"): 4,
        ("output", "f"): 9,
    }
    assert samples(metrics, "request_queue_seconds_sum") == {("true", "f"): 0.5}
    assert samples(metrics, "time_to_first_token_seconds_sum") == {("true", "f"): 0.75}


def test_generation_without_a_token_counts_no_tokens_and_no_first_token() -> None:
    metrics = Metrics()
    metrics.generation_finished(record(queue_s=0.5))
    assert samples(metrics, "tokens_total") == {}
    assert samples(metrics, "time_to_first_token_seconds_count") == {}
    assert samples(metrics, "request_queue_seconds_count") == {("true", "f"): 1}


def test_failed_cold_start_is_counted_but_is_no_duration() -> None:
    metrics = Metrics()
    for outcome in ("ready", "failed"):
        metrics.cold_start_finished(
            function="f", from_tier="stopped", outcome=outcome, seconds=4, phases={"queue": 0.5}
        )
    counted = samples(metrics, "cold_starts_total")
    assert counted == {("stopped", "f", "ready"): 1, ("stopped", "f", "failed"): 1}
    assert samples(metrics, "cold_start_seconds_count") == {("stopped", "f"): 1}
    assert samples(metrics, "cold_start_phase_seconds_sum") == {("f", "queue"): 1.0}


def test_standbys_are_counted_by_backend_and_state() -> None:
    metrics = Metrics()
    metrics.set_standbys({"docker": {"ready": 1, "starting": 2}})
    assert samples(metrics, "standbys") == {("docker", "ready"): 1, ("docker", "starting"): 2}


def test_replica_states_that_are_left_out_vanish() -> None:
    metrics = Metrics()
    metrics.set_replicas("f", {"ready": 2, "starting": 1})
    metrics.set_replicas("g", {"parked": 1})
    metrics.set_replicas("f", {"parked": 1})
    assert samples(metrics, "replicas") == {("f", "parked"): 1, ("g", "parked"): 1}


def test_forgotten_function_keeps_its_counters_only() -> None:
    metrics = Metrics()
    metrics.set_load("f", in_flight=3, queued=4)
    metrics.set_replicas("f", {"ready": 1})
    metrics.runtime_crashed("f")
    metrics.add_gpu_seconds(function="f", state="idle", seconds=1.5)
    metrics.replica_reaped(function="f", to_tier="parked")
    assert samples(metrics, "requests_in_flight") == {("f",): 3}
    assert samples(metrics, "requests_queued") == {("f",): 4}
    metrics.forget("f")
    assert samples(metrics, "requests_in_flight") == {}
    assert samples(metrics, "requests_queued") == {}
    assert samples(metrics, "replicas") == {}
    assert samples(metrics, "runtime_crashes_total") == {("f",): 1}
    assert samples(metrics, "gpu_seconds_total") == {("f", "idle"): 1.5}
    assert samples(metrics, "reaped_total") == {("f", "parked"): 1}


def test_global_registry_is_left_alone() -> None:
    Metrics()
    Metrics()
    names = {metric.name for metric in REGISTRY.collect()}
    assert not any(name.startswith("coldspark") for name in names)


def test_starts_are_counted_beside_their_limit() -> None:
    metrics = Metrics()
    metrics.set_starts({"under_way": 2, "waiting": 5, "limit": 2})
    counted = samples(metrics, "starts")
    assert counted == {("under_way",): 2, ("waiting",): 5, ("limit",): 2}


def test_host_memory_is_that_of_the_replicas_there_are_now() -> None:
    metrics = Metrics()
    metrics.set_host_memory({"f": {"parked": 3}, "g": {"ready": 4}})
    metrics.set_host_memory({"f": {"parked": 3}, "": {"standby": 2}})
    assert samples(metrics, "host_memory_bytes") == {("f", "parked"): 3, ("", "standby"): 2}


def test_what_others_hold_of_a_gpu_is_absent_while_it_is_not_known() -> None:
    metrics = Metrics()
    metrics.set_foreign_memory("GPU-0", 3 << 30)
    assert samples(metrics, "device_foreign_bytes") == {("GPU-0",): 3 << 30}
    for _ in range(2):
        metrics.set_foreign_memory("GPU-0", None)
        assert samples(metrics, "device_foreign_bytes") == {}
