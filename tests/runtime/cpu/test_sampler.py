import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from runtime.cpu import sampler
from runtime.cpu.adjustments import mask
from runtime.cpu.sampler import SamplingRow, sample, uniform
from runtime.engine.batch import TokenMasks
from runtime.engine.sequence import SamplingParams

NUM_DRAWS = 4000
# Chi-square, 99.99 % quantile by degrees of freedom (Wilson-Hilferty, z = 3.719).
Z = 3.719


def row(params: SamplingParams, *, seed: int = 0, position: int = 0) -> SamplingRow:
    return SamplingRow(params=params, seed=seed, position=position)


def draw(logits: torch.Tensor, params: SamplingParams, num_draws: int = NUM_DRAWS) -> Counter[int]:
    rows = [row(params, seed=7, position=position) for position in range(num_draws)]
    token_ids, unsound = sample(logits.expand(num_draws, -1), rows)
    assert unsound == []
    return Counter(token_ids)


def reference(logits: torch.Tensor, params: SamplingParams) -> NDArray[np.float64]:
    """Return the distribution to sample from, step by step as the parameters are defined."""
    scaled: NDArray[np.float64] = logits.double().numpy() / params.temperature
    probabilities: NDArray[np.float64] = np.exp(scaled - scaled.max())
    probabilities /= probabilities.sum()
    probabilities[probabilities < params.min_p * probabilities.max()] = 0.0
    order = np.argsort(-probabilities, kind="stable")
    if params.top_k:
        probabilities[order[params.top_k :]] = 0.0
    probabilities /= probabilities.sum()
    if params.top_p < 1.0:
        before = np.cumsum(probabilities[order]) - probabilities[order]
        probabilities[order[before >= params.top_p]] = 0.0
    probabilities /= probabilities.sum()
    return probabilities


def chi_square_limit(degrees: int) -> float:
    return degrees * (1 - 2 / (9 * degrees) + Z * math.sqrt(2 / (9 * degrees))) ** 3


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.5),
        SamplingParams(temperature=3.0),
        SamplingParams(top_k=4),
        SamplingParams(top_p=0.7),
        SamplingParams(min_p=0.2),
        SamplingParams(temperature=1.5, top_k=9, top_p=0.9, min_p=0.02),
    ],
    ids=str,
)
def test_draws_follow_the_distribution(params: SamplingParams) -> None:
    logits = torch.randn(12, generator=torch.Generator().manual_seed(3))
    expected = reference(logits, params)
    counts = draw(logits, params)
    support = {int(token_id) for token_id in np.flatnonzero(expected)}
    assert set(counts) <= support
    statistic = sum(
        (counts[id] - NUM_DRAWS * expected[id]) ** 2 / (NUM_DRAWS * expected[id]) for id in support
    )
    assert statistic < chi_square_limit(len(support) - 1)


@given(
    seed=st.integers(0, 10_000),
    temperature=st.floats(0.1, 5.0),
    top_k=st.integers(0, 40),
    top_p=st.floats(0.01, 1.0),
    min_p=st.floats(0.0, 0.9),
)
@settings(max_examples=200)
def test_filters_keep_exactly_the_reference_support(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    logits = torch.randn(30, generator=torch.Generator().manual_seed(seed)) * 3
    expected = reference(logits, params)
    weights = ((logits - logits.max()) / temperature).exp()
    _, token_ids = sampler._most_likely(weights, params)
    support = set(token_ids.tolist())
    # On the very edge of top-p and min-p, fp32 and fp64 may differ by one token.
    assert len(support ^ {int(id) for id in np.flatnonzero(expected)}) <= 1


def test_rare_tokens_beyond_the_candidates_are_still_drawn() -> None:
    logits = torch.zeros(5 * sampler.NUM_CANDIDATES)
    counts = draw(logits, SamplingParams(top_p=0.999), 500)
    assert len(counts) > sampler.NUM_CANDIDATES


def test_greedy_takes_the_largest_logit() -> None:
    logits = torch.randn(5, 100, generator=torch.Generator().manual_seed(0))
    rows = [row(SamplingParams(temperature=temperature)) for temperature in (0.0, 1e-9, 0, 0, 0)]
    assert sample(logits, rows)[0] == logits.argmax(-1).tolist()


def test_token_does_not_depend_on_the_batch_around_it() -> None:
    logits = torch.randn(8, 500, generator=torch.Generator().manual_seed(1))
    rows = [
        row(SamplingParams(temperature=0.3 * i, top_p=1 - 0.1 * i, top_k=i), seed=i, position=i)
        for i in range(8)
    ]
    together, _ = sample(logits, rows)
    alone = [sample(logits[i : i + 1], rows[i : i + 1])[0][0] for i in range(8)]
    assert together == alone


def test_same_seed_and_position_give_the_same_token_and_others_differ() -> None:
    logits = torch.zeros(1, 1 << 16)
    tokens = [
        sample(logits, [row(SamplingParams(), seed=seed, position=position)])[0][0]
        for seed, position in [(1, 1), (1, 1), (1, 2), (2, 1), (1 << 63, 1)]
    ]
    assert tokens[0] == tokens[1]
    assert len(set(tokens)) == 4


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_row_that_is_not_finite_is_reported_and_others_are_sampled(bad: float) -> None:
    logits = torch.zeros(3, 4)
    logits[:, 2] = 5
    logits[1, 0] = bad
    token_ids, unsound = sample(logits, [row(SamplingParams(temperature=0.0))] * 3)
    assert unsound == [1]
    assert (token_ids[0], token_ids[2]) == (2, 2)


def test_row_without_any_possible_token_is_reported() -> None:
    assert sample(torch.full((1, 4), -math.inf), [row(SamplingParams())])[1] == [0]


def test_impossible_tokens_are_never_drawn() -> None:
    logits = torch.full((50,), -math.inf)
    logits[[3, 40]] = 0.0
    assert set(draw(logits, SamplingParams(temperature=2.0), 200)) == {3, 40}


def test_uniform_numbers_are_spread_evenly_over_positions_and_seeds() -> None:
    for numbers in (
        [uniform(5, position) for position in range(4096)],
        [uniform(seed, 5) for seed in range(4096)],
    ):
        counts = Counter(int(number * 16) for number in numbers)
        assert sum((counts[i] - 256) ** 2 / 256 for i in range(16)) < chi_square_limit(15)


def test_masks_leave_only_what_they_allow_and_other_rows_alone() -> None:
    logits = torch.randn(3, 70)
    before = logits.clone()
    bits = bytearray(12)
    for token_id in (0, 31, 32, 69):
        bits[token_id // 8] |= 1 << token_id % 8
    mask(logits, TokenMasks(rows=(1,), bits=memoryview(bits)))
    assert logits[1].isfinite().nonzero().flatten().tolist() == [0, 31, 32, 69]
    assert torch.equal(logits[[0, 2]], before[[0, 2]])
