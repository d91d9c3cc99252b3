"""How likely the tokens of prompts are."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from runtime.engine.batch import ScheduledSequence
from runtime.engine.sequence import PromptLogprobs

MAX_ROWS = 64  # whose logits are in memory at once


def report_prompts(
    sequences: Sequence[ScheduledSequence], hidden: Tensor, logits: Callable[[Tensor], Tensor]
) -> dict[int, PromptLogprobs]:
    """Return what is to be reported of a batch's prompts, by index in the batch.

    Args:
        sequences: The batch's.
        hidden: The model's last states, [num_tokens, hidden_size].
        logits: Returns those of some states, fp32 [num_rows, vocab_size].
    """
    found = {}
    end = 0
    for index, item in enumerate(sequences):
        first, end = end, end + item.num_tokens
        targets = torch.tensor(item.reported_prompt, dtype=torch.int64)
        num_top = item.sampling.num_prompt_logprobs or 0
        chosen: list[float] = []
        top_ids: list[int] = []
        top: list[float] = []
        for start in range(0, len(targets), MAX_ROWS):
            wanted = targets[start : start + MAX_ROWS]
            rows = hidden[first + start : first + start + len(wanted)]
            logprobs = logits(rows).log_softmax(-1)
            chosen += logprobs.gather(1, wanted[:, None]).flatten().tolist()
            values, indices = logprobs.topk(num_top)
            top += values.flatten().tolist()
            top_ids += indices.flatten().tolist()
        if chosen:
            found[index] = PromptLogprobs(item.start + 1, chosen, top_ids, top)
    return found
