"""Where every byte of a snapshot goes, decided before the first is written.

The same architecture, shape, type and ranks always give the same layout, so an interrupted build
can be taken up again. No torch, no files.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from snapshots.architectures.weights import Architecture, FusedTensor, Part
from snapshots.errors import SourceInvalid
from snapshots.manifest import rank_path
from snapshots.model_shape import ModelShape, Span
from snapshots.safetensors_header import ITEM_BYTES, TensorSlot, format_header

DTYPE_CODES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}

TENSOR_ALIGNMENT = 256
GROUP_ALIGNMENT = 2 << 20  # a huge page, and the granule in which GPU memory is mapped
FILE_ALIGNMENT = 4096  # what O_DIRECT wants
PAD_PREFIX = "__pad."


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """What one rank takes of one checkpoint tensor.

    Attributes:
        source: Its name in the checkpoint.
        rows: Those taken.
        columns: Those taken; None for all, and for vectors.
        first_row: Where they start in the rank's tensor.
    """

    source: str
    rows: Span
    columns: Span | None
    first_row: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedTensor:
    """A tensor of one rank: its place and where its rows come from."""

    name: str
    slot: TensorSlot
    pieces: tuple[Piece, ...]

    @property
    def row_bytes(self) -> int:
        """Length of one row."""
        return self.slot.num_bytes // self.slot.shape[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Tensors that are used, mapped and journalled together.

    Attributes:
        tensors: In execution order.
        span: Bytes of the data section, up to the start of the next group.
    """

    tensors: tuple[PlannedTensor, ...]
    span: Span


@dataclass(frozen=True, slots=True, kw_only=True)
class RankLayout:
    """One rank file: header, groups, length of the data section."""

    path: str
    header: bytes
    groups: tuple[Group, ...]
    slots: dict[str, TensorSlot]
    data_bytes: int

    @property
    def size_bytes(self) -> int:
        """Length of the file."""
        return len(self.header) + self.data_bytes


def plan(
    architecture: Architecture,
    shape: ModelShape,
    *,
    present: Collection[str],
    dtype: str,
    tensor_parallel_sizes: Sequence[int],
) -> tuple[RankLayout, ...]:
    """Lay out all rank files.

    Args:
        architecture: The weights there are.
        shape: Their sizes.
        present: Tensors of the checkpoint, to tell which optional ones it has.
        dtype: Type of all weights, as torch spells it.
        tensor_parallel_sizes: Ascending.

    Raises:
        TensorParallelUnsupported: The model does not divide over the ranks.
        SourceInvalid: The checkpoint lacks a tensor.
    """
    groups = [list(group) for group in _groups(architecture, shape, present)]
    layouts = []
    for num_ranks in tensor_parallel_sizes:
        shape.check_divides(num_ranks)
        for rank in range(num_ranks):
            planner = _RankPlanner(shape, dtype, num_ranks, rank)
            layouts.append(planner.plan(groups))
    return tuple(layouts)


def parts_of(architecture: Architecture, shape: ModelShape) -> Iterator[tuple[Part, int | None]]:
    """Yield every part a checkpoint may hold, with its layer."""
    for fused in (*architecture.embedding, *architecture.final, *_head(architecture)):
        yield from ((part, None) for part in fused.parts)
    for layer in range(shape.num_layers):
        for fused in architecture.layer:
            yield from ((part, layer) for part in fused.parts)


def numbered(name: str, layer: int | None) -> str:
    """Return a name with the layer filled in."""
    return name if layer is None else name.replace("{i}", str(layer))


def _groups(
    architecture: Architecture, shape: ModelShape, present: Collection[str]
) -> Iterator[Iterator[tuple[FusedTensor, int | None]]]:
    yield ((fused, None) for fused in architecture.embedding)
    for layer in range(shape.num_layers):
        yield ((fused, layer) for fused in architecture.layer if _is_wanted(fused, layer, present))
    last = (*architecture.final, *(() if shape.is_tied else _head(architecture)))
    if last:
        yield ((fused, None) for fused in last)


def _head(architecture: Architecture) -> tuple[FusedTensor, ...]:
    return () if architecture.head is None else (architecture.head,)


def _is_wanted(fused: FusedTensor, layer: int, present: Collection[str]) -> bool:
    found = [numbered(part.name, layer) in present for part in fused.parts]
    return any(found) or not fused.is_optional


class _RankPlanner:
    """Places one rank's tensors one after the other, filling the gaps with padding tensors."""

    def __init__(self, shape: ModelShape, dtype: str, num_ranks: int, rank: int) -> None:
        self._shape = shape
        self._code = DTYPE_CODES[dtype]
        self._num_ranks = num_ranks
        self._rank = rank
        self._slots: dict[str, TensorSlot] = {}
        self._end = 0

    def plan(self, groups: Sequence[Sequence[tuple[FusedTensor, int | None]]]) -> RankLayout:
        placed = []
        for group in groups:
            self._pad_to(GROUP_ALIGNMENT)
            start = self._end
            placed.append((start, tuple(self._place(fused, layer) for fused, layer in group)))
        self._pad_to(FILE_ALIGNMENT)
        ends = [start for start, _ in placed[1:]] + [self._end]
        return RankLayout(
            path=rank_path(self._num_ranks, self._rank),
            header=self._header(),
            groups=tuple(
                Group(tensors=tensors, span=Span(start, end))
                for (start, tensors), end in zip(placed, ends, strict=True)
            ),
            slots=self._slots,
            data_bytes=self._end,
        )

    def _header(self) -> bytes:
        metadata = {"format": "pt", "tensor_parallel_size": str(self._num_ranks)}
        metadata["rank"] = str(self._rank)
        return format_header(self._slots, metadata, alignment=FILE_ALIGNMENT)

    def _place(self, fused: FusedTensor, layer: int | None) -> PlannedTensor:
        self._pad_to(TENSOR_ALIGNMENT)
        pieces = []
        num_rows = 0
        columns: tuple[int, ...] = ()
        for part in fused.parts:
            sizes = [self._rank_size(part, axis, fused) for axis in range(len(part.shape))]
            spans = [self._rank_span(part, axis, fused) for axis in range(len(part.shape))]
            pieces.append(
                Piece(
                    source=numbered(part.name, layer),
                    rows=spans[0],
                    columns=spans[1] if fused.shard_axis == 1 else None,
                    first_row=num_rows,
                )
            )
            num_rows += sizes[0]
            columns = tuple(sizes[1:])
        name = numbered(fused.name, layer)
        slot = self._append(name, self._code, (num_rows, *columns))
        return PlannedTensor(name=name, slot=slot, pieces=tuple(pieces))

    def _rank_size(self, part: Part, axis: int, fused: FusedTensor) -> int:
        dim = part.shape[axis]
        if axis == fused.shard_axis:
            return self._shape.rank_size(dim, self._num_ranks)
        return self._shape.size(dim)

    def _rank_span(self, part: Part, axis: int, fused: FusedTensor) -> Span:
        dim = part.shape[axis]
        if axis == fused.shard_axis:
            return self._shape.rank_span(dim, self._num_ranks, self._rank)
        return Span(0, self._shape.size(dim))

    def _pad_to(self, alignment: int) -> None:
        gap = -self._end % alignment
        if gap:
            number = sum(name.startswith(PAD_PREFIX) for name in self._slots)
            self._append(f"{PAD_PREFIX}{number}", "U8", (gap,))

    def _append(self, name: str, dtype: str, shape: tuple[int, ...]) -> TensorSlot:
        num_bytes = math.prod(shape) * ITEM_BYTES[dtype]
        slot = TensorSlot(dtype=dtype, shape=shape, offset=self._end, num_bytes=num_bytes)
        self._slots[name] = slot
        self._end += num_bytes
        return slot


def check_parts(
    architecture: Architecture,
    shape: ModelShape,
    layouts: Sequence[RankLayout],
    shapes: dict[str, tuple[int, ...]],
) -> None:
    """Make sure that a checkpoint holds what the layouts take, in the right sizes.

    Raises:
        SourceInvalid: A tensor is missing or has another shape than the config says.
    """
    expected = {
        numbered(part.name, layer): tuple(shape.size(dim) for dim in part.shape)
        for part, layer in parts_of(architecture, shape)
    }
    for group in layouts[0].groups:
        for tensor in group.tensors:
            for piece in tensor.pieces:
                if piece.source not in shapes:
                    raise SourceInvalid(f"the checkpoint has no tensor {piece.source!r}")
                if shapes[piece.source] != expected[piece.source]:
                    raise SourceInvalid(
                        f"{piece.source} has the shape {shapes[piece.source]}, the config says "
                        f"{expected[piece.source]}"
                    )
