"""Which architectures can be built, by the name a checkpoint gives."""

from snapshots.architectures.llama import LLAMA, QWEN2
from snapshots.architectures.weights import Architecture
from snapshots.errors import SourceUnsupported

ARCHITECTURES = (LLAMA, QWEN2)


def architecture_of(model_type: object) -> Architecture:
    """Return the architecture of a transformers config.

    Raises:
        SourceUnsupported: There is none.
    """
    for architecture in ARCHITECTURES:
        if architecture.name == model_type:
            return architecture
    known = ", ".join(architecture.name for architecture in ARCHITECTURES)
    raise SourceUnsupported(f"no weight map for model_type {model_type!r} (known: {known})")
