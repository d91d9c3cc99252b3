"""Kernels that only a Hopper GPU runs; the attention's results are tested with the other one's."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from runtime.kernels import hopper_attention
from runtime.kernels.cache import KernelCache
from runtime.kernels.hopper_gated_product import (
    WIDTHS,
    _gated_product_kernel,
    gated_product,
    gated_product_reference,
    is_usable,
    run_every_width,
    spans,
)
from runtime.kernels.launch import head_block
from tests.runtime.kernels.device import DEVICE, needs_hopper, relative_error, tolerance

H200_PROCESSORS = 132


def test_they_compile_for_a_gpu_that_is_not_there() -> None:
    command = [sys.executable, "-m", "tests.runtime.kernels.compile_for_hopper"]
    environment = {name: value for name, value in os.environ.items() if "TRITON" not in name}
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    lines = [line.split() for line in output.stdout.splitlines()]
    assert [line[:3] for line in lines] == [
        [kernel, dtype, size]
        for dtype in ("bf16", "fp16")
        for kernel, sizes in (("attention", ["64", "128"]), ("product", ["128", "64", "32"]))
        for size in sizes
    ]
    assert all(int(size) > 0 for *_, size in lines)


def test_no_block_of_a_head_is_too_small_for_a_matrix_product() -> None:
    assert [head_block(size) for size in (4, 16, 24, 128)] == [16, 16, 32, 128]


def test_what_is_in_host_memory_is_not_for_them() -> None:
    cache = torch.zeros(1, 2, 1, 64, 64, dtype=torch.float16)
    assert not hopper_attention.is_usable(cache, 2)
    assert not is_usable(torch.zeros(256, 64, dtype=torch.float16))


@pytest.mark.parametrize("num_rows", [1, 2, 4, 5, 6, 7, 8, 17, 32, 133])
@pytest.mark.parametrize("size", [128, 1536, 8960, 14336])
def test_spans_are_all_columns_once_and_whole_waves_are_wide(num_rows: int, size: int) -> None:
    found = spans(num_rows, size, H200_PROCESSORS)
    assert [span.start for span in found[1:]] == [
        span.start + span.width * span.num_tiles for span in found[:-1]
    ]
    assert found[0].start == 0
    assert sum(span.width * span.num_tiles for span in found) == size
    assert found[0].width == max(WIDTHS)
    for narrow in found[1:]:
        assert narrow.width < max(WIDTHS)
        assert num_rows * narrow.num_tiles <= H200_PROCESSORS


def test_a_last_wave_of_few_tiles_is_of_narrow_ones() -> None:
    assert [span.width for span in spans(6, 14336, H200_PROCESSORS)] == [128, 32]
    assert [span.width for span in spans(4, 14336, H200_PROCESSORS)] == [128, 64]


@needs_hopper
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("num_inputs", "size"), [(4096, 14336), (576, 1536)])
@pytest.mark.parametrize("num_tokens", [1, 512, 700, 4096])
def test_gated_product(dtype: torch.dtype, num_inputs: int, size: int, num_tokens: int) -> None:
    x = torch.randn(num_tokens, num_inputs, device=DEVICE).to(dtype)
    weight = (torch.randn(2 * size, num_inputs, device=DEVICE) * num_inputs**-0.5).to(dtype)
    out = torch.full((num_tokens + 8, size), torch.nan, dtype=dtype, device=DEVICE)
    gated_product(x, weight, out[:num_tokens])
    expected = gated_product_reference(x.double(), weight.double())
    assert relative_error(out[:num_tokens], expected) < tolerance(dtype)
    assert out[num_tokens:].isnan().all()


@needs_hopper
def test_no_number_of_tokens_needs_another_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    _gated_product_kernel.device_caches.clear()
    kernels = KernelCache()
    x = torch.randn(1500, 256, device=DEVICE).half()
    weight = torch.randn(2 * 14336, 256, device=DEVICE).half()
    out = torch.empty(1500, 14336, device=DEVICE, dtype=torch.half)
    run_every_width(x, weight, out)
    assert kernels.num_compilations == len(WIDTHS)
    for num_tokens in range(1, 1500, 100):
        gated_product(x[:num_tokens], weight, out[:num_tokens])
    assert kernels.num_compilations == len(WIDTHS)
