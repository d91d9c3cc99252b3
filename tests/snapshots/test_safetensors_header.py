"""Headers: what is written parses, what is wrong is refused before it is used."""

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapshots.safetensors_header import (
    LENGTH_BYTES,
    HeaderError,
    TensorSlot,
    format_header,
    parse_header,
)


def entry(start: int = 0, end: int = 8, **changes: object) -> dict[str, object]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [start, end]} | changes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[]", "not a JSON object"),
        (b"{", "not JSON"),
        (b'{"__metadata__": 3}', "metadata"),
        ({"t": 3}, "unknown type None"),
        ({"t": entry(dtype="F13")}, "unknown type 'F13'"),
        ({"t": entry(dtype=["F32"])}, "unknown type"),
        ({"t": entry(shape=[-2])}, "impossible shape"),
        ({"t": entry(shape=[2.0])}, "impossible shape"),
        ({"t": entry(shape=[True, 2])}, "impossible shape"),
        ({"t": entry(data_offsets=[0])}, "impossible offsets"),
        ({"t": entry(data_offsets=[-8, 0])}, "impossible offsets"),
        ({"t": entry(0, 4)}, "8 bytes has the offsets"),
        ({"t": entry(shape=[1 << 62, 4])}, "has the offsets"),
        ({"t": entry(8, 16)}, "starts at 8, the one before ends at 0"),
        ({"a": entry(0, 8), "b": entry(4, 12)}, "starts at 4, the one before ends at 8"),
        ({"t": entry()}, "the tensors end at 8, the file has 16"),
    ],
)
def test_wrong_headers_are_refused(content: bytes | dict[str, object], message: str) -> None:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    with pytest.raises(HeaderError, match=message):
        parse_header(text, 16)


@given(st.binary(max_size=200))
def test_garbage_raises_nothing_but_header_errors(text: bytes) -> None:
    with contextlib.suppress(HeaderError):
        parse_header(b"{" + text, 0)


@given(st.lists(st.integers(1, 50), max_size=8), st.sampled_from([8, 512, 4096]))
def test_what_is_formatted_parses_and_is_aligned(sizes: list[int], alignment: int) -> None:
    slots, end = {}, 0
    for index, size in enumerate(sizes):
        slot = TensorSlot(dtype="BF16", shape=(size,), offset=end, num_bytes=2 * size)
        slots[f"tensor {index} é"] = slot
        end += 2 * size
    header = format_header(slots, {"format": "pt"}, alignment=alignment)
    parsed = parse_header(header[LENGTH_BYTES:], end)
    assert len(header) % alignment == 0
    assert int.from_bytes(header[:LENGTH_BYTES], "little") == len(header) - LENGTH_BYTES
    assert dict(parsed.tensors) == slots
    assert parsed.metadata == {"format": "pt"}
