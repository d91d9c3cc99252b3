"""Time of each kernel of a decode and a prefill step of the 8B shape, beside what bounds it.

    python -m benchmarks.gpu_kernels

Attention of whole prompts comes with that of cuDNN, torch's fastest on this GPU, which needs them
of one length and outside of a paged cache.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from triton.testing import do_bench_cudagraph

from runtime.kernels.activation import silu_mul
from runtime.kernels.chunk_attention import Tile, chunk_attention, tile_size
from runtime.kernels.decode_attention import SplitWorkspace, decode_attention
from runtime.kernels.norm import rms_norm
from runtime.kernels.rope import rope_and_cache
from runtime.kernels.sampling import SamplingTable, sample

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, INTERMEDIATE, VOCAB = 32, 8, 128, 4096, 14336, 128256
PAGE = 64  # as functions on a GPU have it
CHUNKS = (
    (1, 4096, 4096),
    (1, 1024, 1024),
    (1, 512, 512),
    (1, 512, 4096),
    (1, 2048, 8192),
    (2, 256, 256),
    (4, 128, 512),
    (8, 512, 512),
    (16, 512, 512),
)
"""Sequences, the queries of each, and its tokens up to the last of them."""
BANDWIDTH = 4.3e12
MATRIX_RATE = 788e12


def microseconds(run: Callable[[], object]) -> float:
    return 1000.0 * float(do_bench_cudagraph(run, rep=30))


def ints(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def main() -> None:
    torch.manual_seed(0)
    print(f"{'kernel':44} {'us':>8} {'floor us':>9} {'TFLOP/s':>8}")
    for num_seqs, seq_len in ((1, 256), (1, 4096), (16, 640), (64, 640), (256, 640), (256, 2048)):
        time_decode(num_seqs, seq_len)
    for chunks in CHUNKS:
        time_chunks(*chunks)
    for num_tokens in (1, 256, 768):
        time_layers(num_tokens)
    for num_rows in (1, 256):
        time_sampling(num_rows)


def show(name: str, run: Callable[[], object], *, num_bytes: float = 0, flops: float = 0) -> None:
    floor = max(num_bytes / BANDWIDTH, flops / MATRIX_RATE) * 1e6
    taken = microseconds(run)
    rate = f"{flops / taken / 1e6:8.0f}" if flops else ""
    print(f"{name:44} {taken:8.1f} {floor:9.1f} {rate}", flush=True)


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


def time_chunks(num_seqs: int, num_queries: int, num_tokens: int) -> None:
    cache, tables = new_cache(num_seqs, num_tokens)
    width = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    qkv = torch.randn(num_seqs * num_queries, width, device="cuda").bfloat16()
    out = torch.empty(len(qkv), HEADS * HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    firsts = range(0, num_queries, tile_size(torch.bfloat16))
    tiles = [
        Tile(seq, seq * num_queries + first, num_tokens - num_queries + first, num_queries - first)
        for first in reversed(firsts)  # those that see most tokens first, as an engine has them
        for seq in range(num_seqs)
    ]
    tiles_on_gpu = ints(tiles)
    pairs = num_seqs * num_queries * (num_tokens - num_queries / 2)
    flops = 4 * pairs * HEADS * HEAD_DIM
    shape = f"{num_seqs} x {num_queries} of {num_tokens}"
    show(
        f"chunk attention, {shape}",
        lambda: chunk_attention(qkv, cache, out, tiles=tiles_on_gpu, block_tables=tables),
        flops=flops,
    )
    if num_queries == num_tokens:
        heads = qkv.view(num_seqs, num_queries, -1, HEAD_DIM).transpose(1, 2)
        q, k, v = torch.split(heads, [HEADS, KV_HEADS, KV_HEADS], dim=1)
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            show(
                f"the same by cuDNN, {shape}",
                lambda: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
                flops=flops,
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
