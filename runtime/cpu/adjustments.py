"""What changes logits before a token is drawn: biases, penalties, masks. In plain torch."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from runtime.engine.batch import TokenMasks
from runtime.engine.sequence import SamplingParams


def adjust(
    logits: Tensor, params: SamplingParams, token_ids: Sequence[int], num_prompt_tokens: int
) -> None:
    """Add biases and apply penalties to one row, in place.

    Args:
        logits: fp32 [vocab_size].
        params: The sequence's.
        token_ids: Its prompt, then its output.
        num_prompt_tokens: How many of those are the prompt.
    """
    if params.logit_bias:
        logits[list(params.logit_bias)] += torch.tensor(list(params.logit_bias.values()))
    if not params.has_penalties:
        return
    present = list(set(token_ids))
    chosen = logits[present]
    penalty = params.repetition_penalty
    logits[present] = torch.where(chosen > 0, chosen / penalty, chosen * penalty)
    counts = Counter(token_ids[num_prompt_tokens:])
    taken = params.frequency_penalty * torch.tensor(list(counts.values())) + params.presence_penalty
    logits[list(counts)] -= taken


def mask(logits: Tensor, masks: TokenMasks) -> None:
    """Set the logits of tokens that may not be chosen to minus infinity, in place.

    Args:
        logits: fp32 [num_sampled, vocab_size].
        masks: Of some of its rows.
    """
    bits = np.frombuffer(masks.bits, dtype=np.uint8).reshape(len(masks.rows), -1)
    may = torch.from_numpy(np.unpackbits(bits, axis=1, bitorder="little", count=logits.shape[1]))
    for row, row_may in zip(masks.rows, may, strict=True):
        logits[row].masked_fill_(row_may == 0, -torch.inf)
