import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from runtime.kernels.sampling import (
    FAULT,
    PROMPT_BIT,
    SamplingTable,
    _lowest_kept,
    adjust_logits,
    adjust_logits_reference,
    mask_logits,
    mask_logits_reference,
    sample,
)
from tests.runtime.kernels.device import DEVICE

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
VOCAB_SIZE = 300
NUM_ROWS = 4
NUM_DRAWS = 3000 if DEVICE == "cuda" else 150  # the interpreter takes milliseconds for each


def new_table(**columns: float) -> SamplingTable:
    table = SamplingTable.allocate(NUM_ROWS, VOCAB_SIZE, DEVICE)
    table.top_ps.fill_(1.0)
    for name, value in columns.items():
        getattr(table, name).fill_(value)
    return table


def draw(logits: Tensor, table: SamplingTable, *, position: int = 7, row: int = 2) -> list[int]:
    """Sample every row of logits as the sequence in that row of the table, one position each."""
    num_samples = len(logits)
    token_ids = torch.full((num_samples,), -7, dtype=torch.int32, device=DEVICE)
    sample(
        logits.to(DEVICE),
        torch.arange(num_samples, dtype=torch.int32, device=DEVICE),
        torch.full((num_samples,), row, dtype=torch.int32, device=DEVICE),
        torch.arange(position, position + num_samples, dtype=torch.int32, device=DEVICE),
        table,
        token_ids=token_ids,
        last_tokens=torch.zeros(NUM_ROWS, dtype=torch.int32, device=DEVICE),
    )
    return token_ids.tolist()


def padded_logits(num_rows: int, seed: int = 0) -> Tensor:
    """Return logits of a vocabulary that is padded with larger ones."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_rows, VOCAB_SIZE + 20, generator=generator) * 3
    logits[:, VOCAB_SIZE:] = 100.0
    return logits


def kept_tokens(
    logits: Tensor, temperature: float, *, top_k: int, top_p: float, min_p: float
) -> set[int]:
    """Return which tokens may be drawn, by sorting."""
    logits = logits[:VOCAB_SIZE].double()
    scaled = (logits - logits.max()) / temperature
    order = logits.argsort(descending=True)
    order = order[logits[order].isfinite()]
    if min_p:
        order = order[scaled[order] >= math.log(min_p)]
    if top_k:
        order = order[logits[order] >= logits[order[:top_k][-1]]]
    if top_p < 1.0:
        weights = scaled[order].exp()
        is_kept = weights.cumsum(0) - weights < top_p * weights.sum()
        order = order[logits[order] >= logits[order[is_kept][-1]]]
    return set(order.tolist())


@triton.jit  # type: ignore[untyped-decorator]  # Triton has no types
def _lowest_kept_kernel(  # type: ignore[no-untyped-def]  # Triton's own types
    logits_ptr, extremes_ptr, filters_ptr, top_k_ptr, out_ptr, VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    lowest = _lowest_kept(
        logits_ptr,
        tl.load(extremes_ptr),
        tl.load(extremes_ptr + 1),
        tl.load(filters_ptr),
        tl.load(filters_ptr + 1),
        tl.load(top_k_ptr),
        tl.load(filters_ptr + 2),
        VOCAB,
        BLOCK,
    )
    tl.store(out_ptr, lowest)


def tokens_kept_by_the_kernel(
    logits: Tensor, temperature: float, *, top_k: int, top_p: float, min_p: float
) -> set[int]:
    logits = logits[:VOCAB_SIZE]
    finite = logits[logits.isfinite()]
    lowest = torch.full((1,), torch.nan, device=DEVICE)
    _lowest_kept_kernel[(1,)](
        logits.to(DEVICE),
        torch.stack((finite.min(), finite.max())).to(DEVICE),
        torch.tensor([temperature, top_p, min_p], device=DEVICE),
        torch.tensor([top_k], dtype=torch.int32, device=DEVICE),
        lowest,
        VOCAB=VOCAB_SIZE,
        BLOCK=256,  # so that there are two
    )
    return set((logits >= lowest.cpu()).nonzero().flatten().tolist())


def unlikelier_by(ratio: float, *, num_equal: int = 1, num_tokens: int = VOCAB_SIZE) -> Tensor:
    """Return logits of tokens in no order, each group of equal ones so much unlikelier at 2."""
    logits = torch.full((VOCAB_SIZE,), -torch.inf)
    ranks = torch.arange(num_tokens) // num_equal
    logits[:num_tokens] = 1.5 + 2.0 * math.log(ratio) * ranks
    return logits[torch.randperm(VOCAB_SIZE, generator=torch.Generator().manual_seed(1))]


LOGITS = {
    "normal": padded_logits(1, seed=3)[0],
    "distinct": unlikelier_by(0.8),
    "ties": unlikelier_by(0.7, num_equal=4),
    "all equal": torch.full((VOCAB_SIZE,), -3.25),
    "all zero": torch.zeros(VOCAB_SIZE),
    "few possible": unlikelier_by(0.8, num_tokens=5),
    "few possible and equal": unlikelier_by(0.8, num_equal=5, num_tokens=5),
    "one possible": unlikelier_by(0.8, num_tokens=1),
    "far apart": unlikelier_by(1e-30, num_equal=3),
    "large": unlikelier_by(0.8) + 3e4,
    # The last bits of fp32, and where its numbers are closest.
    "neighbours": torch.tensor([1 + i * 2.0**-23 for i in range(10)] + [-torch.inf] * 290),
    "around zero": torch.tensor([i * 1e-30 for i in range(-4, 5)] + [-torch.inf] * 291),
}
FILTERS = [
    {"top_k": top_k, "top_p": top_p, "min_p": min_p}
    for top_k, top_p, min_p in (
        (0, 1.0, 0.0),
        (1, 1.0, 0.0),
        (7, 1.0, 0.0),
        (VOCAB_SIZE - 1, 1.0, 0.0),
        (VOCAB_SIZE, 1.0, 0.0),
        (10 * VOCAB_SIZE, 1.0, 0.0),
        (0, 1e-9, 0.0),
        (0, 0.57, 0.0),
        (0, 0.99999, 0.0),
        (0, 1.0, 1e-9),
        (0, 1.0, 0.1),
        (0, 1.0, 1.0),
        (9, 0.83, 0.0),
        (0, 0.83, 0.3),
        (9, 1.0, 0.3),
        (20, 0.9, 0.01),
        (1, 1e-9, 1.0),
    )
]


@pytest.mark.parametrize(
    "filters", FILTERS, ids=lambda filters: "-".join(map(str, filters.values()))
)
def test_filters_keep_what_sorting_keeps(filters: dict[str, Any]) -> None:
    kept = {
        name: sorted(tokens_kept_by_the_kernel(logits, 2.0, **filters))
        for name, logits in LOGITS.items()
    }
    expected = {
        name: sorted(kept_tokens(logits, 2.0, **filters)) for name, logits in LOGITS.items()
    }
    assert kept == expected


def test_greedy_takes_the_first_of_the_likeliest() -> None:
    logits = padded_logits(3)
    logits[1, 250] = logits[1, 40] = 50.0
    expected = logits[:, :VOCAB_SIZE].argmax(-1).tolist()
    expected[1] = 40
    assert draw(logits, new_table()) == expected


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_row_without_a_distribution_is_a_fault(value: float, temperature: float) -> None:
    logits = padded_logits(3)
    logits[1, 123] = value
    tokens = draw(logits, new_table(temperatures=temperature))
    assert tokens[1] == FAULT
    assert FAULT not in (tokens[0], tokens[2])


def test_row_of_minus_infinity_is_a_fault() -> None:
    logits = padded_logits(1)
    logits[:, :VOCAB_SIZE] = -torch.inf
    assert draw(logits, new_table(temperatures=1.0)) == [FAULT]


def test_banned_tokens_are_never_drawn() -> None:
    logits = padded_logits(1)
    logits[:, 5:VOCAB_SIZE] = -torch.inf
    assert max(draw(logits.repeat(50, 1), new_table(temperatures=5.0))) < 5


@pytest.mark.parametrize(("top_k", "top_p", "min_p"), [(4, 1.0, 0.0), (20, 0.7, 0.2)])
def test_tokens_that_are_kept_are_drawn_and_no_others(
    top_k: int, top_p: float, min_p: float
) -> None:
    logits = LOGITS["ties"]
    table = new_table(temperatures=2.0, top_ks=top_k, top_ps=top_p, min_ps=min_p, seeds=5)
    drawn = Counter(draw(logits.repeat(30, 1), table))
    assert set(drawn) == kept_tokens(logits, 2.0, top_k=top_k, top_p=top_p, min_p=min_p)


def test_frequencies_are_those_of_the_softmax() -> None:
    logits = padded_logits(1)
    logits[:, 6:VOCAB_SIZE] = -torch.inf
    table = new_table(temperatures=1.5, seeds=99)
    drawn = Counter(draw(logits.repeat(NUM_DRAWS, 1), table))
    expected = (logits[0, :6].double() / 1.5).softmax(0).numpy() * NUM_DRAWS
    found = np.array([drawn[token] for token in range(6)])
    assert ((found - expected) ** 2 / expected).sum() < 25  # chi square, 5 degrees: 1 in 7000


def test_draw_depends_on_seed_and_position_alone() -> None:
    logits = padded_logits(1).repeat(20, 1)
    one = draw(logits, new_table(temperatures=3.0, seeds=1))
    assert one == draw(logits, new_table(temperatures=3.0, seeds=1), row=1)
    assert one[10:] == draw(logits[:10], new_table(temperatures=3.0, seeds=1), position=17)
    assert one != draw(logits, new_table(temperatures=3.0, seeds=2))
    assert len(set(one)) > 5


def test_bias_and_penalties_are_those_of_the_reference() -> None:
    table = new_table()
    table.repetition_penalties[:3] = torch.tensor([1.0, 1.3, 0.7])
    table.frequency_penalties[:3] = torch.tensor([0.0, 0.5, -0.5])
    table.presence_penalties[:3] = torch.tensor([0.0, 0.25, 1.0])
    table.is_counted[1:3] = 1
    table.counts.copy_(torch.randint(0, 3, table.counts.shape))
    table.counts[:, ::5] += PROMPT_BIT
    table.num_biases[:2] = torch.tensor([3, 1])
    table.bias_token_ids[0, :3] = torch.tensor([0, 7, VOCAB_SIZE - 1])
    table.biases[0, :3] = torch.tensor([1.0, -100.0, 2.5])
    rows = torch.tensor([2, 0, 1], dtype=torch.int32, device=DEVICE)
    sampled = torch.tensor([1, 2, 0], dtype=torch.int32, device=DEVICE)
    logits = padded_logits(3).to(DEVICE)
    expected = logits.clone()
    adjust_logits(logits, sampled, rows, table)
    adjust_logits_reference(expected, sampled, rows, table)
    assert not torch.equal(expected, padded_logits(3).to(DEVICE))
    torch.testing.assert_close(logits, expected)


def test_only_counted_rows_count_what_was_drawn() -> None:
    table = new_table()
    table.is_counted[2] = 1
    logits = padded_logits(1)
    [token] = draw(logits, table, row=2)
    draw(logits, table, row=1)
    assert table.counts[2, token] == 1
    assert table.counts.sum() == 1


@pytest.mark.parametrize("vocab_size", [VOCAB_SIZE, 320])
def test_masks_are_those_of_the_reference(vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = padded_logits(NUM_ROWS)
    num_words = -(-vocab_size // 32)
    bits = torch.randint(-(2**31), 2**31, (2, num_words), generator=generator).to(torch.int32)
    rows = torch.tensor([3, 1], dtype=torch.int32)
    expected = logits.clone()
    mask_logits_reference(expected, rows, bits)
    masked = logits.to(DEVICE)
    mask_logits(masked, rows.to(DEVICE), bits.to(DEVICE))
    assert torch.equal(masked.cpu(), expected)
    is_set = np.unpackbits(bits.numpy().view(np.uint8), axis=1, bitorder="little")
    width = min(num_words * 32, logits.shape[1])
    for mask, row in zip(is_set, rows.tolist(), strict=True):
        assert torch.equal(expected[row, :width].isfinite(), torch.from_numpy(mask[:width] == 1))
    assert torch.equal(expected[[0, 2]], logits[[0, 2]])


def test_only_tokens_of_the_mask_are_drawn() -> None:
    logits = padded_logits(8)
    allowed = [3, 64, 299]
    bits = torch.zeros(8, -(-VOCAB_SIZE // 32), dtype=torch.int32)
    for token_id in allowed:
        bits[:, token_id // 32] |= 1 << token_id % 32
    logits = logits.to(DEVICE)
    mask_logits(logits, torch.arange(8, dtype=torch.int32, device=DEVICE), bits.to(DEVICE))
    for table in (
        new_table(),
        new_table(temperatures=5.0),
        new_table(temperatures=5.0, top_ks=50, top_ps=0.9, min_ps=0.001),
    ):
        assert set(draw(logits, table)) <= set(allowed)
