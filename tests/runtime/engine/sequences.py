"""Sequences and requests with as little ado as a test of blocks or batches needs."""

from collections.abc import Sequence as SequenceOf
from itertools import count

from runtime.engine.sequence import SamplingParams, Sequence, SequenceKey, SequenceRequest

GREEDY = SamplingParams(temperature=0.0)
_numbers = count(1)


def new_sequence(
    token_ids: SequenceOf[int],
    *,
    max_tokens: int = 1000,
    id: int = 0,
    priority: int = 0,
    cache_salt: str = "",
) -> Sequence:
    number = next(_numbers)
    return Sequence(
        key=SequenceKey(0, id or number),
        number=number,
        sampling=GREEDY,
        seed=0,
        max_tokens=max_tokens,
        stop_token_ids=frozenset(),
        token_ids=list(token_ids),
        priority=priority,
        cache_salt=cache_salt,
    )


def new_request(
    id: int,
    prompt: SequenceOf[int],
    *,
    stream: int = 1,
    max_tokens: int = 4,
    sampling: SamplingParams | None = None,
) -> SequenceRequest:
    return SequenceRequest(
        key=SequenceKey(stream, id),
        prompt_token_ids=prompt,
        sampling=sampling or SamplingParams(temperature=0.0, max_tokens=max_tokens),
    )
