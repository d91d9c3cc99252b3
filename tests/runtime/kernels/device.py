"""Where the kernel tests run: on a GPU, else in Triton's interpreter on the CPU."""

import pytest
import torch
from torch import Tensor

from runtime.kernels.launch import is_hopper

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter has no bf16 products.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()
needs_hopper = pytest.mark.skipif(
    DEVICE != "cuda" or not is_hopper(torch.device(DEVICE)), reason="a Hopper GPU runs it"
)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return the Frobenius norm of the difference, relative; NaN where something is not written."""
    difference = found.double() - expected.double()
    return float(difference.norm() / expected.double().norm())


def tolerance(dtype: torch.dtype) -> float:
    return {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    """Return memory whose every element must be written."""
    return torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)
