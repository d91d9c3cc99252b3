from dataclasses import replace

import pytest

from runtime.config import EngineConfig
from runtime.errors import LoadFailed, OutOfMemory
from runtime.memory.kv_plan import (
    CONTEXT_BYTES,
    DEVICE_RESERVE_BYTES,
    MAX_DEFAULT_BYTES,
    PROCESS_BYTES,
    DeviceMemory,
    KvPlan,
    KvSizes,
    plan_kv,
)

SIZES = KvSizes(
    bytes_per_token=1000,
    weights_bytes=100_000_000,
    activation_bytes=10_000_000,
    machine_bytes=1 << 40,
    model_max_len=2048,
)
MANY = EngineConfig(max_num_seqs=1 << 20)


def test_given_size_is_used_in_whole_blocks() -> None:
    plan = plan_kv(replace(MANY, kv_cache_bytes=10_000_000), SIZES)
    assert plan == KvPlan(num_blocks=625, max_model_len=2048)


def test_memory_limit_leaves_room_for_all_else() -> None:
    limit = 1 << 30
    plan = plan_kv(replace(MANY, memory_limit_bytes=limit), SIZES)
    others = SIZES.weights_bytes + SIZES.activation_bytes + PROCESS_BYTES
    assert plan.num_blocks == (int(0.9 * limit) - others) // 16_000


def test_without_limits_the_default_ceiling_holds() -> None:
    assert plan_kv(MANY, SIZES).num_blocks == MAX_DEFAULT_BYTES // 16_000


def test_without_limits_a_small_machine_keeps_three_quarters() -> None:
    small = replace(SIZES, machine_bytes=1 << 30)
    assert plan_kv(MANY, small).num_blocks == (1 << 28) // 16_000


def test_cache_is_no_larger_than_all_sequences_together() -> None:
    config = EngineConfig(max_num_seqs=2, max_model_len=33, block_size=16)
    assert plan_kv(config, SIZES) == KvPlan(num_blocks=6, max_model_len=33)


def on_gpu(*, free_bytes: int) -> KvSizes:
    return replace(SIZES, device=DeviceMemory(total_bytes=100 << 30, free_bytes=free_bytes))


ELSE_ON_GPU = SIZES.weights_bytes + SIZES.activation_bytes + DEVICE_RESERVE_BYTES


@pytest.mark.parametrize("free_bytes", [99 << 30, 51 << 30])
def test_a_gpus_share_is_the_same_whatever_others_hold_of_it(free_bytes: int) -> None:
    config = replace(MANY, gpu_memory_utilization=0.5)
    plan = plan_kv(config, on_gpu(free_bytes=free_bytes))
    assert plan.num_blocks == ((50 << 30) - CONTEXT_BYTES - ELSE_ON_GPU) // 16_000


def test_memory_granted_on_a_gpu_wins_over_the_share() -> None:
    config = replace(MANY, gpu_memory_utilization=0.5, device_memory_bytes=20 << 30)
    plan = plan_kv(config, on_gpu(free_bytes=99 << 30))
    assert plan.num_blocks == ((20 << 30) - CONTEXT_BYTES - ELSE_ON_GPU) // 16_000


def test_what_is_not_free_on_a_gpu_is_not_planned_for() -> None:
    plan = plan_kv(MANY, on_gpu(free_bytes=10 << 30))
    assert plan.num_blocks == ((10 << 30) - ELSE_ON_GPU) // 16_000


def test_length_left_to_us_shrinks_to_what_fits() -> None:
    config = replace(MANY, kv_cache_bytes=500_000)
    assert plan_kv(config, SIZES) == KvPlan(num_blocks=31, max_model_len=496)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (replace(MANY, kv_cache_bytes=500_000, max_model_len=512), "raise kv_cache_bytes by 12000"),
        (replace(MANY, kv_cache_bytes=10), "raise kv_cache_bytes by 15990"),
        (replace(MANY, memory_limit_bytes=1 << 20), "raise the memory limit by"),
    ],
)
def test_too_little_memory_is_refused_with_what_is_missing(
    config: EngineConfig, match: str
) -> None:
    with pytest.raises(OutOfMemory, match=match):
        plan_kv(config, SIZES)


@pytest.mark.parametrize(
    ("free_bytes", "match"),
    [
        (99 << 30, "may use 2147483648 of the GPU's .*: raise gpu_memory_utilization"),
        (1 << 30, "only 1073741824 bytes of the GPU were free .*: stop what else uses the GPU"),
    ],
)
def test_too_little_memory_of_a_gpu_is_explained_by_what_binds(free_bytes: int, match: str) -> None:
    config = replace(MANY, device_memory_bytes=2 << 30, max_model_len=2048)
    with pytest.raises(OutOfMemory, match=match):
        plan_kv(config, replace(on_gpu(free_bytes=free_bytes), weights_bytes=3 << 30))


def test_following_the_advice_helps() -> None:
    config = replace(MANY, kv_cache_bytes=500_000 + 12_000, max_model_len=512)
    assert plan_kv(config, SIZES).max_model_len == 512


def test_length_above_the_models_is_refused() -> None:
    with pytest.raises(LoadFailed, match="above the model's own limit of 2048"):
        plan_kv(replace(MANY, max_model_len=4096), SIZES)
