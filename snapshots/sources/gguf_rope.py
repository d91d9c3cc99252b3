"""Rotary scaling as GGUF files keep it, as transformers' parameters.

Llama 3's is there as finished factors instead of parameters.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from snapshots.errors import SourceUnsupported

ROPE_FACTORS = "rope_freqs.weight"

# Every published Llama 3 has these; only the factor differs between them.
LOW_FREQ_FACTOR, HIGH_FREQ_FACTOR, ORIGINAL_CONTEXT = 1.0, 4.0, 8192


def rope_parameters(factors: Sequence[float], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the transformers parameters that lead to `factors`, one per pair of features.

    Raises:
        SourceUnsupported: None do.
    """
    theta = _theta(config)
    scale = max(factors, default=1.0)
    expected = [_factor(theta ** (-index / len(factors)), scale) for index in range(len(factors))]
    if not all(map(_is_close, factors, expected)):
        raise SourceUnsupported(
            f"{ROPE_FACTORS} is no Llama 3 scaling",
            hint="build from the safetensors checkpoint instead",
        )
    return {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": round(scale, 4),
        "low_freq_factor": LOW_FREQ_FACTOR,
        "high_freq_factor": HIGH_FREQ_FACTOR,
        "original_max_position_embeddings": ORIGINAL_CONTEXT,
    }


def linear_parameters(factor: float, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the transformers parameters of positions divided by `factor`."""
    return {"rope_type": "linear", "rope_theta": _theta(config), "factor": factor}


def linear_factor(metadata: Mapping[str, Any]) -> float:
    """Return by what positions are divided; 1 for no scaling.

    Args:
        metadata: Of the file, without the architecture's name before the keys.

    Raises:
        SourceUnsupported: The scaling is not linear.
    """
    # llama.cpp takes a factor without a type as linear; older files have no other.
    kind = metadata.get("rope.scaling.type", "linear")
    if kind not in ("none", "linear"):
        raise SourceUnsupported(
            f"rope.scaling.type {kind!r} cannot be taken over from a GGUF file (only 'linear')",
            hint="build from the safetensors checkpoint instead",
        )
    factor = metadata.get("rope.scaling.factor", metadata.get("rope.scale_linear", 1.0))
    return 1.0 if kind == "none" or not factor else float(factor)


def _theta(config: Mapping[str, Any]) -> float:
    return float((config.get("rope_parameters") or config)["rope_theta"])


def _factor(frequency: float, scale: float) -> float:
    """Return by how much Llama 3 slows a rotation: not, by `scale`, or in between."""
    turns = ORIGINAL_CONTEXT * frequency / (2 * math.pi)
    if turns > HIGH_FREQ_FACTOR:
        return 1.0
    if turns < LOW_FREQ_FACTOR:
        return scale
    smooth = (turns - LOW_FREQ_FACTOR) / (HIGH_FREQ_FACTOR - LOW_FREQ_FACTOR)
    return 1.0 / ((1.0 - smooth) / scale + smooth)


def _is_close(found: float, expected: float) -> bool:
    return math.isclose(found, expected, rel_tol=1e-3)
