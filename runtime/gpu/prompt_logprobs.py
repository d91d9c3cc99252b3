"""How likely the tokens of prompts are: launched after the model, copied with the batch's tokens."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.engine.batch import ScheduledSequence
from runtime.engine.sequence import PromptLogprobs
from runtime.gpu.device import Device
from runtime.gpu.logprobs import LogprobBuffers

Logits = Callable[[Tensor], Tensor]
"""Returns logits, fp32 [num_rows, vocab_size], of tokens of the batch, int32 [num_rows]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PendingPromptLogprobs:
    """Log-probabilities on their way to the host; pinned, a row for each token.

    Attributes:
        items: Whose they are, in order: index in the batch, position of the first, number of
            tokens, and how many of the likeliest are wanted.
        chosen: fp32 [num_tokens].
        top_token_ids: int64 [num_tokens, largest count].
        top_logprobs: fp32 [num_tokens, largest count].
    """

    items: Sequence[tuple[int, int, int, int]]
    chosen: Tensor
    top_token_ids: Tensor
    top_logprobs: Tensor

    def read(self) -> dict[int, PromptLogprobs]:
        """Return them by index in the batch; the copies must have ended."""
        found = {}
        end = 0
        for index, first, num_tokens, num_top in self.items:
            rows = slice(end, end := end + num_tokens)
            found[index] = PromptLogprobs(
                first,
                self.chosen[rows].tolist(),
                self.top_token_ids[rows, :num_top].flatten().tolist(),
                self.top_logprobs[rows, :num_top].flatten().tolist(),
            )
        return found


def launch_prompt_logprobs(
    sequences: Sequence[ScheduledSequence],
    logits: Logits,
    *,
    buffers: LogprobBuffers,
    device: Device,
) -> PendingPromptLogprobs | None:
    """Compute what is to be reported of a batch's prompts; None if nothing is.

    Args:
        sequences: The batch's.
        logits: Called with at most as many tokens as the buffers have room for; its result may be
            overwritten by the next.
        buffers: Where log-probabilities are computed.
        device: Where.
    """
    items: list[tuple[int, int, int, int]] = []
    rows: list[int] = []
    targets: list[int] = []
    first_row = 0
    for index, item in enumerate(sequences):
        reported = item.reported_prompt
        if reported:
            num_top = item.sampling.num_prompt_logprobs or 0
            items.append((index, item.start + 1, len(reported), num_top))
            rows += range(first_row, first_row + len(reported))
            targets += reported
        first_row += item.num_tokens
    if not items:
        return None
    most = max(num_top for *_, num_top in items)
    parts = []
    for part, wanted in zip(
        device.upload(rows, torch.int32).split(buffers.max_rows),
        device.upload(targets, torch.int64).split(buffers.max_rows),
        strict=True,
    ):
        logprobs = buffers.compute(logits(part))
        parts.append((logprobs.gather(1, wanted[:, None])[:, 0], *logprobs.topk(most)))
    chosen, top_logprobs, top_token_ids = (
        torch.cat(columns) for columns in zip(*parts, strict=True)
    )
    return PendingPromptLogprobs(
        items=items,
        chosen=device.download(chosen),
        top_token_ids=device.download(top_token_ids),
        top_logprobs=device.download(top_logprobs),
    )
