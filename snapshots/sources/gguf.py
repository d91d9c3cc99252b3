"""A GGUF file: weights unpacked block of rows by block of rows, metadata through transformers."""

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snapshots.architectures.registry import ARCHITECTURES
from snapshots.architectures.weights import Architecture, Part
from snapshots.errors import SourceInvalid, SourceNotFound, SourceUnsupported
from snapshots.layout import numbered, parts_of
from snapshots.manifest import SourceKind
from snapshots.model_shape import ModelShape
from snapshots.progress import OnProgress
from snapshots.sources.base import Identity, TensorInfo
from snapshots.sources.companions import (
    check_tokenizer,
    convert_tokenizer,
    write_chat_template,
    write_generation_config,
    write_json,
)
from snapshots.sources.gguf_rope import (
    ROPE_FACTORS,
    linear_factor,
    linear_parameters,
    rope_parameters,
)
from snapshots.sources.paths import fingerprint

if TYPE_CHECKING:
    import torch
    from gguf import GGUFReader
    from gguf.gguf_reader import ReaderTensor

MAGIC = b"GGUF"
PLAIN_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}

# What gguf and transformers raise for files that are cut short or make no sense.
_PARSE_ERRORS = (ValueError, IndexError, KeyError, TypeError, OverflowError, NotImplementedError)


class GgufSource:
    """Reads llama.cpp's format."""

    def __init__(self, path: Path) -> None:
        self._path = path.expanduser().resolve()
        self.default_name = self._path.stem

    def identify(self) -> Identity:
        """Return the file's identity, by name, size and time of change."""
        if not self._path.is_file():
            raise SourceNotFound(f"{self._path} does not exist")
        with self._path.open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise SourceInvalid(f"{self._path} is not a GGUF file")
        return Identity(
            kind=SourceKind.GGUF,
            location=str(self._path),
            fingerprint=fingerprint([self._path], self._path.parent),
        )

    @contextmanager
    def open(self, on_progress: OnProgress) -> Iterator["GgufCheckpoint"]:
        """Parse the file's metadata."""
        with _parsed(self._path) as reader:
            yield GgufCheckpoint(self._path, reader)


class GgufCheckpoint:
    """An open GGUF file, its tensors under transformers' names."""

    def __init__(self, path: Path, reader: "GGUFReader") -> None:
        self._path = path
        stored = {tensor.name: tensor for tensor in reader.tensors}
        architecture = _architecture(reader, path)
        self.config: Mapping[str, Any] = _config(path, reader, architecture)
        shape = ModelShape.from_config(self.config)
        self._shape = shape
        self._is_interleaved = architecture.has_interleaved_gguf
        self._tensors: dict[str, tuple[ReaderTensor, Part]] = {}
        for part, layer in parts_of(architecture, shape):
            tensor = stored.pop(numbered(part.gguf, layer), None)
            if tensor is not None:
                self._tensors[numbered(part.name, layer)] = (tensor, part)
        stored.pop(ROPE_FACTORS, None)
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(dtype=tensor.tensor_type.name, shape=_shape(tensor))
            for name, (tensor, _) in self._tensors.items()
        } | {
            name: TensorInfo(dtype=t.tensor_type.name, shape=_shape(t))
            for name, t in stored.items()
        }
        self.dtype = _auto_dtype(self.tensors)

    def read_rows(self, name: str, start: int, stop: int) -> "torch.Tensor":
        """Return rows [start, stop) of a tensor, unpacked to float32."""
        import numpy as np  # reusing a snapshot needs neither
        import torch
        from gguf.quants import dequantize

        tensor, part = self._tensors[name]
        rows = np.arange(start, stop)
        if part.is_rotary and self._is_interleaved:
            rows = _interleaved(rows, self._shape.head_dim)
        values = dequantize(tensor.data[rows], tensor.tensor_type)
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))

    def write_files(self, directory: Path) -> None:
        """Write what transformers makes of the metadata."""
        write_json(directory / "config.json", self.config)
        write_generation_config(directory, self.config)
        convert_tokenizer(directory, self._path.parent, gguf_file=self._path.name)
        write_chat_template(directory)
        check_tokenizer(directory)


@contextmanager
def _parsed(path: Path) -> Iterator["GGUFReader"]:
    from snapshots.sources.gguf_reader import parsed  # build only, pulls in numpy

    with ExitStack() as stack:
        try:
            reader = stack.enter_context(parsed(path))
        except _PARSE_ERRORS as error:
            raise SourceInvalid(f"{path} is not a complete GGUF file: {error}") from error
        split = reader.get_field("split.count")
        if split is not None and split.contents() > 1:
            raise SourceUnsupported(
                f"{path} is one of {split.contents()} parts",
                hint="join them with `llama-gguf-split --merge`",
            )
        yield reader


def _architecture(reader: "GGUFReader", path: Path) -> Architecture:
    field = reader.get_field("general.architecture")
    found = None if field is None else field.contents()
    for architecture in ARCHITECTURES:
        if architecture.gguf_name == found:
            return architecture
    known = ", ".join(filter(None, (architecture.gguf_name for architecture in ARCHITECTURES)))
    raise SourceUnsupported(f"no weight map for {found!r} in {path} (known: {known})")


def _config(path: Path, reader: "GGUFReader", architecture: Architecture) -> dict[str, Any]:
    """Return the transformers config, without what depends on where the file lies."""
    from transformers import AutoConfig  # build only, takes seconds

    try:
        loaded = AutoConfig.from_pretrained(
            str(path.parent), gguf_file=path.name, local_files_only=True
        )
    except (*_PARSE_ERRORS, OSError, ImportError) as error:
        raise SourceInvalid(f"transformers cannot read {path}: {error}") from error
    config = {
        key: value
        for key, value in loaded.to_dict().items()
        if not re.match("_|transformers_version", key)
    }
    scaling = _rope_scaling(reader, architecture, config)
    return config | ({"rope_parameters": scaling} if scaling else {})


def _rope_scaling(
    reader: "GGUFReader", architecture: Architecture, config: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the parameters of the file's rotary scaling, which transformers does not read."""
    prefix = f"{architecture.gguf_name}."
    factor = linear_factor(
        {
            name.removeprefix(prefix): field.contents()
            for name, field in reader.fields.items()
            if name.startswith(f"{prefix}rope.")
        }
    )
    factors = [tensor.data.tolist() for tensor in reader.tensors if tensor.name == ROPE_FACTORS]
    if factor == 1.0:
        return rope_parameters(factors[0], config) if factors else {}
    if factors:
        raise SourceUnsupported(f"{ROPE_FACTORS} and a linear scaling exclude each other")
    return linear_parameters(factor, config)


def _shape(tensor: "ReaderTensor") -> tuple[int, ...]:
    return tuple(int(size) for size in reversed(tensor.shape))


def _auto_dtype(tensors: Mapping[str, TensorInfo]) -> str:
    """Return the type of the matrices; quantised ones are served in bfloat16."""
    matrices = {info.dtype for info in tensors.values() if len(info.shape) > 1}
    return PLAIN_DTYPES.get(matrices.pop(), "bfloat16") if len(matrices) == 1 else "bfloat16"


def _interleaved(rows: Any, head_dim: int) -> Any:
    """Return where llama.cpp keeps rows of a rotary projection.

    transformers has a head as two halves [first | second]; llama.cpp has their rows in turn.
    """
    head, within = rows // head_dim, rows % head_dim
    half, index = within // (head_dim // 2), within % (head_dim // 2)
    return head * head_dim + 2 * index + half
