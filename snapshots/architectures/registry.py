"""Which models can be built: those that have a weight map and that the runtime can compute.

The runtime checks again when it loads; here it is said before a download and a build.
"""

from collections.abc import Mapping
from typing import Any

from snapshots.architectures.llama import LLAMA
from snapshots.architectures.weights import Architecture
from snapshots.errors import SourceInvalid, SourceUnsupported

ARCHITECTURES = (LLAMA,)
CLASSES = ("LlamaForCausalLM",)
ACTIVATIONS = ("silu", "swish")
ROPE_TYPES = ("default", "linear", "llama3")


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture of a transformers config.

    Raises:
        SourceUnsupported: There is none, or its activation or rotary scaling is not computed here.
        SourceInvalid: The rotary scaling is malformed.
    """
    model_type = config.get("model_type")
    for architecture in ARCHITECTURES:
        if architecture.name == model_type:
            break
    else:
        known = ", ".join(architecture.name for architecture in ARCHITECTURES)
        raise SourceUnsupported(f"no weight map for model_type {model_type!r} (known: {known})")
    name = next(iter(config.get("architectures") or CLASSES))
    _check("architecture", name, CLASSES)
    _check("activation", config.get("hidden_act", "silu"), ACTIVATIONS)
    rope = _rope_parameters(config)
    _check("rope type", rope.get("rope_type") or rope.get("type") or "default", ROPE_TYPES)
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise SourceUnsupported("config.json: partial rotary embeddings are not supported")
    return architecture


def _check(what: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise SourceUnsupported(
            f"config.json: {what} {value!r} is not supported (known: {', '.join(known)})"
        )


def _rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return them under the key of any transformers version."""
    parameters: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        value = config.get(key) or {}
        if not isinstance(value, dict):
            raise SourceInvalid(f"config.json: {key} is {value!r}, expected an object")
        parameters |= value
    return parameters
