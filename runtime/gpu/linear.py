"""Matrix products with weights that do not change: cuBLAS, and for one token a kernel of our own."""

from collections.abc import Mapping

import torch
from torch import Tensor

from runtime.errors import LoadFailed
from runtime.kernels.matvec import ROWS_ALIGNMENT, matvec


class GpuLinear:
    """x @ weight.T + bias, into memory that is there already.

    Args:
        weights: Has the tensors `name`.weight and perhaps `name`.bias.
        name: Whose.
    """

    def __init__(self, weights: Mapping[str, Tensor], name: str) -> None:
        self._weight = named_tensor(weights, f"{name}.weight")
        self._transposed = self._weight.t()
        self._bias = weights.get(f"{name}.bias")
        self._is_streamable = self._bias is None and len(self._weight) % ROWS_ALIGNMENT == 0

    @property
    def num_outputs(self) -> int:
        """Rows of the weight."""
        return len(self._weight)

    def __call__(self, x: Tensor, out: Tensor) -> None:
        """Write the product of x [num_tokens, num_inputs] to out [num_tokens, num_outputs].

        `out` may be fp32 where x and the weight are not.
        """
        if len(x) == 1 and self._is_streamable:
            matvec(self._weight, x, out)
        elif self._bias is not None:
            torch.addmm(self._bias, x, self._transposed, out=out)
        elif out.dtype == x.dtype:
            torch.mm(x, self._transposed, out=out)
        elif x.is_cuda:
            torch.mm(x, self._transposed, out_dtype=out.dtype, out=out)
        else:
            out.copy_(x @ self._transposed)

    def add(self, x: Tensor, out: Tensor) -> None:
        """Add the product to `out`; there must be no bias."""
        assert self._bias is None, "a residual branch has no bias in this architecture"
        if len(x) == 1 and self._is_streamable:
            matvec(self._weight, x, out, add=True)
        else:
            out.addmm_(x, self._transposed)


def named_tensor(weights: Mapping[str, Tensor], name: str) -> Tensor:
    """Return a tensor of a snapshot; raise LoadFailed if it has none of that name."""
    if name not in weights:
        raise LoadFailed(f"the snapshot has no tensor {name!r}: build it again")
    return weights[name]
