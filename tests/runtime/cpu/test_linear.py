from concurrent.futures import Executor, ThreadPoolExecutor

import pytest
import torch

from runtime.cpu import linear
from runtime.cpu.linear import PackedLinear, PlainLinear, pack_all

needs_fbgemm = pytest.mark.skipif(
    "fbgemm" not in torch.backends.quantized.supported_engines, reason="not an x86 processor"
)


@pytest.fixture
def executor() -> Executor:
    return ThreadPoolExecutor(2)


@needs_fbgemm
@pytest.mark.parametrize("is_biased", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 5, 40])
def test_packing_does_not_change_the_product(
    executor: Executor, num_tokens: int, is_biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "PACK_ELEMENTS", 1000)
    monkeypatch.setattr(linear, "UPCAST_ELEMENTS", 700)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(90, 33, generator=generator).bfloat16()
    bias = torch.randn(90, generator=generator).bfloat16() if is_biased else None
    x = torch.randn(num_tokens, 33, generator=generator)
    expected = PlainLinear(weight.double(), None if bias is None else bias.double())(x.double())
    packed = PackedLinear(weight, bias)
    torch.testing.assert_close(packed(x), expected.float(), atol=1e-4, rtol=1e-5)
    assert pack_all([packed], executor) == [weight]
    assert packed.weight is None
    assert packed.packed_bytes == weight.nbytes
    torch.testing.assert_close(packed(x), expected.float(), atol=1e-4, rtol=1e-5)


@needs_fbgemm
def test_weight_too_large_for_fp16_stays_unpacked_and_right(executor: Executor) -> None:
    weight = torch.ones(4, 8).bfloat16()
    weight[1, 2] = 1e6
    packed = PackedLinear(weight)
    assert pack_all([packed], executor) == []
    assert packed(torch.ones(1, 8)).tolist() == [[8.0, 7.0 + weight[1, 2].item(), 8.0, 8.0]]


def test_full_precision_weights_are_never_packed() -> None:
    assert not linear.is_packing_faster(torch.float32)
