"""Rotary embedding of queries and keys, and the write of keys and values to the cache."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from runtime.kernels.launch import next_power_of_2


def rope_and_cache(
    qkv: Tensor, kv_cache: Tensor, positions: Tensor, slots: Tensor, angles: Tensor
) -> None:
    """Rotate queries in place; write rotated keys, and values, to their slots.

    Args:
        qkv: [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]; its queries are rotated.
        kv_cache: [num_blocks, 2, num_kv_heads, block_size, head_dim]; written.
        positions: int32 [num_tokens].
        slots: int32 [num_tokens], block * block_size + offset; negative for a token without one.
        angles: fp32 [max_positions, 2, head_dim / 2], cosines before sines.
    """
    _, _, num_kv_heads, block_size, head_dim = kv_cache.shape
    num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
    group = num_heads // num_kv_heads
    _rope_kernel[(len(qkv), num_kv_heads)](
        qkv,
        kv_cache,
        positions,
        slots,
        angles,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        PAGE=block_size,
        BLOCK_GROUP=next_power_of_2(group),
        BLOCK_HALF=next_power_of_2(head_dim // 2),
        num_warps=1,
    )


def rope_and_cache_reference(
    qkv: Tensor, kv_cache: Tensor, positions: Tensor, slots: Tensor, angles: Tensor
) -> None:
    """Do what `rope_and_cache` does, in plain torch."""
    _, _, num_kv_heads, block_size, head_dim = kv_cache.shape
    heads = qkv.view(len(qkv), -1, head_dim)
    rotated = heads[:, :-num_kv_heads]
    first, second = rotated.chunk(2, dim=-1)
    cos, sin = angles[positions.long()].to(first.dtype).unbind(1)
    cos, sin = cos[:, None], sin[:, None]
    rotated.copy_(torch.cat((first * cos - second * sin, second * cos + first * sin), -1))
    kept = slots >= 0
    blocks, offsets = (slots[kept] // block_size).long(), (slots[kept] % block_size).long()
    keys, values = heads[kept, -2 * num_kv_heads : -num_kv_heads], heads[kept, -num_kv_heads:]
    kv_cache[blocks, 0, :, offsets] = keys
    kv_cache[blocks, 1, :, offsets] = values


@triton.jit
def _rope_kernel(
    qkv_ptr,
    kv_cache_ptr,
    positions_ptr,
    slots_ptr,
    angles_ptr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    HALF: tl.constexpr = HEAD_DIM // 2
    position = tl.load(positions_ptr + token).to(tl.int64)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    dims = tl.arange(0, BLOCK_HALF)
    is_dim = dims < HALF
    cos = tl.load(angles_ptr + position * HEAD_DIM + dims, mask=is_dim, other=0.0)
    sin = tl.load(angles_ptr + position * HEAD_DIM + HALF + dims, mask=is_dim, other=0.0)
    token_ptr = qkv_ptr + token * (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM

    members = tl.arange(0, BLOCK_GROUP)
    q_ptr = token_ptr + (kv_head * GROUP + members)[:, None] * HEAD_DIM + dims[None, :]
    is_q = (members < GROUP)[:, None] & is_dim[None, :]
    first = tl.load(q_ptr, mask=is_q, other=0.0).to(tl.float32)
    second = tl.load(q_ptr + HALF, mask=is_q, other=0.0).to(tl.float32)
    element = qkv_ptr.dtype.element_ty
    tl.store(q_ptr, (first * cos[None, :] - second * sin[None, :]).to(element), mask=is_q)
    tl.store(q_ptr + HALF, (second * cos[None, :] + first * sin[None, :]).to(element), mask=is_q)

    if slot >= 0:
        k_ptr = token_ptr + (NUM_HEADS + kv_head) * HEAD_DIM + dims
        first_k = tl.load(k_ptr, mask=is_dim, other=0.0).to(tl.float32)
        second_k = tl.load(k_ptr + HALF, mask=is_dim, other=0.0).to(tl.float32)
        page_head = (slot // PAGE * 2 * NUM_KV_HEADS + kv_head) * PAGE + slot % PAGE
        k_slot_ptr = kv_cache_ptr + page_head * HEAD_DIM + dims
        tl.store(k_slot_ptr, (first_k * cos - second_k * sin).to(element), mask=is_dim)
        tl.store(k_slot_ptr + HALF, (second_k * cos + first_k * sin).to(element), mask=is_dim)
        v_ptr = k_ptr + NUM_KV_HEADS * HEAD_DIM
        v_slot_ptr = k_slot_ptr + NUM_KV_HEADS * PAGE * HEAD_DIM
        tl.store(v_slot_ptr, tl.load(v_ptr, mask=is_dim), mask=is_dim)
        tl.store(v_slot_ptr + HALF, tl.load(v_ptr + HALF, mask=is_dim), mask=is_dim)
