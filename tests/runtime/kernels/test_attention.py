from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from runtime.kernels import decode_attention as decode_attention_module
from runtime.kernels import hopper_attention
from runtime.kernels.attention_reference import attention_reference
from runtime.kernels.chunk_attention import NO_TILE, Tile, chunk_attention, tile_size
from runtime.kernels.decode_attention import SplitWorkspace, decode_attention, num_splits
from tests.runtime.kernels.device import (
    DEVICE,
    DTYPES,
    needs_hopper,
    poisoned,
    relative_error,
    tolerance,
)

SHAPES = [
    (4, 2, 8, 16),
    (6, 2, 24, 16),
    (4, 4, 64, 64),
    (8, 1, 128, 32),
    (4, 1, 128, 64),
]  # heads, kv heads, head_dim, block


class Cache(NamedTuple):
    kv_cache: Tensor
    block_tables: Tensor
    rows: Tensor
    seq_lens: Tensor


def new_cache(shape: tuple[int, int, int, int], dtype: torch.dtype, lens: list[int]) -> Cache:
    """Return sequences of these lengths in a cache whose every other number is NaN."""
    _, num_kv_heads, head_dim, block_size = shape
    blocks_each = max(1, -(-max(lens) // block_size))
    num_blocks = len(lens) * blocks_each
    tables = torch.randperm(num_blocks).view(len(lens), blocks_each)
    kv = torch.full((num_blocks, 2, num_kv_heads, block_size, head_dim), torch.nan)
    rows = torch.randperm(len(lens))
    for row, seq_len in zip(rows.tolist(), lens, strict=True):
        for position in range(seq_len):
            block = tables[row, position // block_size]
            kv[block, :, :, position % block_size] = torch.randn(2, num_kv_heads, head_dim)
    seq_lens = torch.tensor(lens)
    return Cache(
        kv.to(DEVICE, dtype), *(x.to(DEVICE, torch.int32) for x in (tables, rows, seq_lens))
    )


def queries_of(qkv: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    return qkv.view(len(qkv), -1, shape[2])[:, : shape[0]].double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("lens", "wanted_programs"),
    [([100], 528), ([1, 17, 0, 100, 64], 528), ([33, 5, 70], 1)],
    ids=["one, split", "several, split", "not split"],
)
def test_decode(
    dtype: torch.dtype,
    shape: tuple[int, int, int, int],
    lens: list[int],
    wanted_programs: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(decode_attention_module, "WANTED_PROGRAMS", wanted_programs)
    num_heads, num_kv_heads, head_dim, _ = shape
    cache = new_cache(shape, dtype, lens)
    qkv = torch.randn(len(lens), (num_heads + 2 * num_kv_heads) * head_dim).to(DEVICE, dtype)
    out = poisoned(len(lens), num_heads * head_dim, dtype=dtype)
    padded = torch.cat((out, torch.ones(2, out.shape[1], dtype=dtype, device=DEVICE)))
    decode_attention(
        torch.cat((qkv, qkv[:1], qkv[:1])),
        cache.kv_cache,
        padded,
        block_tables=cache.block_tables,
        rows=cache.rows,
        seq_lens=cache.seq_lens,
        num_decodes=torch.tensor([len(lens)], dtype=torch.int32, device=DEVICE),
        workspace=SplitWorkspace(
            num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, device=DEVICE
        ),
    )
    expected = attention_reference(
        queries_of(qkv, shape),
        cache.kv_cache.double(),
        block_tables=cache.block_tables,
        rows=cache.rows,
        query_starts=torch.arange(len(lens) + 1),
        seq_lens=cache.seq_lens,
    )
    assert relative_error(padded[:-2], expected) < tolerance(dtype)
    assert padded[-2:].eq(1.0).all(), "padding is left alone"


def test_few_sequences_are_split_and_many_are_not() -> None:
    assert num_splits(1, 8) == 32
    assert num_splits(256, 8) == 1
    assert all(num_splits(n, 8) * n * 8 <= max(528, n * 8) for n in range(1, 300))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_chunks_of_any_length_over_any_prefix(
    dtype: torch.dtype, shape: tuple[int, int, int, int]
) -> None:
    check_chunks([1, 17, 100, 70, 500], [1, 17, 30, 1, 150], shape, dtype)


@needs_hopper
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(8, 2, 128, 64), (8, 2, 64, 128), (2, 1, 128, 64)])
@pytest.mark.parametrize("num_programs", [1, 3, 132])
def test_programs_that_take_many_tiles(
    dtype: torch.dtype,
    shape: tuple[int, int, int, int],
    num_programs: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hopper_attention, "num_processors", lambda _device: num_programs)
    lens = [1, 64, 65, 128, 129, 700, 700, 513, 1111, 300]
    check_chunks(lens, [1, 64, 65, 128, 1, 700, 333, 512, 200, 129], shape, dtype)


def check_chunks(
    lens: list[int], chunks: list[int], shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    """Attend from the last tokens of sequences of these lengths and compare with the reference."""
    num_heads, num_kv_heads, head_dim, _ = shape
    cache = new_cache(shape, dtype, lens)
    starts = [sum(chunks[:index]) for index in range(len(chunks) + 1)]
    num_tokens = starts[-1]
    qkv = torch.randn(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim).to(DEVICE, dtype)
    out = poisoned(num_tokens, num_heads * head_dim, dtype=dtype)
    tiles = [
        Tile(row, start + first, seq_len - num_queries + first, num_queries - first)
        for row, seq_len, start, num_queries in zip(
            cache.rows.tolist(), lens, starts, chunks, strict=False
        )
        for first in range(0, num_queries, tile_size(dtype))
    ]
    tiles.insert(len(tiles) // 2, NO_TILE)
    chunk_attention(
        qkv,
        cache.kv_cache,
        out,
        tiles=torch.tensor(tiles, dtype=torch.int32, device=DEVICE),
        block_tables=cache.block_tables,
    )
    expected = attention_reference(
        queries_of(qkv, shape),
        cache.kv_cache.double(),
        block_tables=cache.block_tables,
        rows=cache.rows,
        query_starts=torch.tensor(starts),
        seq_lens=cache.seq_lens,
    )
    assert relative_error(out, expected) < tolerance(dtype)
