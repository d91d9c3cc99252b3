"""Model shapes with random weights, made on the GPU, for benchmarks that need no real model."""

from collections.abc import Mapping

import torch
from torch import Tensor

from runtime.memory.weights import OnProgress
from runtime.model.config import ModelConfig
from snapshots.loader import LoadReport

LLAMA_3_1_8B = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}


class RandomWeights:
    """Normal weights of standard deviation 0.02, norms of 1, drawn on the device."""

    is_read = True

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype = torch.bfloat16,
        device: str = "cuda",
        *,
        seed: int = 0,
    ) -> None:
        self.dtype = dtype
        self._device = device
        self._seed = seed
        self.held_bytes = 0
        self._tensors: dict[str, Tensor] = {}
        self._shapes = _shapes(config)
        self.total_bytes = sum(
            torch.Size(shape).numel() * dtype.itemsize for shape in self._shapes.values()
        )

    def start(self) -> Mapping[str, Tensor]:
        """Draw them on the device, the first time."""
        if not self._tensors:
            self._tensors = self._draw()
        self.held_bytes = self.total_bytes
        return self._tensors

    def load(self, on_progress: OnProgress | None) -> tuple[Mapping[str, Tensor], LoadReport]:
        """Do what `start` does."""
        tensors = self.start()
        return tensors, LoadReport(num_bytes=self.total_bytes, read_s=0.0, verify_s=0.0)

    def _draw(self) -> dict[str, Tensor]:
        generator = torch.Generator(self._device).manual_seed(self._seed)
        tensors = {}
        for name, shape in self._shapes.items():
            tensor = torch.empty(shape, dtype=self.dtype, device=self._device)
            is_norm = len(shape) == 1
            tensors[name] = (
                tensor.fill_(1.0) if is_norm else tensor.normal_(std=0.02, generator=generator)
            )
        return tensors

    def tidy(self) -> None:
        """Do nothing: nothing is left of a load."""

    def discard(self, weight: Tensor) -> None:
        """Keep it."""

    def release(self) -> None:
        """Keep them, since a load must put them where they were; only count them as gone."""
        self.held_bytes = 0


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the fused tensors of a Llama, by name."""
    hidden, head_dim = config.hidden_size, config.head_dim
    q_size = config.num_heads * head_dim
    padded_vocab = -(-config.vocab_size // 64) * 64
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (padded_vocab, hidden)}
    for index in range(config.num_layers):
        layer = f"layers.{index}"
        shapes |= {
            f"{layer}.input_layernorm.weight": (hidden,),
            f"{layer}.self_attn.qkv_proj.weight": (
                q_size + 2 * config.num_kv_heads * head_dim,
                hidden,
            ),
            f"{layer}.self_attn.o_proj.weight": (hidden, q_size),
            f"{layer}.post_attention_layernorm.weight": (hidden,),
            f"{layer}.mlp.gate_up_proj.weight": (2 * config.intermediate_size, hidden),
            f"{layer}.mlp.down_proj.weight": (hidden, config.intermediate_size),
        }
    shapes["norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (padded_vocab, hidden)
    return shapes
