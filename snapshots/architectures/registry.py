"""Which models can be built: those that have a weight map and that the runtime can compute.

The runtime checks again when it loads; here it is said before a download and a build.
"""

from collections.abc import Mapping
from typing import Any

from snapshots.architectures.bert import BERT
from snapshots.architectures.llama import LLAMA
from snapshots.architectures.weights import Architecture
from snapshots.errors import SourceInvalid, SourceUnsupported

ARCHITECTURES = (LLAMA, BERT)
ROPE_TYPES = ("default", "linear", "llama3")


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture of a transformers config.

    Raises:
        SourceUnsupported: There is none, or its activation, its kind of positions or its rotary
            scaling is not computed here.
        SourceInvalid: The rotary scaling is malformed.
    """
    model_type = config.get("model_type")
    for architecture in ARCHITECTURES:
        if architecture.name == model_type:
            break
    else:
        known = ", ".join(architecture.name for architecture in ARCHITECTURES)
        raise SourceUnsupported(f"no weight map for model_type {model_type!r} (known: {known})")
    name = next(iter(config.get("architectures") or architecture.classes))
    _check("architecture", name, architecture.classes)
    activation = config.get("hidden_act", architecture.activations[0])
    _check("activation", activation, architecture.activations)
    if architecture is BERT:
        _check_encoder(config)
    else:
        _check_rope(config)
    return architecture


def _check_encoder(config: Mapping[str, Any]) -> None:
    positions = config.get("position_embedding_type", "absolute")
    _check("position_embedding_type", positions, ("absolute",))
    if config.get("is_decoder"):
        raise SourceUnsupported("config.json: a BERT that decodes is not supported")


def _check_rope(config: Mapping[str, Any]) -> None:
    rope = _rope_parameters(config)
    _check("rope type", rope.get("rope_type") or rope.get("type") or "default", ROPE_TYPES)
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise SourceUnsupported("config.json: partial rotary embeddings are not supported")


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
