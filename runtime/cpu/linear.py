"""Matrix products with weights that do not change, on the CPU.

Torch's own bf16 and fp16 products are slow on processors without such instructions: one dot
product at a time, about 16 GFLOP/s on two AVX2 cores. FBGEMM, which is inside torch, keeps
weights in fp16, packed for the cache, and computes in fp32 at up to 180 GFLOP/s, with the same
two bytes a weight. A bf16 weight has 8 significant bits and fp16 has 11, so packing is exact
but for weights below 2**-14, whose error is at most 2**-25; weights above 65504 stay unpacked.
"""

from collections.abc import Iterable
from concurrent.futures import Executor
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_PACKED = torch.finfo(torch.float16).max
PACK_ELEMENTS = 1 << 23  # weights above this are packed in pieces: less scratch, more threads
UPCAST_ELEMENTS = 1 << 21  # fp32 pieces of 8 MiB stay in the cache between copy and product


class Linear(Protocol):
    """x [num_tokens, in_features] -> x @ weight.T + bias [num_tokens, out_features]."""

    def __call__(self, x: Tensor, /) -> Tensor:
        """Return the product."""


class PlainLinear:
    """Torch's own product.

    Args:
        weight: [out_features, in_features], not copied.
        bias: [out_features].
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._weight = weight
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        """See `Linear`."""
        return F.linear(x, self._weight, self._bias)


class PackedLinear:
    """FBGEMM's product: fp32 activations, fp16 weights.

    Until it is packed the weight is converted piece by piece on every use, which gives the same
    result up to the order of summation.

    Args:
        weight: [out_features, in_features], two bytes an element; used until `pack_all`.
        bias: [out_features].

    Attributes:
        weight: None once it is packed.
        packed_bytes: Memory of the packed copy.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight: Tensor | None = weight
        self.packed_bytes = 0
        self._bias = None if bias is None else bias.float()
        self._pieces: list[torch.ScriptObject] = []

    def __call__(self, x: Tensor) -> Tensor:
        """See `Linear`; fp32 in and out."""
        if self.weight is not None:
            return self._upcast_product(x, self.weight)
        products = [torch.ops.quantized.linear_dynamic_fp16(x, piece) for piece in self._pieces]
        return self._joined(products)

    def use_packed(self, pieces: list[torch.ScriptObject]) -> Tensor:
        """Switch to the packed copy; return the weight, which is not used any more."""
        weight = self.weight
        assert weight is not None, "a weight is packed once"
        self.weight = None
        self._pieces = pieces
        self.packed_bytes = weight.nbytes
        return weight

    def _upcast_product(self, x: Tensor, weight: Tensor) -> Tensor:
        pieces = _rows(weight, UPCAST_ELEMENTS)
        return self._joined([F.linear(x, piece.float()) for piece in pieces])

    def _joined(self, products: list[Tensor]) -> Tensor:
        product = products[0] if len(products) == 1 else torch.cat(products, dim=-1)
        return product if self._bias is None else product.add_(self._bias)


def pack_all(linears: Iterable[PackedLinear], executor: Executor) -> list[Tensor]:
    """Pack weights in parallel; return those that are not used any more.

    A weight that fp16 cannot hold stays as it is.
    """
    packable = [
        (linear, linear.weight)
        for linear in linears
        if linear.weight is not None and linear.weight.abs().max().item() <= MAX_PACKED
    ]
    packing = [
        (linear, [executor.submit(_pack, piece) for piece in _rows(weight, PACK_ELEMENTS)])
        for linear, weight in packable
    ]
    return [linear.use_packed([piece.result() for piece in pieces]) for linear, pieces in packing]


def is_packing_faster(dtype: torch.dtype) -> bool:
    """Return whether this processor is better off with packed copies of such weights."""
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        return False
    match dtype:
        case torch.bfloat16:
            return not torch.ops.mkldnn._is_mkldnn_bf16_supported()
        case torch.float16:
            return not torch.ops.mkldnn._is_mkldnn_fp16_supported()
        case _:
            return False


def _pack(weight: Tensor) -> torch.ScriptObject:
    return torch.ops.quantized.linear_prepack_fp16(weight.float(), None)


def _rows(weight: Tensor, num_elements: int) -> tuple[Tensor, ...]:
    return torch.split(weight, max(1, num_elements // weight.shape[1]))
