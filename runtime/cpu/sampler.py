"""Logits to token ids.

Randomness is a function of (seed, position) alone, so a sequence gets the same tokens in any
batch, after a preemption and in another process. Each row that samples is worked on alone: what
it gets cannot depend on its neighbours.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.engine.sequence import SamplingParams

GREEDY_BELOW = 1e-5  # colder than this, differences of logits overflow
NUM_CANDIDATES = 256  # enough for nearly every filter; else the whole row is sorted
_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingRow:
    """How to sample from one row of logits.

    Attributes:
        position: Of the token to sample, within its sequence.
    """

    params: SamplingParams
    seed: int
    position: int


def sample(logits: Tensor, rows: Sequence[SamplingRow]) -> tuple[list[int], list[int]]:
    """Sample one token from each row of fp32 logits [num_rows, vocab_size].

    Returns:
        The token ids, and the indices of rows that hold no distribution because of NaN or
        infinity; their tokens are meaningless.
    """
    maxima, argmaxima = logits.max(dim=-1)
    token_ids: list[int] = argmaxima.tolist()
    is_sound: list[bool] = maxima.isfinite().tolist()
    for index, row in enumerate(rows):
        if is_sound[index] and row.params.temperature >= GREEDY_BELOW:
            token_ids[index] = _sample_row(logits[index], maxima[index], row)
    return token_ids, [index for index, sound in enumerate(is_sound) if not sound]


def uniform(seed: int, position: int) -> float:
    """Return a number in [0, 1) that looks random over positions and over seeds (SplitMix64)."""
    bits = _mix(_mix(seed & _MASK) + position)
    return (bits >> 11) / (1 << 53)


def _mix(state: int) -> int:
    state = (state + 0x9E3779B97F4A7C15) & _MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return state ^ (state >> 31)


def _sample_row(logits: Tensor, maximum: Tensor, row: SamplingRow) -> int:
    params = row.params
    # Not normalized: every filter below is relative to the largest weight or to their sum.
    weights = ((logits - maximum) / params.temperature).exp_()
    random = uniform(row.seed, row.position)
    if params.top_p >= 1.0 and params.top_k == 0:
        weights.masked_fill_(weights < params.min_p, 0.0)
        return _pick(weights, random)
    weights, token_ids = _most_likely(weights, params)
    return int(token_ids[_pick(weights, random)])


def _most_likely(weights: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """Return the weights and token ids that pass the filters, likeliest first.

    min-p comes first, then top-k, then top-p among what is left.
    """
    num_candidates = min(max(NUM_CANDIDATES, params.top_k), len(weights))
    total = weights.masked_fill(weights < params.min_p, 0.0).sum(dtype=torch.float64)
    candidates, token_ids = weights.topk(num_candidates)
    kept = _num_kept(candidates, total, params)
    if kept == num_candidates < len(weights) and params.top_k != num_candidates:
        candidates, token_ids = weights.sort(descending=True)
        kept = _num_kept(candidates, total, params)
    return candidates[:kept], token_ids[:kept]


def _num_kept(candidates: Tensor, total: Tensor, params: SamplingParams) -> int:
    """Return how many of the candidates, likeliest first, pass the filters."""
    kept = int((candidates >= params.min_p).sum())
    if 0 < params.top_k <= kept:
        kept = params.top_k
        total = candidates[:kept].sum(dtype=torch.float64)
    if params.top_p >= 1.0:
        return kept
    before = candidates[:kept].cumsum(0, dtype=torch.float64) - candidates[:kept]
    return max(1, int((before < params.top_p * total).sum()))


def _pick(weights: Tensor, random: float) -> int:
    """Return the index at which the running sum of weights passes that share of their total."""
    sums = weights.cumsum(0, dtype=torch.float64)
    # A share that rounds up to the total still has to fall on a token with weight.
    target = (sums[-1] * random).clamp_(max=sums[-1].nextafter(sums.new_zeros(())))
    return int(torch.searchsorted(sums, target, right=True))
