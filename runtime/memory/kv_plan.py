"""How many KV blocks there are room for. Pure: sizes in, a plan or a reasoned refusal out."""

from dataclasses import dataclass

from runtime.config import EngineConfig
from runtime.errors import LoadFailed, OutOfMemory

USABLE_SHARE = 0.9  # of the memory limit; the rest is for what nobody counts
PROCESS_BYTES = 512 << 20  # interpreter, libraries and the allocator's slack
CONTEXT_BYTES = 640 << 20  # what the driver takes of a GPU for a process
DEVICE_RESERVE_BYTES = 512 << 20  # kernels, CUDA graphs and library workspaces
MAX_DEFAULT_BYTES = 4 << 30  # without any limit, at most this and a quarter of the machine


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceMemory:
    """A GPU's memory before the engine takes any of it but its context."""

    total_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class KvSizes:
    """What the plan depends on besides the configuration.

    Attributes:
        bytes_per_token: Keys and values of one token over all layers.
        weights_bytes: Held by weights when all is loaded.
        activation_bytes: Peak of a step's intermediate results.
        machine_bytes: Physical memory.
        model_max_len: The model's own limit on a sequence, in tokens.
        device: Where the engine computes; None on the CPU.
    """

    bytes_per_token: int
    weights_bytes: int
    activation_bytes: int
    machine_bytes: int
    model_max_len: int
    device: DeviceMemory | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class KvPlan:
    """A KV cache that holds at least one sequence of `max_model_len` tokens."""

    num_blocks: int
    max_model_len: int


def plan_kv(config: EngineConfig, sizes: KvSizes) -> KvPlan:
    """Decide on blocks and length limit.

    A length limit that was left to us shrinks to what fits; one that was asked for does not.

    Raises:
        LoadFailed: The length asked for is above the model's.
        OutOfMemory: Not one sequence of that length fits.
    """
    if config.max_model_len > sizes.model_max_len:
        raise LoadFailed(
            f"max_model_len={config.max_model_len} is above the model's own limit of "
            f"{sizes.model_max_len}: lower it, or leave it out"
        )
    wanted_len = config.max_model_len or sizes.model_max_len
    bytes_per_block = sizes.bytes_per_token * config.block_size
    budget = _budget_bytes(config, sizes)
    num_blocks = max(0, budget // bytes_per_block)
    fitting_len = num_blocks * config.block_size
    if num_blocks == 0 or (config.max_model_len and fitting_len < wanted_len):
        needed_len = wanted_len if config.max_model_len else 1
        needed_bytes = -(-needed_len // config.block_size) * bytes_per_block
        raise OutOfMemory(
            f"the KV cache may use {max(0, budget)} bytes, but a sequence of {needed_len} tokens "
            f"takes {needed_bytes}: {_advice(config, sizes, needed_bytes - budget)}"
        )
    max_model_len = min(wanted_len, fitting_len)
    blocks_per_sequence = -(-max_model_len // config.block_size)
    return KvPlan(
        num_blocks=min(num_blocks, config.max_num_seqs * blocks_per_sequence),
        max_model_len=max_model_len,
    )


def _budget_bytes(config: EngineConfig, sizes: KvSizes) -> int:
    if config.kv_cache_bytes:
        return config.kv_cache_bytes
    if sizes.device is not None:
        # What other processes hold of the device is not ours to count, unless there is no more.
        ours = _granted_bytes(config, sizes.device) - CONTEXT_BYTES
        usable = min(ours, sizes.device.free_bytes)
        return usable - sizes.weights_bytes - sizes.activation_bytes - DEVICE_RESERVE_BYTES
    if not config.memory_limit_bytes:
        return min(MAX_DEFAULT_BYTES, sizes.machine_bytes // 4)
    usable = int(USABLE_SHARE * config.memory_limit_bytes)
    return usable - sizes.weights_bytes - sizes.activation_bytes - PROCESS_BYTES


def _granted_bytes(config: EngineConfig, device: DeviceMemory) -> int:
    """Return how much of a GPU the engine may use, whether that is free or not."""
    return config.device_memory_bytes or int(config.gpu_memory_utilization * device.total_bytes)


def _advice(config: EngineConfig, sizes: KvSizes, missing_bytes: int) -> str:
    if config.kv_cache_bytes:
        return f"raise kv_cache_bytes by {missing_bytes} or lower max_model_len"
    if sizes.device is not None:
        granted, free = _granted_bytes(config, sizes.device), sizes.device.free_bytes
        less = "lower max_model_len or max_num_seqs"
        if free < granted - CONTEXT_BYTES:
            return (
                f"only {free} bytes of the GPU were free of the {granted} that the engine may use, "
                f"and the weights take {sizes.weights_bytes}: stop what else uses the GPU, or {less}"
            )
        return (
            f"the engine may use {granted} of the GPU's {sizes.device.total_bytes} bytes, and the "
            f"weights take {sizes.weights_bytes}: raise gpu_memory_utilization, {less}, or use a "
            "larger GPU"
        )
    if not config.memory_limit_bytes:
        return "set kv_cache_bytes or lower max_model_len"
    missing_limit = int(missing_bytes / USABLE_SHARE) + 1
    return f"raise the memory limit by {missing_limit} bytes or lower max_model_len"
