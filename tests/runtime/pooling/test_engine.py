from collections.abc import Sequence

import pytest

from runtime.config import EngineConfig
from runtime.engine.pooling import Pooled, PoolingRequest
from runtime.engine.sequence import SamplingParams, SequenceKey, SequenceRequest
from runtime.errors import InvalidSequence
from runtime.pooling.engine import PoolingEngine

POISON = 99


class Echo:
    """Embeds a text as its first token; a batch with POISON raises."""

    max_model_len = 16
    max_step_tokens = 20
    vocab_size = 100
    embedding_size = 4

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def embed(self, texts: Sequence[PoolingRequest]) -> list[Pooled]:
        if any(POISON in text.token_ids for text in texts):
            raise RuntimeError("poisoned")
        self.batches.append([len(text.token_ids) for text in texts])
        return [Pooled(key=text.key, embedding=bytes(text.token_ids[:1])) for text in texts]


def text(number: int, token_ids: list[int], call: int = 1, dimensions: int = 0) -> PoolingRequest:
    return PoolingRequest(key=SequenceKey(call, number), token_ids=token_ids, dimensions=dimensions)


def engine_of(runner: Echo, **limits: int) -> PoolingEngine:
    return PoolingEngine(EngineConfig(**limits), runner)  # type: ignore[arg-type]  # ints only


def run(engine: PoolingEngine) -> list[Pooled]:
    pooled: list[Pooled] = []
    while engine.has_work():
        pooled += engine.step().pooled
    return pooled


def test_steps_hold_what_the_budgets_allow_in_order_of_arrival() -> None:
    runner = Echo()
    engine = engine_of(runner, max_num_seqs=3)
    lengths = [8, 8, 8, 1, 1, 1, 1, 16]
    for number, length in enumerate(lengths):
        engine.submit_text(text(number, [number] * length))
    assert [one.key.sequence_id for one in run(engine)] == list(range(len(lengths)))
    assert runner.batches == [[8, 8], [8, 1, 1], [1, 1, 16]]
    assert engine.figures().num_prompt_tokens == sum(lengths)


def test_text_over_the_budget_runs_alone() -> None:
    runner = Echo()
    engine = engine_of(runner, max_num_batched_tokens=4)
    for number, length in enumerate([2, 16, 2]):
        engine.submit_text(text(number, [1] * length))
    run(engine)
    assert runner.batches == [[2], [16], [2]]


def test_faulty_text_fails_alone() -> None:
    engine = engine_of(Echo())
    for number, token_id in enumerate([1, POISON, 3]):
        engine.submit_text(text(number, [token_id]))
    pooled = run(engine)
    assert [one.embedding for one in pooled] == [b"\1", b"", b"\3"]
    assert "poisoned" in pooled[1].error


def test_cancelled_call_is_forgotten_and_others_go_on() -> None:
    engine = engine_of(Echo())
    engine.submit_text(text(0, [1], call=1))
    engine.submit_text(text(0, [2], call=2))
    engine.submit_text(text(1, [3], call=1))
    engine.cancel_stream(1)
    assert [one.embedding for one in run(engine)] == [b"\2"]


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (text(0, []), "empty"),
        (text(0, [1] * 17), "above max_model_len=16"),
        (text(0, [1, 100]), "not in the vocabulary"),
        (text(0, [1], dimensions=5), "at most 4"),
    ],
)
def test_bad_text_is_refused(request_: PoolingRequest, words: str) -> None:
    engine = engine_of(Echo())
    with pytest.raises(InvalidSequence, match=words):
        engine.submit_text(request_)
    assert not engine.has_work()


def test_nothing_is_generated() -> None:
    request = SequenceRequest(
        key=SequenceKey(1, 1), prompt_token_ids=[1], sampling=SamplingParams()
    )
    with pytest.raises(InvalidSequence, match="embeds"):
        engine_of(Echo()).submit(request)
