"""Reading and writing the header of safetensors files. Standard library only.

Everything in a header is checked before it is used: names, types, shapes, and that the tensors
fill the data section without holes or overlap. Knows nothing of models.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

ITEM_BYTES: Mapping[str, int] = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
    "C64": 8,
}
LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
METADATA_KEY = "__metadata__"


class HeaderError(Exception):
    """The file is not safetensors, or its header is wrong."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSlot:
    """Where a tensor lies.

    Attributes:
        dtype: As safetensors spells it, such as BF16.
        shape: Sizes of its dimensions.
        offset: From the start of the data section, in bytes.
        num_bytes: Its length.
    """

    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """A parsed header.

    Attributes:
        tensors: By name, in the order of their offsets.
        metadata: The free-form strings of the file.
        data_offset: Where the data section starts in the file.
    """

    tensors: Mapping[str, TensorSlot]
    metadata: Mapping[str, str]
    data_offset: int


def read_header(descriptor: int) -> Header:
    """Read and check the header of an open file.

    Raises:
        HeaderError: Not safetensors, or tensors that do not fill the file exactly.
    """
    size = os.fstat(descriptor).st_size
    length = int.from_bytes(os.pread(descriptor, LENGTH_BYTES, 0), "little")
    if size < LENGTH_BYTES or not 2 <= length <= min(MAX_HEADER_BYTES, size - LENGTH_BYTES):
        raise HeaderError(f"a header of {length} bytes does not fit a file of {size}")
    data_offset = LENGTH_BYTES + length
    return parse_header(os.pread(descriptor, length, LENGTH_BYTES), size - data_offset)


def parse_header(text: bytes, data_bytes: int) -> Header:
    """Check the JSON part of a header against the length of the data section.

    Raises:
        HeaderError: Malformed, or tensors that do not fill the data section exactly.
    """
    if not text.startswith(b"{"):
        raise HeaderError("the header is not a JSON object")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise HeaderError(f"the header is not JSON: {error}") from error
    metadata = content.pop(METADATA_KEY, {})
    if not isinstance(metadata, dict):
        raise HeaderError("the header's metadata is not an object")
    slots = {name: _slot(name, entry) for name, entry in content.items()}
    ordered = dict(sorted(slots.items(), key=lambda item: (item[1].offset, item[1].num_bytes)))
    _check_no_holes(ordered, data_bytes)
    return Header(tensors=ordered, metadata=metadata, data_offset=LENGTH_BYTES + len(text))


def format_header(
    tensors: Mapping[str, TensorSlot], metadata: Mapping[str, str], *, alignment: int
) -> bytes:
    """Return everything before the data section, padded so that this starts aligned."""
    content: dict[str, Any] = {METADATA_KEY: dict(metadata)}
    for name, slot in tensors.items():
        content[name] = {
            "dtype": slot.dtype,
            "shape": list(slot.shape),
            "data_offsets": [slot.offset, slot.offset + slot.num_bytes],
        }
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-(LENGTH_BYTES + len(text)) % alignment)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def _slot(name: str, entry: object) -> TensorSlot:
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise HeaderError(f"tensor {name!r} has the unknown type {dtype!r}")
    if not _are_counts(shape):
        raise HeaderError(f"tensor {name!r} has the impossible shape {shape!r}")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise HeaderError(f"tensor {name!r} has the impossible offsets {offsets!r}")
    num_bytes = math.prod(shape) * ITEM_BYTES[dtype]
    if offsets[1] - offsets[0] != num_bytes:
        raise HeaderError(f"tensor {name!r} of {num_bytes} bytes has the offsets {offsets!r}")
    return TensorSlot(dtype=dtype, shape=tuple(shape), offset=offsets[0], num_bytes=num_bytes)


def _are_counts(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_no_holes(slots: Mapping[str, TensorSlot], data_bytes: int) -> None:
    end = 0
    for name, slot in slots.items():
        if slot.offset != end:
            raise HeaderError(
                f"tensor {name!r} starts at {slot.offset}, the one before ends at {end}"
            )
        end += slot.num_bytes
    if end != data_bytes:
        raise HeaderError(f"the tensors end at {end}, the file has {data_bytes} bytes of data")
