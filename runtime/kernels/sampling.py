"""Logits to token ids for a whole batch, on the GPU, without a word to the host.

One program works on one row. Random numbers depend on the sequence's seed, the position and the
token alone, and a row's result on no other row, so a sequence gets the same tokens in any batch.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from runtime.kernels.launch import next_power_of_2

MAX_BLOCK = 8192
FAULT = -1  # instead of a token where logits hold no distribution
MAX_LOGIT_BIASES = 1024  # of one sequence
PROMPT_BIT = 1 << 30  # in a token's count: it is in the prompt


class SamplingTable(NamedTuple):
    """How the sequence in each row is sampled; [num_rows] each unless it says otherwise.

    Attributes:
        temperatures: fp32; 0 is greedy.
        top_ps: fp32; 1 is off.
        min_ps: fp32; 0 is off.
        top_ks: int32; 0 is off.
        seeds: int64.
        repetition_penalties: fp32; 1 is off.
        frequency_penalties: fp32; 0 is off.
        presence_penalties: fp32; 0 is off.
        is_counted: int32; whether `counts` is kept.
        num_biases: int32.
        bias_token_ids: int32 [num_rows, MAX_LOGIT_BIASES].
        biases: fp32 [num_rows, MAX_LOGIT_BIASES].
        counts: int32 [num_rows, vocab_size], occurrences in the output, plus PROMPT_BIT.
    """

    temperatures: Tensor
    top_ps: Tensor
    min_ps: Tensor
    top_ks: Tensor
    seeds: Tensor
    repetition_penalties: Tensor
    frequency_penalties: Tensor
    presence_penalties: Tensor
    is_counted: Tensor
    num_biases: Tensor
    bias_token_ids: Tensor
    biases: Tensor
    counts: Tensor

    @classmethod
    def allocate(
        cls,
        num_rows: int,
        vocab_size: int,
        device: torch.device | str,
        counts: Tensor | None = None,
    ) -> "SamplingTable":
        """Return a table of greedy rows, on zeros for `counts` that are there or not."""

        def column(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.zeros(num_rows, *shape, dtype=dtype, device=device)

        return cls(
            temperatures=column(torch.float32),
            top_ps=column(torch.float32),
            min_ps=column(torch.float32),
            top_ks=column(torch.int32),
            seeds=column(torch.int64),
            repetition_penalties=column(torch.float32),
            frequency_penalties=column(torch.float32),
            presence_penalties=column(torch.float32),
            is_counted=column(torch.int32),
            num_biases=column(torch.int32),
            bias_token_ids=column(torch.int32, MAX_LOGIT_BIASES),
            biases=column(torch.float32, MAX_LOGIT_BIASES),
            counts=column(torch.int32, vocab_size) if counts is None else counts,
        )


def adjust_logits(logits: Tensor, sampled: Tensor, rows: Tensor, table: SamplingTable) -> None:
    """Add biases, then apply penalties, in place.

    Args:
        logits: fp32 [num_sampled, vocab_size or more].
        sampled: int32 [num_sampled], the batch's sequence each row of logits is of.
        rows: int32 [num_seqs], that sequence's row of the table.
        table: Read.
    """
    vocab_size = table.counts.shape[1]
    block = min(MAX_BLOCK, next_power_of_2(vocab_size))
    _bias_kernel[(len(sampled),)](
        logits,
        sampled,
        rows,
        table.num_biases,
        table.bias_token_ids,
        table.biases,
        logits.stride(0),
        MAX_BIASES=MAX_LOGIT_BIASES,
    )
    _penalty_kernel[(len(sampled), triton.cdiv(vocab_size, block))](
        logits,
        sampled,
        rows,
        table.is_counted,
        table.repetition_penalties,
        table.frequency_penalties,
        table.presence_penalties,
        table.counts,
        logits.stride(0),
        VOCAB=vocab_size,
        BLOCK=block,
    )


def adjust_logits_reference(
    logits: Tensor, sampled: Tensor, rows: Tensor, table: SamplingTable
) -> None:
    """Do what `adjust_logits` does, in plain torch."""
    vocab_size = table.counts.shape[1]
    for index, row in enumerate(rows[sampled.long()].tolist()):
        biased = table.bias_token_ids[row, : table.num_biases[row]].long()
        logits[index, biased] += table.biases[row, : table.num_biases[row]]
        if not table.is_counted[row]:
            continue
        chosen = logits[index, :vocab_size]
        counts = table.counts[row] & (PROMPT_BIT - 1)
        penalty = table.repetition_penalties[row]
        repeated = torch.where(chosen > 0, chosen / penalty, chosen * penalty)
        chosen.copy_(torch.where(table.counts[row] > 0, repeated, chosen))
        chosen -= table.frequency_penalties[row] * counts
        chosen -= table.presence_penalties[row] * (counts > 0)


def mask_logits(logits: Tensor, rows: Tensor, bits: Tensor) -> None:
    """Set the logits of tokens that may not be chosen to minus infinity, in place.

    Args:
        logits: fp32 [num_sampled, vocab_size or more].
        rows: int32 [num_masked], the rows of logits that are masked.
        bits: int32 [num_masked, num_words], a bit per token, lowest first; tokens beyond the last
            word stay as they are.
    """
    num_words = bits.shape[1]
    block = min(MAX_BLOCK // 32, next_power_of_2(num_words))
    _mask_kernel[(len(rows), triton.cdiv(num_words, block))](
        logits,
        rows,
        bits,
        logits.stride(0),
        WIDTH=logits.shape[1],
        NUM_WORDS=num_words,
        BLOCK=block,
    )


def mask_logits_reference(logits: Tensor, rows: Tensor, bits: Tensor) -> None:
    """Do what `mask_logits` does, in plain torch."""
    lanes = torch.arange(32, dtype=torch.int32, device=bits.device)
    may = (bits[:, :, None] >> lanes & 1).flatten(1)[:, : logits.shape[1]]
    width = may.shape[1]
    masked = logits[rows.long(), :width].masked_fill(may == 0, -torch.inf)
    logits[rows.long(), :width] = masked


def sample(
    logits: Tensor,
    sampled: Tensor,
    rows: Tensor,
    seq_lens: Tensor,
    table: SamplingTable,
    *,
    token_ids: Tensor,
    last_tokens: Tensor,
) -> None:
    """Choose a token from each row of logits.

    min-p comes first, then top-k, then top-p among what is left; tokens as likely as the last one
    kept are kept too.

    Args:
        logits: fp32 [num_sampled, vocab_size or more].
        sampled: int32 [num_sampled], the batch's sequence each row of logits is of.
        rows: int32 [num_seqs], that sequence's row of the table.
        seq_lens: int32 [num_seqs], position of the token to choose.
        table: Read; the counts of rows that keep them are written.
        token_ids: int32 [num_sampled]; written; FAULT where the largest logit is not finite.
        last_tokens: int32 [num_rows]; written.
    """
    vocab_size = table.counts.shape[1]
    _sample_kernel[(len(sampled),)](
        logits,
        sampled,
        rows,
        seq_lens,
        table.temperatures,
        table.top_ps,
        table.min_ps,
        table.top_ks,
        table.seeds,
        table.is_counted,
        table.counts,
        token_ids,
        last_tokens,
        logits.stride(0),
        VOCAB=vocab_size,
        BLOCK=min(MAX_BLOCK, next_power_of_2(vocab_size)),
        num_warps=32,
    )


@triton.jit(do_not_specialize=["logits_stride"])
def _bias_kernel(
    logits_ptr,
    sampled_ptr,
    rows_ptr,
    num_biases_ptr,
    bias_token_ids_ptr,
    biases_ptr,
    logits_stride,
    MAX_BIASES: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + tl.load(sampled_ptr + index)).to(tl.int64)
    lanes = tl.arange(0, MAX_BIASES)
    is_bias = lanes < tl.load(num_biases_ptr + row)
    token_ids = tl.load(bias_token_ids_ptr + row * MAX_BIASES + lanes, mask=is_bias, other=0)
    biases = tl.load(biases_ptr + row * MAX_BIASES + lanes, mask=is_bias, other=0.0)
    biased_ptr = logits_ptr + index * logits_stride + token_ids
    logits = tl.load(biased_ptr, mask=is_bias, other=0.0)
    tl.store(biased_ptr, logits + biases, mask=is_bias)


@triton.jit(do_not_specialize=["logits_stride"])
def _penalty_kernel(
    logits_ptr,
    sampled_ptr,
    rows_ptr,
    is_counted_ptr,
    repetition_penalties_ptr,
    frequency_penalties_ptr,
    presence_penalties_ptr,
    counts_ptr,
    logits_stride,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + tl.load(sampled_ptr + index)).to(tl.int64)
    if tl.load(is_counted_ptr + row) != 0:
        tokens = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        is_token = tokens < VOCAB
        counts = tl.load(counts_ptr + row * VOCAB + tokens, mask=is_token, other=0)
        num_outputs = counts & 0x3FFFFFFF
        logits_ptr += index * logits_stride
        logits = tl.load(logits_ptr + tokens, mask=is_token, other=0.0)
        repetition = tl.load(repetition_penalties_ptr + row)
        repeated = tl.where(logits > 0, logits / repetition, logits * repetition)
        logits = tl.where(counts > 0, repeated, logits)
        logits -= tl.load(frequency_penalties_ptr + row) * num_outputs
        logits -= tl.where(num_outputs > 0, tl.load(presence_penalties_ptr + row), 0.0)
        tl.store(logits_ptr + tokens, logits, mask=is_token)


@triton.jit(do_not_specialize=["logits_stride"])
def _mask_kernel(
    logits_ptr,
    rows_ptr,
    bits_ptr,
    logits_stride,
    WIDTH: tl.constexpr,
    NUM_WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + index).to(tl.int64)
    words = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    # Words beyond the last one allow everything.
    bits = tl.load(bits_ptr + index * NUM_WORDS + words, mask=words < NUM_WORDS, other=-1)
    lanes = tl.arange(0, 32)
    may = (bits[:, None] >> lanes[None, :]) & 1
    tokens = words[:, None] * 32 + lanes[None, :]
    is_forbidden = (may == 0) & (tokens < WIDTH)
    forbidden = tl.full((BLOCK, 32), -float("inf"), tl.float32)
    tl.store(logits_ptr + row * logits_stride + tokens, forbidden, mask=is_forbidden)


@triton.jit
def _above(row_ptr, threshold, maximum, temperature, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """Return the mass of tokens that are at least a threshold, where the likeliest has 1."""
    lanes = tl.arange(0, BLOCK)
    masses = tl.zeros((BLOCK,), tl.float32)
    for first in tl.range(0, VOCAB, BLOCK):
        logits = tl.load(row_ptr + first + lanes, mask=first + lanes < VOCAB, other=-float("inf"))
        masses += tl.where(logits >= threshold, tl.exp((logits - maximum) / temperature), 0.0)
    return tl.sum(masses, 0)


@triton.jit
def _quarters_above(
    row_ptr,
    low,
    width,
    maximum,
    temperature,
    COUNTS: tl.constexpr,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return how many tokens, or else how much mass, is above low + 1, 2 and 3 widths."""
    lanes = tl.arange(0, BLOCK)
    first_above = tl.zeros((BLOCK,), tl.float32)
    second_above = tl.zeros((BLOCK,), tl.float32)
    third_above = tl.zeros((BLOCK,), tl.float32)
    for first in tl.range(0, VOCAB, BLOCK):
        logits = tl.load(row_ptr + first + lanes, mask=first + lanes < VOCAB, other=-float("inf"))
        if COUNTS:
            weights = tl.full((BLOCK,), 1.0, tl.float32)
        else:
            weights = tl.exp((logits - maximum) / temperature)
        first_above += tl.where(logits >= low + width, weights, 0.0)
        second_above += tl.where(logits >= low + 2 * width, weights, 0.0)
        third_above += tl.where(logits >= low + 3 * width, weights, 0.0)
    return tl.sum(first_above, 0), tl.sum(second_above, 0), tl.sum(third_above, 0)


@triton.jit
def _largest_threshold(
    row_ptr,
    low,
    high,
    wanted,
    maximum,
    temperature,
    COUNTS: tl.constexpr,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return the largest threshold, to the last bit, with so much at or above it.

    That much is at or above `low`; each pass over the row keeps a quarter of the interval.
    """
    width = (high - low) * 0.25
    while (low < low + width) & (low + 3 * width < high):
        first, second, third = _quarters_above(
            row_ptr, low, width, maximum, temperature, COUNTS, VOCAB, BLOCK
        )
        passed = (first >= wanted).to(tl.int32) + (second >= wanted) + (third >= wanted)
        high = tl.where(passed < 3, low + (passed + 1) * width, high)
        low = low + passed * width
        width = (high - low) * 0.25
    # What is left holds a few neighbouring numbers.
    is_enough = True
    while is_enough & (low < high):
        larger = _next_larger(low)
        first, _, _ = _quarters_above(
            row_ptr, larger, 0.0, maximum, temperature, COUNTS, VOCAB, BLOCK
        )
        is_enough = first >= wanted
        low = tl.where(is_enough, larger, low)
    return low


@triton.jit
def _lowest_kept(
    row_ptr,
    least,
    maximum,
    temperature,
    top_p,
    top_k,
    min_p,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return the logit below which the filters leave nothing; `least` is the smallest finite one."""
    lowest = least
    if min_p > 0.0:
        lowest = tl.maximum(lowest, tl.minimum(maximum, maximum + temperature * tl.log(min_p)))
    if (top_k > 0) & (top_k < VOCAB):
        lowest = _largest_threshold(
            row_ptr, lowest, maximum, top_k, maximum, temperature, True, VOCAB, BLOCK
        )
    if top_p < 1.0:
        wanted = top_p * _above(row_ptr, lowest, maximum, temperature, VOCAB, BLOCK)
        # All tokens less likely than this have together no more than what may be left out.
        negligible = maximum + temperature * tl.log((1.0 - top_p) / VOCAB)
        low = tl.maximum(lowest, negligible)
        lowest = _largest_threshold(
            row_ptr, low, maximum, wanted, maximum, temperature, False, VOCAB, BLOCK
        )
    return lowest


@triton.jit
def _next_larger(x):
    """Return the next fp32 number; x is finite."""
    bits = x.to(tl.int32, bitcast=True)
    larger = tl.where(bits >= 0, bits + 1, bits - 1)
    larger = tl.where(x == 0.0, 1, larger)
    return larger.to(tl.float32, bitcast=True)


@triton.jit
def _sample_kernel(
    logits_ptr,
    sampled_ptr,
    rows_ptr,
    seq_lens_ptr,
    temperatures_ptr,
    top_ps_ptr,
    min_ps_ptr,
    top_ks_ptr,
    seeds_ptr,
    is_counted_ptr,
    counts_ptr,
    token_ids_ptr,
    last_tokens_ptr,
    logits_stride,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    seq = tl.load(sampled_ptr + index)
    row = tl.load(rows_ptr + seq).to(tl.int64)
    row_ptr = logits_ptr + index * logits_stride
    lanes = tl.arange(0, BLOCK)

    best = tl.full((BLOCK,), -float("inf"), tl.float32)
    best_tokens = tl.zeros((BLOCK,), tl.int32)
    least = tl.full((BLOCK,), float("inf"), tl.float32)
    num_unsound = tl.zeros((BLOCK,), tl.int32)
    for first in tl.range(0, VOCAB, BLOCK):
        tokens = first + lanes
        logits = tl.load(row_ptr + tokens, mask=tokens < VOCAB, other=-float("inf"))
        num_unsound += (logits != logits).to(tl.int32)
        least = tl.minimum(least, tl.where(logits > -float("inf"), logits, float("inf")))
        best_tokens = tl.where(logits > best, tokens, best_tokens)
        best = tl.maximum(best, logits)
    maximum = tl.max(best, 0)
    token = tl.min(tl.where(best == maximum, best_tokens, VOCAB), 0)
    is_sound = (tl.sum(num_unsound, 0) == 0) & (tl.abs(maximum) < float("inf"))

    temperature = tl.load(temperatures_ptr + row)
    if is_sound & (temperature > 0.0):
        top_p = tl.load(top_ps_ptr + row)
        top_k = tl.load(top_ks_ptr + row)
        min_p = tl.load(min_ps_ptr + row)
        lowest = _lowest_kept(
            row_ptr, tl.min(least, 0), maximum, temperature, top_p, top_k, min_p, VOCAB, BLOCK
        )
        # The largest of logit + Gumbel noise is a sample of the softmax: no sum, no sort.
        position = tl.load(seq_lens_ptr + seq).to(tl.int64)
        key = tl.load(seeds_ptr + row) + position * -7046029254386353131
        best = tl.full((BLOCK,), -float("inf"), tl.float32)
        for first in tl.range(0, VOCAB, BLOCK):
            tokens = first + lanes
            logits = tl.load(row_ptr + tokens, mask=tokens < VOCAB, other=-float("inf"))
            noise = -tl.log(-tl.log(tl.maximum(tl.rand(key, tokens), 1e-10)))
            scores = tl.where(logits >= lowest, logits / temperature + noise, -float("inf"))
            best_tokens = tl.where(scores > best, tokens, best_tokens)
            best = tl.maximum(best, scores)
        token = tl.min(tl.where(best == tl.max(best, 0), best_tokens, VOCAB), 0)

    token = tl.where(is_sound, token, 0)
    tl.store(token_ids_ptr + index, tl.where(is_sound, token, -1))
    tl.store(last_tokens_ptr + row, token)
    if tl.load(is_counted_ptr + row) != 0:
        count_ptr = counts_ptr + row * VOCAB + token
        tl.store(count_ptr, tl.load(count_ptr) + 1)
