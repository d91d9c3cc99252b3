"""Matrix products with weights that do not change: cuBLAS, and kernels of our own where they win."""

from collections.abc import Mapping

import torch
from torch import Tensor

from runtime.errors import LoadFailed
from runtime.kernels import hopper_gated_product as hopper
from runtime.kernels.activation import silu_mul
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


class GpuGatedLinear:
    """silu(x @ gate.T) * (x @ up.T), for an MLP.

    Args:
        weights: Has the tensor `name`.weight [2 * size, num_inputs], gate before up, and perhaps
            `name`.bias.
        name: Whose.
    """

    def __init__(self, weights: Mapping[str, Tensor], name: str) -> None:
        self._both = GpuLinear(weights, name)
        self._weight = named_tensor(weights, f"{name}.weight")
        self._is_fusable = f"{name}.bias" not in weights and hopper.is_usable(self._weight)

    def __call__(self, x: Tensor, gate_up: Tensor, out: Tensor) -> None:
        """Write the result of x [num_tokens, num_inputs] to out [num_tokens, size].

        `gate_up` [num_tokens, 2 * size] is room for the products.
        """
        if self._is_fusable and hopper.is_faster(len(x)):
            hopper.gated_product(x, self._weight, out)
        else:
            self._both(x, gate_up)
            silu_mul(gate_up, out)

    def run_product(self, x: Tensor, gate_up: Tensor) -> None:
        """Run only the product, and only if that is cuBLAS's."""
        if not (self._is_fusable and hopper.is_faster(len(x))):
            self._both(x, gate_up)

    def compile(self, x: Tensor, out: Tensor) -> None:
        """Compile kernels that only some numbers of tokens need; what is in `out` is lost."""
        if self._is_fusable:
            hopper.run_every_width(x, self._weight, out)


def named_tensor(weights: Mapping[str, Tensor], name: str) -> Tensor:
    """Return a tensor of a snapshot; raise LoadFailed if it has none of that name."""
    if name not in weights:
        raise LoadFailed(f"the snapshot has no tensor {name!r}: build it again")
    return weights[name]
