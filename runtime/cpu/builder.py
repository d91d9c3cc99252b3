"""Parts of a model out of named tensors, with a note of which of them can be packed."""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.cpu.linear import Linear, PackedLinear, PlainLinear
from runtime.errors import LoadFailed


class PartBuilder:
    """Makes the parts of one model.

    Args:
        weights: Fused tensors under the snapshot's names; kept, not copied.
        is_packed: Compute in fp32 with packed weights instead of in the weights' dtype.
    """

    def __init__(self, weights: Mapping[str, Tensor], *, is_packed: bool) -> None:
        self._weights = weights
        self._is_packed = is_packed
        self._packables: list[PackedLinear] = []

    def take_packables(self) -> list[PackedLinear]:
        """Return the linears made since the last call that can be packed."""
        taken, self._packables = self._packables, []
        return taken

    def tensor(self, name: str) -> Tensor:
        """Return a tensor; raise LoadFailed if there is none."""
        if name not in self._weights:
            raise LoadFailed(f"the snapshot has no tensor {name!r}: build it again")
        return self._weights[name]

    def dtype_of(self, weight: Tensor) -> torch.dtype:
        """Return the dtype of what is computed with a weight."""
        return torch.float32 if self._is_packed else weight.dtype

    def rms_norm(self, name: str, eps: float) -> Callable[[Tensor], Tensor]:
        """Return RMSNorm with the weight `<name>.weight`."""
        weight = self._computed(f"{name}.weight")
        shape = weight.shape
        return lambda x: F.rms_norm(x, shape, weight, eps)

    def layer_norm(self, name: str, eps: float) -> Callable[[Tensor], Tensor]:
        """Return LayerNorm with the weight `<name>.weight` and the bias `<name>.bias`."""
        weight, bias = self._computed(f"{name}.weight"), self._computed(f"{name}.bias")
        shape = weight.shape
        return lambda x: F.layer_norm(x, shape, weight, bias, eps)

    def linear(self, name: str) -> Linear:
        """Return the product with `<name>.weight`, plus `<name>.bias` if there is one."""
        weight, bias = self.tensor(f"{name}.weight"), self._weights.get(f"{name}.bias")
        if not self._is_packed:
            return PlainLinear(weight, bias)
        linear = PackedLinear(weight, bias)
        self._packables.append(linear)
        return linear

    def _computed(self, name: str) -> Tensor:
        tensor = self.tensor(name)
        return tensor.float() if self._is_packed else tensor
