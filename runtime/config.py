"""Frozen configuration of one engine; derived sizes are properties. No torch here."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Limits of one engine, under vLLM's names.

    Attributes:
        max_model_len: Longest sequence, prompt and output, in tokens; 0 takes the model's limit.
        max_num_seqs: Most sequences in one batch.
        max_num_batched_tokens: Token budget of one step.
        block_size: Tokens per KV block.
        enable_prefix_caching: Whether full blocks are reused between sequences.
        gpu_memory_utilization: Share of a GPU's memory the engine may use.
        device_memory_bytes: Memory of each GPU the engine may use; 0 takes its share.
        kv_cache_bytes: Size of the KV cache; 0 derives it from the memory limits.
        memory_limit_bytes: Host memory the engine may use; 0 for no limit.
        dtype: "auto" takes the snapshot's; else bfloat16, float16 or float32.
        tensor_parallel_size: Number of ranks.
        task: "generate" or "embed".
        pooling: How token vectors become a text's, to embed: mean, cls or last.
        normalize: Whether embeddings are scaled to length 1.
    """

    max_model_len: int = 0
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    block_size: int = 16
    enable_prefix_caching: bool = True
    gpu_memory_utilization: float = 0.90
    device_memory_bytes: int = 0
    kv_cache_bytes: int = 0
    memory_limit_bytes: int = 0
    dtype: str = "auto"
    tensor_parallel_size: int = 1
    task: str = "generate"
    pooling: str = ""
    normalize: bool = False
