"""Rotary position embedding in the half-split layout of Llama, Qwen and Mistral.

Frequencies and angles are fp32 whatever the dtype of activations: rounded to bf16 they would be
wrong from position 256 on.
"""

import math

import torch
from torch import Tensor

from runtime.model.config import RopeConfig, RopeType


class Rope:
    """Turns pairs (i, i + head_dim / 2) of each head by position * frequency i.

    Args:
        config: Base and stretch.
        head_dim: Size of a head, even.
    """

    def __init__(self, config: RopeConfig, head_dim: int) -> None:
        self._frequencies = inverse_frequencies(config, head_dim)

    def rotation(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return what `rotate` needs for these positions, int64 [num_tokens].

        Returns:
            cos [num_tokens, 1, 1, head_dim / 2] and signed sin [num_tokens, 1, 2, head_dim / 2].
        """
        angles = torch.outer(positions.float(), self._frequencies)
        cos, sin = angles.cos(), angles.sin()
        signed_sin = torch.stack((-sin, sin), dim=1)
        return cos[:, None, None].to(dtype), signed_sin[:, None].to(dtype)


def rotate(heads: Tensor, rotation: tuple[Tensor, Tensor]) -> None:
    """Rotate heads [num_tokens, num_heads, head_dim] in place."""
    cos, signed_sin = rotation
    halves = heads.view(*heads.shape[:-1], 2, -1)
    swapped = halves.flip(-2)
    halves.mul_(cos).addcmul_(swapped, signed_sin)


def inverse_frequencies(config: RopeConfig, head_dim: int) -> Tensor:
    """Return radians per position, fp32 [head_dim / 2]."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = 1.0 / (config.theta**exponents)
    match config.type:
        case RopeType.DEFAULT:
            return frequencies
        case RopeType.LINEAR:
            return frequencies / config.factor
        case RopeType.LLAMA3:
            return _llama3(frequencies, config)


def _llama3(frequencies: Tensor, config: RopeConfig) -> Tensor:
    """Stretch slow frequencies, keep fast ones, blend between (Llama 3.1's schedule)."""
    turns = config.original_max_position_embeddings * frequencies / (2 * math.pi)
    keep = (turns - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)
    keep = keep.clamp(0.0, 1.0)
    return keep * frequencies + (1 - keep) * frequencies / config.factor
