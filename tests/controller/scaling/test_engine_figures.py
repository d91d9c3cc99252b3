from controller.metrics import Metrics
from controller.scaling.engine_figures import EngineFigures
from runtime.rpc import inference_pb2 as pb
from tests.controller.test_metrics import samples


def load(**figures: int) -> pb.LoadFigures:
    return pb.LoadFigures(num_kv_blocks=100, **{"num_free_kv_blocks": 100, **figures})


def test_replicas_are_summed() -> None:
    metrics = Metrics()
    engines = EngineFigures("f", metrics)
    engines.update("a", load(num_running=3, num_waiting=1, num_free_kv_blocks=40, num_steps=1))
    engines.update("b", load(num_running=2, num_free_kv_blocks=90, num_steps=1))
    assert samples(metrics, "engine_requests") == {("f", "running"): 5, ("f", "waiting"): 1}
    assert samples(metrics, "engine_kv_cache_usage_ratio") == {("f",): 0.35}


def test_counts_grow_by_what_is_new() -> None:
    metrics = Metrics()
    engines = EngineFigures("f", metrics)
    engines.update("a", load(num_steps=5, num_preemptions=2, num_late_compilations=1))
    engines.update("a", load(num_steps=5, num_preemptions=2, num_late_compilations=1))
    engines.update("a", load(num_steps=9, num_preemptions=3, num_late_compilations=1))
    assert samples(metrics, "engine_steps_total") == {("f",): 9}
    assert samples(metrics, "engine_preemptions_total") == {("f",): 3}
    assert samples(metrics, "engine_late_compilations_total") == {("f",): 1}


def test_an_engine_started_anew_counts_from_zero() -> None:
    metrics = Metrics()
    engines = EngineFigures("f", metrics)
    engines.update("a", load(num_steps=100, num_prompt_tokens=50, num_cached_prompt_tokens=20))
    engines.update("a", load(num_steps=3, num_prompt_tokens=7, num_cached_prompt_tokens=1))
    assert samples(metrics, "engine_steps_total") == {("f",): 103}
    assert samples(metrics, "engine_prefix_cache_queries_total") == {("f",): 57}
    assert samples(metrics, "engine_prefix_cache_hits_total") == {("f",): 21}


def test_a_replica_that_is_gone_holds_nothing_and_its_work_stays_counted() -> None:
    metrics = Metrics()
    engines = EngineFigures("f", metrics)
    engines.update("a", load(num_running=3, num_steps=4, num_output_tokens=8))
    engines.drop("a")
    engines.drop("never")
    assert samples(metrics, "engine_requests") == {("f", "running"): 0, ("f", "waiting"): 0}
    assert samples(metrics, "engine_kv_cache_usage_ratio") == {("f",): 0}
    assert samples(metrics, "engine_generation_tokens_total") == {("f",): 8}
