"""Matrix products with weights that do not change, on the CPU.

Torch's own bf16 and fp16 products are slow on processors without such instructions: one dot
product at a time, about 16 GFLOP/s on two AVX2 cores. FBGEMM, which is inside torch, keeps
weights in fp16, packed for the cache, and computes in fp32 at up to 180 GFLOP/s, with the same
two bytes a weight. A bf16 weight has 8 significant bits and fp16 has 11, so packing is exact
but for weights below 2**-14, whose error is at most 2**-25; weights above 65504 stay unpacked.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_PACKED = torch.finfo(torch.float16).max
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
        return F.linear(x, self._weight, self._bias)


class PackedLinear:
    """FBGEMM's product: fp32 activations, fp16 weights.

    Packing takes about as long as reading the weights, so a woken engine answers first and packs
    between its next steps. Until then the weight is converted piece by piece on every use, which
    gives the same result up to the order of summation.

    Args:
        weight: [out_features, in_features], two bytes an element; used until `pack`.
        bias: [out_features].
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._weight: Tensor | None = weight
        self._bias = None if bias is None else bias.float()
        self._packed: torch.ScriptObject | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self._packed is not None:
            return torch.ops.quantized.linear_dynamic_fp16(x, self._packed)
        return self._upcast_product(x)

    def pack(self) -> Tensor | None:
        """Make the packed copy; return the weight, which is not used any more.

        None is returned if the weight has to stay, since fp16 cannot hold it.
        """
        weight = self._weight
        assert weight is not None, "a weight is packed once"
        if weight.abs().max().item() > MAX_PACKED:
            return None
        self._packed = torch.ops.quantized.linear_prepack_fp16(weight.float(), self._bias)
        self._weight = None
        return weight

    def _upcast_product(self, x: Tensor) -> Tensor:
        assert self._weight is not None, "a weight is there until it is packed"
        num_rows = max(1, UPCAST_ELEMENTS // self._weight.shape[1])
        pieces = [F.linear(x, rows.float()) for rows in self._weight.split(num_rows)]
        product = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)
        return product if self._bias is None else product.add_(self._bias)


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
