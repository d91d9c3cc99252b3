"""Log-probabilities of tokens by the model alone, over few rows of logits at a time.

They are as large as the logits, once more as a copy, so what a whole batch would take is more than
anybody plans for. Their buffers are made once and are in the plan.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.engine.sequence import TokenLogprobs
from runtime.gpu.device import Device
from runtime.gpu.limits import BatchLimits
from runtime.gpu.memory import WorkMemory


def logprob_bytes(limits: BatchLimits, vocab_size: int) -> int:
    """Return the size of the buffers."""
    return 2 * limits.num_logprob_rows * vocab_size * torch.float32.itemsize


class LogprobBuffers:
    """Where log-probabilities are computed.

    Args:
        limits: Of the batches.
        vocab_size: Token ids are below this.
        work: Holds the buffers.

    Attributes:
        max_rows: Rows of logits that there is room for.
    """

    def __init__(self, limits: BatchLimits, vocab_size: int, work: WorkMemory) -> None:
        self.max_rows = limits.num_logprob_rows
        self._logits, self._logprobs = (
            work.zeros(self.max_rows, vocab_size, dtype=torch.float32) for _ in range(2)
        )

    def compute(self, logits: Tensor, rows: Tensor | None = None) -> Tensor:
        """Return log-probabilities.

        Args:
            logits: fp32 [num_sampled, vocab_size].
            rows: int64 [num_rows], of which rows of logits; None for all. At most `max_rows`.

        Returns:
            fp32 [num_rows, vocab_size], valid until the next call.
        """
        num_rows = len(logits) if rows is None else len(rows)
        copied, logprobs = self._logits[:num_rows], self._logprobs[:num_rows]
        if rows is None:
            copied.copy_(logits)  # else torch takes memory of its own for it, if rows are padded
        else:
            torch.index_select(logits, 0, rows, out=copied)
        torch.log_softmax(copied, -1, out=logprobs)
        return logprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class PendingLogprobs:
    """Log-probabilities on their way to the host; pinned, one row for each that asks.

    Attributes:
        counts: How many alternatives are wanted, by row of logits.
        chosen: fp32 [num_rows].
        top_token_ids: int64 [num_rows, largest count].
        top_logprobs: fp32 [num_rows, largest count].
    """

    counts: Mapping[int, int]
    chosen: Tensor
    top_token_ids: Tensor
    top_logprobs: Tensor

    def read(self) -> dict[int, TokenLogprobs]:
        """Return log-probabilities by row of logits; the copies must have ended."""
        chosen, ids, values = (
            x.tolist() for x in (self.chosen, self.top_token_ids, self.top_logprobs)
        )
        return {
            row: TokenLogprobs(chosen[i], tuple(ids[i][:count]), tuple(values[i][:count]))
            for i, (row, count) in enumerate(self.counts.items())
        }


class ChosenLogprobs:
    """Log-probabilities taken before the logits are changed, for tokens that are chosen then.

    Args:
        logits: fp32 [num_sampled, vocab_size].
        counts: How many alternatives are wanted, by row of logits.
        buffers: Used by nobody else until the end.
        device: Where.
    """

    def __init__(
        self, logits: Tensor, counts: Mapping[int, int], buffers: LogprobBuffers, device: Device
    ) -> None:
        self._counts = counts
        self._device = device
        self._rows = device.upload(list(counts), torch.int64)
        self._logprobs = buffers.compute(logits, self._rows)

    def finish(self, token_ids: Tensor, first_row: int) -> PendingLogprobs:
        """Pick what was chosen, and start copying it and the likeliest ones to the host.

        Args:
            token_ids: int32 [num_sampled].
            first_row: What to count rows of logits from in the result.
        """
        # A fault has no log-probability; any will do in its place.
        chosen_ids = token_ids.index_select(0, self._rows).clamp(min=0).long()
        chosen = self._logprobs.gather(1, chosen_ids[:, None])[:, 0]
        top_logprobs, top_token_ids = self._logprobs.topk(max(self._counts.values()))
        return PendingLogprobs(
            counts={first_row + row: count for row, count in self._counts.items()},
            chosen=self._device.download(chosen),
            top_token_ids=self._device.download(top_token_ids),
            top_logprobs=self._device.download(top_logprobs),
        )
