import pytest
import torch

from runtime.kernels.activation import silu_mul, silu_mul_reference
from runtime.kernels.matvec import matvec, matvec_reference
from runtime.kernels.norm import rms_norm, rms_norm_reference
from runtime.kernels.rope import rope_and_cache, rope_and_cache_reference
from tests.runtime.kernels.device import DEVICE, DTYPES, poisoned, relative_error, tolerance


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [64, 96, 576])
def test_rms_norm(dtype: torch.dtype, size: int) -> None:
    x = torch.randn(5, size, device=DEVICE).to(dtype)
    weight = torch.randn(size, device=DEVICE).to(dtype)
    out = poisoned(5, size, dtype=dtype)
    rms_norm(x, weight, 1e-5, out)
    expected = rms_norm_reference(x.double(), weight.double(), 1e-5)
    assert relative_error(out, expected) < tolerance(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul(dtype: torch.dtype) -> None:
    gate_up = torch.randn(3, 2 * 1200, device=DEVICE).to(dtype)
    out = poisoned(3, 1200, dtype=dtype)
    silu_mul(gate_up, out)
    assert relative_error(out, silu_mul_reference(gate_up.double())) < tolerance(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(6, 2, 24), (4, 4, 64)])
def test_rope_rotates_and_writes_the_cache(
    dtype: torch.dtype, num_heads: int, num_kv_heads: int, head_dim: int
) -> None:
    num_tokens, num_blocks, block_size = 11, 7, 16
    num_all_heads = num_heads + 2 * num_kv_heads
    qkv = torch.randn(num_tokens, num_all_heads * head_dim, device=DEVICE).to(dtype)
    cache_shape = (num_blocks, 2, num_kv_heads, block_size, head_dim)
    kv_cache = torch.randn(cache_shape, device=DEVICE).to(dtype)
    radians = torch.rand(100, head_dim // 2, device=DEVICE) * 6.28
    angles = torch.stack((radians.cos(), radians.sin()), 1)
    positions = torch.randint(0, 100, (num_tokens,), dtype=torch.int32, device=DEVICE)
    slots = torch.randperm(num_blocks * block_size, device=DEVICE)[:num_tokens].int()
    slots[3] = -1
    expected_qkv, expected_cache = qkv.double(), kv_cache.double()
    rope_and_cache_reference(expected_qkv, expected_cache, positions, slots, angles)
    keys_before = qkv[:, num_heads * head_dim :].clone()

    rope_and_cache(qkv, kv_cache, positions, slots, angles)

    queries, expected = (x[:, : num_heads * head_dim] for x in (qkv, expected_qkv))
    assert relative_error(queries, expected) < tolerance(dtype)
    assert relative_error(kv_cache, expected_cache) < tolerance(dtype)
    assert torch.equal(qkv[:, num_heads * head_dim :], keys_before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize(("num_rows", "size"), [(24, 2048), (8, 1300), (4, 8200)])
def test_matvec(dtype: torch.dtype, add: bool, num_rows: int, size: int) -> None:
    weight = torch.randn(num_rows, size, device=DEVICE).to(dtype)
    x = torch.randn(1, size, device=DEVICE).to(dtype)
    out = torch.randn(1, num_rows, device=DEVICE).to(dtype)
    expected = out.double()
    matvec_reference(weight.double(), x.double(), expected, add=add)
    matvec(weight, x, out, add=add)
    assert relative_error(out, expected) < tolerance(dtype)
