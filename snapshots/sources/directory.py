"""A local directory of safetensors files, sharded or not."""

import os
import re
from collections.abc import Iterator, Mapping, Set
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snapshots.errors import SourceInvalid, SourceNotFound, SourceUnsupported
from snapshots.manifest import SourceKind
from snapshots.progress import OnProgress
from snapshots.safetensors_header import Header, HeaderError, read_header
from snapshots.sources.base import DTYPES, Identity, TensorInfo
from snapshots.sources.companions import (
    check_tokenizer,
    convert_tokenizer,
    write_chat_template,
    write_generation_config,
)
from snapshots.sources.paths import (
    CONFIG_FILES,
    INDEX_FILE,
    POOLING_FILES,
    TOKENIZER_FILES,
    boundary_of,
    contained,
    fingerprint,
    is_pickle,
    pickle_refused,
    read_json,
)
from snapshots.sources.pooling import write_pooling

if TYPE_CHECKING:
    import torch

COUNTERS = frozenset({"I64"})  # such as the list of positions in old BERT checkpoints: no weights
_SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors", re.ASCII)


class DirectorySource:
    """Reads a checkpoint as transformers writes it."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory.expanduser().resolve()
        self.default_name = _default_name(self._directory)

    def identify(self) -> Identity:
        """Return the directory's identity, by names, sizes and times of its files."""
        files = weight_files(self._directory)
        for name in (*CONFIG_FILES, *TOKENIZER_FILES, INDEX_FILE, *POOLING_FILES):
            if (self._directory / name).exists():
                files.append(self._directory / name)
        return Identity(
            kind=SourceKind.DIRECTORY,
            location=str(self._directory),
            fingerprint=fingerprint(files, self._directory),
        )

    @contextmanager
    def open(self, on_progress: OnProgress) -> Iterator["DirectoryCheckpoint"]:
        """Open all weight files."""
        with ExitStack() as stack:
            yield DirectoryCheckpoint(self._directory, stack)


class DirectoryCheckpoint:
    """An open directory; reads weights with plain positioned reads."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self._directory = directory
        self._boundary = boundary_of(directory)
        self._places: dict[str, tuple[int, Path, Header]] = {}
        self._counters: set[str] = set()
        for path in weight_files(directory):
            self._open_weights(path, stack)
        _check_index(directory, self._places, self._counters)
        self.config: Mapping[str, Any] = read_json(self._file("config.json"))
        if self.config.get("quantization_config"):
            raise SourceUnsupported(
                f"{directory} is quantised, which this version does not serve",
                hint="use the full-precision checkpoint or a GGUF file",
            )
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(dtype=header.tensors[name].dtype, shape=header.tensors[name].shape)
            for name, (_, _, header) in self._places.items()
        }
        self.dtype = _auto_dtype(self.config, self.tensors)

    def read_rows(self, name: str, start: int, stop: int) -> "torch.Tensor":
        """Return rows [start, stop) of a tensor."""
        import torch  # reusing a snapshot needs no torch

        descriptor, path, header = self._places[name]
        slot = header.tensors[name]
        row_bytes = slot.num_bytes // slot.shape[0]
        data = torch.empty((stop - start) * row_bytes, dtype=torch.uint8)
        view = data.numpy().data
        offset = header.data_offset + slot.offset + start * row_bytes
        done = 0
        while done < len(view):
            count = os.preadv(descriptor, [view[done:]], offset + done)
            if not count:
                raise SourceInvalid(f"{path} ends within {name}")
            done += count
        dtype = {"F64": torch.float64}.get(slot.dtype) or getattr(torch, DTYPES[slot.dtype])
        return data.view(dtype).view(stop - start, *slot.shape[1:])

    def write_files(self, directory: Path) -> None:
        """Copy the small files, deriving those that older checkpoints lack."""
        for name in (*CONFIG_FILES, *TOKENIZER_FILES[:4]):
            if (self._directory / name).exists():
                (directory / name).write_bytes(self._file(name).read_bytes())
        if not (directory / "generation_config.json").exists():
            write_generation_config(directory, self.config)
        if not (directory / "tokenizer.json").exists():
            self._convert_tokenizer(directory)
        write_chat_template(directory)
        (directory / "chat_template.json").unlink(missing_ok=True)
        found = [name for name in POOLING_FILES if (self._directory / name).exists()]
        write_pooling(directory, {name: self._file(name) for name in found})
        check_tokenizer(directory)

    def _convert_tokenizer(self, directory: Path) -> None:
        for name in TOKENIZER_FILES:
            if (self._directory / name).exists():
                self._file(name)  # must lie inside the source
        convert_tokenizer(directory, self._directory)

    def _open_weights(self, path: Path, stack: ExitStack) -> None:
        real = contained(path, self._boundary)
        descriptor = os.open(real, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        stack.callback(os.close, descriptor)
        try:
            header = read_header(descriptor)
        except HeaderError as error:
            raise SourceInvalid(f"{path} is not a safetensors file: {error}") from error
        for name, slot in header.tensors.items():
            if slot.dtype in COUNTERS:
                self._counters.add(name)
                continue
            if name in self._places:
                raise SourceInvalid(
                    f"{name} is in both {self._places[name][1].name} and {path.name}"
                )
            if slot.dtype not in DTYPES:
                raise SourceUnsupported(
                    f"{name} in {path} is {slot.dtype}, which this version does not serve"
                )
            self._places[name] = (descriptor, path, header)

    def _file(self, name: str) -> Path:
        return contained(self._directory / name, self._boundary)


def weight_files(directory: Path) -> list[Path]:
    """Return the safetensors files that make up a checkpoint.

    Raises:
        SourceNotFound: No directory, or no weights in it.
        PickleRefused: Only pickles in it.
        SourceInvalid: An index that names other files than there are.
    """
    if not directory.is_dir():
        raise SourceNotFound(f"{directory} is not a directory")
    if (directory / INDEX_FILE).exists():
        return [directory / name for name in sorted(set(_index(directory).values()))]
    if (directory / "model.safetensors").exists():
        return [directory / "model.safetensors"]
    found = sorted(directory.glob("*.safetensors"))
    pickles = [path.name for path in directory.iterdir() if is_pickle(path.name)]
    if not found and pickles:
        raise pickle_refused(str(directory), pickles)
    if not found:
        raise SourceNotFound(
            f"{directory} has no .safetensors files", hint="point at a checkpoint or a .gguf file"
        )
    return found


def _index(directory: Path) -> dict[str, str]:
    path = contained(directory / INDEX_FILE, boundary_of(directory))
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceInvalid(f"{path} has no weight_map")
    for name in weight_map.values():
        if not isinstance(name, str) or not _SHARD_NAME.fullmatch(name):
            raise SourceInvalid(f"{path} names {name!r}, which is no safetensors file beside it")
        if not (directory / name).exists():
            raise SourceInvalid(
                f"{directory} lacks {name}, which its index names", hint="finish the download"
            )
    return weight_map


def _check_index(
    directory: Path, places: Mapping[str, tuple[int, Path, Header]], left_out: Set[str]
) -> None:
    if not (directory / INDEX_FILE).exists():
        return
    for tensor, file in _index(directory).items():
        if tensor in left_out:
            continue
        if tensor not in places or places[tensor][1].name != file:
            raise SourceInvalid(f"{file} does not hold {tensor}, as {INDEX_FILE} says")


def _auto_dtype(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> str:
    declared = config.get("dtype") or config.get("torch_dtype")
    if declared in DTYPES.values():
        return str(declared)
    largest = max(tensors.values(), key=lambda info: len(info.shape) and info.shape[0])
    return DTYPES[largest.dtype]


def _default_name(directory: Path) -> str:
    if boundary_of(directory) != directory:  # a hub cache: models--org--name/snapshots/commit
        return directory.parent.parent.name.rpartition("--")[2]
    return directory.name
