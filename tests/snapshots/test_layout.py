"""Layouts, for any model shape: aligned, without holes, in execution order, complete."""

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapshots.architectures.llama import LLAMA
from snapshots.errors import SourceInvalid, TensorParallelUnsupported
from snapshots.layout import (
    DTYPE_CODES,
    FILE_ALIGNMENT,
    GROUP_ALIGNMENT,
    PAD_PREFIX,
    TENSOR_ALIGNMENT,
    RankLayout,
    numbered,
    parts_of,
    plan,
)
from snapshots.model_shape import ModelShape
from snapshots.safetensors_header import LENGTH_BYTES, parse_header

SHAPES = st.builds(
    lambda layers, kv, groups, head, hidden, inner, vocabulary, tied: ModelShape(
        num_layers=layers,
        hidden_size=hidden,
        num_heads=kv * groups,
        num_kv_heads=kv,
        head_dim=2 * head,
        intermediate_size=8 * inner,
        vocab_size=vocabulary,
        is_tied=tied,
    ),
    st.integers(1, 4),
    st.sampled_from([1, 2, 3, 4, 8]),
    st.sampled_from([1, 2, 4, 8]),
    st.integers(1, 40),
    st.integers(1, 300),
    st.integers(1, 100),
    st.integers(1, 5000),
    st.booleans(),
)
RANKS = st.sampled_from([1, 2, 4, 8])
DTYPES = st.sampled_from(list(DTYPE_CODES))


def layouts_of(
    shape: ModelShape, dtype: str = "bfloat16", num_ranks: int = 1
) -> tuple[RankLayout, ...]:
    present = {numbered(part.name, layer) for part, layer in parts_of(LLAMA, shape)}
    return plan(LLAMA, shape, present=present, dtype=dtype, tensor_parallel_sizes=(num_ranks,))


def dividing(shape: ModelShape, num_ranks: int) -> bool:
    try:
        shape.check_divides(num_ranks)
    except TensorParallelUnsupported:
        return False
    return True


@given(SHAPES, DTYPES, RANKS)
def test_headers_parse_and_leave_no_hole(shape: ModelShape, dtype: str, num_ranks: int) -> None:
    if not dividing(shape, num_ranks):
        return
    for layout in layouts_of(shape, dtype, num_ranks):
        header = parse_header(layout.header[LENGTH_BYTES:], layout.data_bytes)
        assert header.data_offset == len(layout.header)
        assert dict(header.tensors) == layout.slots
        assert list(header.tensors) == list(layout.slots)


@given(SHAPES, DTYPES, RANKS)
def test_tensors_groups_and_files_are_aligned(
    shape: ModelShape, dtype: str, num_ranks: int
) -> None:
    if not dividing(shape, num_ranks):
        return
    for layout in layouts_of(shape, dtype, num_ranks):
        assert len(layout.header) % FILE_ALIGNMENT == 0
        assert layout.data_bytes % FILE_ALIGNMENT == 0
        assert [group.span.stop for group in layout.groups[:-1]] == [
            group.span.start for group in layout.groups[1:]
        ]
        assert layout.groups[-1].span.stop == layout.data_bytes
        for group in layout.groups:
            assert group.span.start % GROUP_ALIGNMENT == 0
            assert group.tensors[0].slot.offset == group.span.start
            for tensor in group.tensors:
                assert tensor.slot.offset % TENSOR_ALIGNMENT == 0
                assert tensor.slot.offset + tensor.slot.num_bytes <= group.span.stop


@given(SHAPES)
def test_tensors_come_in_execution_order(shape: ModelShape) -> None:
    (layout,) = layouts_of(shape)
    names = [name for name in layout.slots if not name.startswith(PAD_PREFIX)]
    assert names == list(execution_order(shape))


@given(SHAPES, RANKS)
def test_ranks_together_take_every_row_and_column(shape: ModelShape, num_ranks: int) -> None:
    if not dividing(shape, num_ranks):
        return
    taken: dict[str, list[tuple[range, range]]] = {}
    for layout in layouts_of(shape, num_ranks=num_ranks):
        for group in layout.groups:
            for tensor in group.tensors:
                end = 0
                for piece in tensor.pieces:
                    assert piece.first_row >= end
                    end = piece.first_row + len(range(*piece.rows))
                    columns = range(*(piece.columns or (0, 1)))
                    taken.setdefault(piece.source, []).append((range(*piece.rows), columns))
                assert end <= tensor.slot.shape[0]
    for part, layer in parts_of(LLAMA, shape):
        name = numbered(part.name, layer)
        if name == "lm_head.weight" and shape.is_tied:
            continue
        pieces = taken[name]
        assert {r for rows, _ in pieces for r in rows} == set(range(shape.size(part.shape[0])))
        if pieces[0][1] != range(1):
            columns_taken = {c for _, columns in pieces for c in columns}
            assert columns_taken == set(range(shape.size(part.shape[1])))


@given(SHAPES, RANKS)
def test_vocabulary_is_padded_to_a_multiple_of_64_per_rank(
    shape: ModelShape, num_ranks: int
) -> None:
    if not dividing(shape, num_ranks):
        return
    rows = [
        layout.slots["embed_tokens.weight"].shape[0]
        for layout in layouts_of(shape, num_ranks=num_ranks)
    ]
    assert len(set(rows)) == 1
    assert rows[0] % 64 == 0
    assert 0 <= sum(rows) - shape.vocab_size < 64 * num_ranks


@pytest.mark.parametrize(
    ("heads", "kv_heads", "inner", "num_ranks", "message"),
    [
        (9, 3, 96, 2, "9 attention heads do not divide over 2 ranks"),
        (12, 3, 96, 2, "3 key-value heads do not divide over 2 ranks"),
        (8, 2, 90, 4, "90 intermediate features do not divide over 4 ranks"),
    ],
)
def test_ranks_that_do_not_divide_are_refused(
    heads: int, kv_heads: int, inner: int, num_ranks: int, message: str
) -> None:
    shape = ModelShape(
        num_layers=1,
        hidden_size=64,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=8,
        intermediate_size=inner,
        vocab_size=100,
        is_tied=False,
    )
    with pytest.raises(TensorParallelUnsupported, match=message):
        layouts_of(shape, num_ranks=num_ranks)


def test_optional_biases_are_laid_out_only_when_present() -> None:
    shape = ModelShape.from_config(CONFIG)
    without = plan(LLAMA, shape, present=(), dtype="float32", tensor_parallel_sizes=(1,))
    present = {f"model.layers.{i}.self_attn.{p}_proj.bias" for i in range(2) for p in "qkv"}
    biased = plan(LLAMA, shape, present=present, dtype="float32", tensor_parallel_sizes=(1,))
    assert "layers.1.self_attn.qkv_proj.bias" not in without[0].slots
    assert biased[0].slots["layers.1.self_attn.qkv_proj.bias"].shape == (128,)


CONFIG = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 300,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "hidden_size is None"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers is '2'"),
        ({"vocab_size": -1}, "vocab_size is -1"),
        ({"intermediate_size": True}, "intermediate_size is True"),
        ({"num_key_value_heads": 3}, "4 attention heads cannot share 3"),
    ],
)
def test_impossible_configs_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(SourceInvalid, match=message):
        ModelShape.from_config(CONFIG | change)


def execution_order(shape: ModelShape) -> Iterator[str]:
    yield "embed_tokens.weight"
    for layer in range(shape.num_layers):
        for name in (
            "input_layernorm.weight",
            "self_attn.qkv_proj.weight",
            "self_attn.qkv_proj.bias",
            "self_attn.o_proj.weight",
            "post_attention_layernorm.weight",
            "mlp.gate_up_proj.weight",
            "mlp.down_proj.weight",
        ):
            yield f"layers.{layer}.{name}"
    yield "norm.weight"
    if not shape.is_tied:
        yield "lm_head.weight"
