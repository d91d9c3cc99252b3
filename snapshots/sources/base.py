"""What every source offers: a cheap identity, and a checkpoint to read tensor by tensor."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from snapshots.manifest import SourceKind
from snapshots.progress import OnProgress

if TYPE_CHECKING:
    import torch  # finding a snapshot that exists must not cost importing it

DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
DTYPES |= {"F64": "float32"}  # nobody serves doubles


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What a source is, without reading its weights; fields as in `manifest.Source`."""

    kind: SourceKind
    location: str
    requested_revision: str = ""
    revision: str = ""
    fingerprint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """A tensor of a checkpoint.

    Attributes:
        dtype: As safetensors spells it, or the GGUF quantisation it is unpacked from.
        shape: Rows first, as torch has it.
    """

    dtype: str
    shape: tuple[int, ...]


class Checkpoint(Protocol):
    """An open source. Tensor names are those of transformers.

    Attributes:
        config: The transformers config.
        tensors: Every tensor there is.
        dtype: What `auto` stands for.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    dtype: str

    def read_rows(self, name: str, start: int, stop: int) -> "torch.Tensor":
        """Return rows [start, stop) of a tensor, in the type it is kept in, on the host.

        Raises:
            SourceInvalid: The file ends early.
        """
        ...

    def write_files(self, directory: Path) -> None:
        """Write config, generation config, tokenizer and chat template into `directory`.

        Raises:
            SourceInvalid: One is missing or malformed.
        """
        ...


class ModelSource(Protocol):
    """A model that is not open yet.

    Attributes:
        default_name: What a snapshot is called when nobody says.
    """

    default_name: str

    def identify(self) -> Identity:
        """Return what the source is now; reads no weights.

        Raises:
            SourceError: It is missing, gated, unreachable or only has pickles.
        """
        ...

    def open(self, on_progress: OnProgress) -> AbstractContextManager[Checkpoint]:
        """Open it, downloading what is needed.

        Raises:
            SourceError: As `identify`, or it is malformed.
        """
        ...
