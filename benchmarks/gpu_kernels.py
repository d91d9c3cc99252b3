"""Time of each kernel of a decode and a prefill step of the 8B shape, beside what bounds it.

python -m benchmarks.gpu_kernels
"""

from collections.abc import Callable

import torch
from torch import Tensor
from triton.testing import do_bench_cudagraph

from runtime.kernels.activation import silu_mul
from runtime.kernels.chunk_attention import chunk_attention, tile_size
from runtime.kernels.decode_attention import SplitWorkspace, decode_attention
from runtime.kernels.norm import rms_norm
from runtime.kernels.rope import rope_and_cache
from runtime.kernels.sampling import SamplingTable, sample

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, INTERMEDIATE, VOCAB = 32, 8, 128, 4096, 14336, 128256
PAGE = 64  # as functions on a GPU have it
BANDWIDTH = 4.3e12
MATRIX_RATE = 788e12


def microseconds(run: Callable[[], object]) -> float:
    return 1000.0 * float(do_bench_cudagraph(run, rep=30))


def ints(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def main() -> None:
    torch.manual_seed(0)
    print(f"{'kernel':44} {'us':>8} {'floor us':>9}")
    for num_seqs, seq_len in ((1, 256), (1, 4096), (16, 640), (64, 640), (256, 640), (256, 2048)):
        time_decode(num_seqs, seq_len)
    for chunks, context in (([512], 512), ([2048], 2048), ([512], 4096), ([128] * 4, 512)):
        time_chunks(chunks, context)
    for num_tokens in (1, 256, 768):
        time_layers(num_tokens)
    for num_rows in (1, 256):
        time_sampling(num_rows)


def show(name: str, run: Callable[[], object], *, num_bytes: float = 0, flops: float = 0) -> None:
    floor = max(num_bytes / BANDWIDTH, flops / MATRIX_RATE) * 1e6
    print(f"{name:44} {microseconds(run):8.1f} {floor:9.1f}", flush=True)


def new_cache(num_seqs: int, seq_len: int) -> tuple[Tensor, Tensor]:
    blocks_each = -(-seq_len // PAGE)
    num_blocks = num_seqs * blocks_each
    shape = (num_blocks, 2, KV_HEADS, PAGE, HEAD_DIM)
    cache = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    tables = torch.randperm(num_blocks, device="cuda").view(num_seqs, blocks_each).int()
    return cache, tables


def time_decode(num_seqs: int, seq_len: int) -> None:
    cache, tables = new_cache(num_seqs, seq_len)
    qkv = torch.randn(num_seqs, (HEADS + 2 * KV_HEADS) * HEAD_DIM, device="cuda").bfloat16()
    out = torch.empty(num_seqs, HEADS * HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    workspace = SplitWorkspace(
        num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, device="cuda"
    )
    rows, lens = ints(range(num_seqs)), ints([seq_len] * num_seqs)
    num_decodes = ints([num_seqs])
    show(
        f"decode attention, {num_seqs} x {seq_len}",
        lambda: decode_attention(
            qkv,
            cache,
            out,
            block_tables=tables,
            rows=rows,
            seq_lens=lens,
            num_decodes=num_decodes,
            workspace=workspace,
        ),
        num_bytes=num_seqs * seq_len * 2 * KV_HEADS * HEAD_DIM * 2,
    )


def time_chunks(chunks: list[int], context: int) -> None:
    cache, tables = new_cache(len(chunks), context)
    num_tokens = sum(chunks)
    qkv = torch.randn(num_tokens, (HEADS + 2 * KV_HEADS) * HEAD_DIM, device="cuda").bfloat16()
    out = torch.empty(num_tokens, HEADS * HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    size = tile_size(torch.bfloat16)
    tiles = ints([(s, first) for s, n in enumerate(chunks) for first in range(0, n, size)])
    starts = ints([sum(chunks[:index]) for index in range(len(chunks) + 1)])
    pairs = sum(n * (context - n) + n * n / 2 for n in chunks)
    rows, lens = ints(range(len(chunks))), ints([context] * len(chunks))
    show(
        f"chunk attention, {chunks} of {context}",
        lambda: chunk_attention(
            qkv,
            cache,
            out,
            tiles=tiles,
            block_tables=tables,
            rows=rows,
            query_starts=starts,
            seq_lens=lens,
        ),
        flops=4 * pairs * HEADS * HEAD_DIM,
    )


def time_layers(num_tokens: int) -> None:
    def new(width: int) -> Tensor:
        return torch.randn(num_tokens, width, device="cuda").bfloat16()

    hidden, normed, weight = new(HIDDEN), new(HIDDEN), new(HIDDEN)[0]
    show(
        f"RMSNorm, {num_tokens} tokens",
        lambda: rms_norm(hidden, weight, 1e-5, normed),
        num_bytes=num_tokens * HIDDEN * 4,
    )
    gate_up, gated = new(2 * INTERMEDIATE), new(INTERMEDIATE)
    show(
        f"SiLU-mul, {num_tokens} tokens",
        lambda: silu_mul(gate_up, gated),
        num_bytes=num_tokens * INTERMEDIATE * 6,
    )
    cache, _ = new_cache(1, 1024)
    qkv = new((HEADS + 2 * KV_HEADS) * HEAD_DIM)
    positions = ints(range(num_tokens))
    angles = torch.randn(2048, 2, HEAD_DIM // 2, device="cuda")
    show(
        f"RoPE and KV write, {num_tokens} tokens",
        lambda: rope_and_cache(qkv, cache, positions, positions, angles),
        num_bytes=num_tokens * (2 * HEADS + 4 * KV_HEADS) * HEAD_DIM * 2,
    )


def time_sampling(num_rows: int) -> None:
    logits = torch.randn(num_rows, VOCAB + 64, device="cuda")
    table = SamplingTable.allocate(num_rows, VOCAB, "cuda")
    table.top_ps.fill_(1.0)
    index, lens = ints(range(num_rows)), ints([100] * num_rows)
    token_ids, last = torch.empty_like(index), torch.empty_like(index)

    def run() -> None:
        sample(logits, index, index, lens, table, token_ids=token_ids, last_tokens=last)

    floor = num_rows * VOCAB * 4
    show(f"greedy, {num_rows} rows", run, num_bytes=floor)
    table.temperatures.fill_(0.8)
    show(f"temperature, {num_rows} rows", run, num_bytes=floor)
    table.top_ps.fill_(0.9)
    table.top_ks.fill_(50)
    show(f"temperature, top-k and top-p, {num_rows} rows", run, num_bytes=floor)


if __name__ == "__main__":
    main()
