from collections import defaultdict

import pytest
from structlog.testing import capture_logs

from runtime.config import EngineConfig
from runtime.engine.batch import SampledTokens, ScheduledBatch
from runtime.engine.engine import Engine
from runtime.engine.sequence import (
    FinishedSequence,
    FinishReason,
    SamplingParams,
    SequenceKey,
)
from runtime.errors import InvalidSequence
from tests.fakes.token_runner import TokenRunner, answer
from tests.runtime.engine.sequences import new_request

VOCAB_SIZE = 50


MAX_IN_FLIGHT = 1


@pytest.fixture(autouse=True, params=[1, 2], ids=["in step", "overlapped"])
def _max_in_flight(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run every test with a runner that is waited for, and with one that is kept ahead."""
    monkeypatch.setattr(f"{__name__}.MAX_IN_FLIGHT", request.param)


def new_engine(runner: TokenRunner, *, eos: frozenset[int] = frozenset()) -> Engine:
    runner.max_in_flight = MAX_IN_FLIGHT
    return Engine(EngineConfig(block_size=4), runner, eos)


def run(engine: Engine) -> tuple[dict[int, list[int]], dict[int, FinishedSequence]]:
    """Step until nothing is left; return tokens and ends by sequence id."""
    tokens: defaultdict[int, list[int]] = defaultdict(list)
    finished: dict[int, FinishedSequence] = {}
    while engine.has_work():
        result = engine.step()
        for key, token_id in result.tokens:
            tokens[key.sequence_id].append(token_id)
        finished |= {end.key.sequence_id: end for end in result.finished}
    return dict(tokens), finished


def test_answer_is_that_of_the_sequence_alone() -> None:
    engine = new_engine(TokenRunner())
    prompts = {1: [1, 2, 3], 2: [1, 2, 3, 4, 5, 6], 3: [9]}
    for id, prompt in prompts.items():
        engine.submit(new_request(id, prompt, max_tokens=6))
    tokens, finished = run(engine)
    assert tokens == {id: answer(prompt, 6, VOCAB_SIZE) for id, prompt in prompts.items()}
    assert {end.reason for end in finished.values()} == {FinishReason.LENGTH}


def test_end_of_sequence_token_is_reported_and_stops() -> None:
    first, second, *_ = answer([1, 2, 3], 5, VOCAB_SIZE)
    engine = new_engine(TokenRunner(), eos=frozenset({second}))
    engine.submit(new_request(1, [1, 2, 3], max_tokens=5))
    tokens, finished = run(engine)
    assert tokens == {1: [first, second]}
    assert finished[1].reason is FinishReason.STOP
    assert finished[1].num_output_tokens == 2


def test_ignored_end_of_sequence_token_is_an_ordinary_one() -> None:
    expected = answer([1, 2, 3], 5, VOCAB_SIZE)
    engine = new_engine(TokenRunner(), eos=frozenset(expected))
    sampling = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
    engine.submit(new_request(1, [1, 2, 3], sampling=sampling))
    assert run(engine)[0] == {1: expected}


def test_stop_token_of_a_request_stops_even_if_it_ignores_the_models_own() -> None:
    expected = answer([1, 2, 3], 5, VOCAB_SIZE)
    stop = frozenset({expected[1]})
    sampling = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True, stop_token_ids=stop)
    engine = new_engine(TokenRunner())
    engine.submit(new_request(1, [1, 2, 3], sampling=sampling))
    tokens, finished = run(engine)
    assert tokens == {1: expected[:2]}
    assert finished[1].reason is FinishReason.STOP


def test_context_limit_ends_a_sequence_by_length() -> None:
    engine = new_engine(TokenRunner(max_model_len=8))
    engine.submit(new_request(1, [1, 2, 3], max_tokens=1 << 31))
    _, finished = run(engine)
    assert finished[1].reason is FinishReason.LENGTH
    assert finished[1].num_output_tokens == 5


@pytest.mark.parametrize(
    ("prompt", "sampling", "match"),
    [
        ([], SamplingParams(), "empty"),
        ([1] * 32, SamplingParams(), "max_model_len=32"),
        ([1, 50], SamplingParams(), "50 is not in the vocabulary"),
        ([-1], SamplingParams(), "-1 is not in the vocabulary"),
        ([1], SamplingParams(temperature=-0.1), "temperature is -0.1"),
        ([1], SamplingParams(temperature=float("nan")), "temperature is nan"),
        ([1], SamplingParams(temperature=float("inf")), "temperature is inf"),
        ([1], SamplingParams(top_p=0.0), "top_p is 0.0"),
        ([1], SamplingParams(top_p=1.5), "top_p is 1.5"),
        ([1], SamplingParams(top_p=float("nan")), "top_p is nan"),
        ([1], SamplingParams(top_k=-1), "top_k is -1"),
        ([1], SamplingParams(min_p=1.1), "min_p is 1.1"),
        ([1], SamplingParams(max_tokens=0), "max_tokens is 0"),
        ([1], SamplingParams(seed=-1), "seed is -1"),
        ([1], SamplingParams(seed=1 << 64), "seed is 18446744073709551616"),
        ([1], SamplingParams(repetition_penalty=0.0), "repetition_penalty is 0.0"),
        ([1], SamplingParams(repetition_penalty=1e-46), "repetition_penalty is 1e-46"),
        ([1], SamplingParams(repetition_penalty=1e39), "repetition_penalty is 1e.39"),
        ([1], SamplingParams(frequency_penalty=float("nan")), "frequency_penalty is nan"),
        ([1], SamplingParams(presence_penalty=float("inf")), "presence_penalty is inf"),
        ([1], SamplingParams(logit_bias={50: 1.0}), r"logit_bias\[50\] is 1.0"),
        ([1], SamplingParams(logit_bias={1: float("nan")}), r"logit_bias\[1\] is nan"),
        ([1], SamplingParams(logit_bias=dict.fromkeys(range(1025), 0.0)), "at most 1024 tokens"),
        ([1], SamplingParams(num_logprobs=21), "num_logprobs is 21"),
    ],
)
def test_request_that_can_never_run_is_refused(
    prompt: list[int], sampling: SamplingParams, match: str
) -> None:
    engine = new_engine(TokenRunner())
    with pytest.raises(InvalidSequence, match=match):
        engine.submit(new_request(1, prompt, sampling=sampling))
    assert not engine.has_work()


def test_sequence_that_can_never_fit_the_cache_is_refused() -> None:
    engine = new_engine(TokenRunner(num_kv_blocks=3))
    engine.submit(new_request(1, [1] * 8, max_tokens=5))  # the last token is never run
    with pytest.raises(InvalidSequence, match="do not fit the KV cache of 3 blocks"):
        engine.submit(new_request(2, [1] * 8, max_tokens=6))
    assert run(engine)[0] == {1: answer([1] * 8, 5, VOCAB_SIZE)}


def test_key_of_a_live_sequence_is_refused() -> None:
    engine = new_engine(TokenRunner())
    engine.submit(new_request(1, [1]))
    with pytest.raises(InvalidSequence, match="live already"):
        engine.submit(new_request(1, [2]))


def test_sequence_the_runner_cannot_run_fails_alone() -> None:
    runner = TokenRunner()
    runner.fail = lambda batch: (
        "bad luck" if any(item.key.sequence_id == 2 for item in batch.sequences) else None
    )
    engine = new_engine(runner)
    for id in (1, 2, 3):
        engine.submit(new_request(id, [id, id], max_tokens=3))
    tokens, finished = run(engine)
    assert tokens == {id: answer([id, id], 3, VOCAB_SIZE) for id in (1, 3)}
    assert finished[2].reason is FinishReason.ERROR
    assert "RuntimeError: bad luck" in finished[2].error


class FaultyRunner(TokenRunner):
    """Reports a fault in every sequence with this id, as the runner does for NaN."""

    faulty_id = 2

    def launch(self, batch: ScheduledBatch) -> SampledTokens:
        sampled = super().launch(batch).wait()
        faults = {
            index: "not finite"
            for index, item in enumerate(batch.sequences)
            if item.key.sequence_id == self.faulty_id
        }
        return SampledTokens(token_ids=sampled.token_ids, faults=faults)


def test_faulty_sequence_gets_no_token_and_its_content_is_not_reused() -> None:
    engine = new_engine(FaultyRunner())
    engine.submit(new_request(1, [5], max_tokens=3))
    engine.submit(new_request(2, [6] * 9, max_tokens=3))
    tokens, finished = run(engine)
    assert list(tokens) == [1]
    assert (finished[2].reason, finished[2].error) == (FinishReason.ERROR, "not finite")
    engine.submit(new_request(3, [6] * 9, max_tokens=3))
    assert run(engine)[1][3].num_cached_tokens == 0


def test_engine_whose_runner_always_raises_fails_sequences_and_goes_on() -> None:
    runner = TokenRunner()
    runner.fail = lambda batch: "out of luck"
    engine = new_engine(runner)
    for id in (1, 2):
        engine.submit(new_request(id, [id]))
    assert {end.reason for end in run(engine)[1].values()} == {FinishReason.ERROR}
    runner.fail = lambda batch: None
    engine.submit(new_request(3, [3]))
    assert run(engine)[0] == {3: answer([3], 4, VOCAB_SIZE)}


def test_cancelled_stream_ends_all_its_sequences_and_no_others() -> None:
    engine = new_engine(TokenRunner())
    for id, stream in ((1, 1), (2, 2), (3, 1)):
        engine.submit(new_request(id, [id], stream=stream))
    engine.step()
    engine.cancel_stream(1)
    assert engine.figures().num_running == 1
    tokens, finished = run(engine)
    assert list(tokens) == [2]
    assert finished[1].reason is finished[3].reason is FinishReason.CANCELLED


def test_cancelled_sequence_frees_its_blocks_before_the_next_step() -> None:
    runner = TokenRunner(num_kv_blocks=3)
    engine = new_engine(runner)
    engine.submit(new_request(1, [1] * 8, max_tokens=5))
    engine.submit(new_request(2, [2] * 8, max_tokens=5))
    engine.step()
    engine.cancel(SequenceKey(1, 1))
    results = [engine.step() for _ in range(MAX_IN_FLIGHT)]
    assert [key.sequence_id for result in results for key, _ in result.tokens] == [2]
    assert [end.key.sequence_id for result in results for end in result.finished] == [1]


def test_first_token_says_how_much_of_the_prompt_was_cached() -> None:
    engine = new_engine(TokenRunner())
    for id in (1, 2):
        engine.submit(new_request(id, [1] * 9, max_tokens=3))
        started: list[dict[int, int]] = []
        while engine.has_work():
            result = engine.step()
            started += [{key.sequence_id: cached for key, cached in result.started.items()}]
            assert set(result.started) <= {key for key, _ in result.tokens}
        assert [entry for entry in started if entry] == [{id: 8 * (id - 1)}]


def test_equal_prompts_compute_what_they_share_once() -> None:
    runner = TokenRunner(num_kv_blocks=200, max_model_len=128)
    engine = new_engine(runner)
    prompt = [index % VOCAB_SIZE for index in range(64)]
    for id in range(8):
        engine.submit(new_request(id, prompt, max_tokens=3))
    tokens, finished = run(engine)
    assert tokens == dict.fromkeys(range(8), answer(prompt, 3, VOCAB_SIZE))
    assert [finished[id].num_cached_tokens for id in range(8)] == [0, *[60] * 7]
    num_computed = sum(batch.num_tokens for batch in runner.batches)
    assert num_computed == 64 + 7 * 4 + 8 * 2


def test_figures_follow_the_load() -> None:
    engine = new_engine(TokenRunner(num_kv_blocks=4))
    engine.submit(new_request(1, [1] * 9, max_tokens=3))
    engine.submit(new_request(2, [1] * 9, max_tokens=3))
    engine.step()
    figures = engine.figures()
    assert (figures.num_running, figures.num_waiting) == (1, 1)
    assert (figures.num_kv_blocks, figures.num_free_kv_blocks) == (4, 1)
    run(engine)
    figures = engine.figures()
    assert (figures.num_running, figures.num_waiting, figures.num_free_kv_blocks) == (0, 0, 4)
    assert (figures.num_prompt_tokens, figures.num_cached_prompt_tokens) == (18, 8)
    assert figures.num_output_tokens == 6
    assert figures.num_steps == 6


def test_reset_cache_forgets_prefixes_and_takes_the_new_number_of_blocks() -> None:
    runner = TokenRunner()
    engine = new_engine(runner)
    engine.submit(new_request(1, [1] * 9))
    run(engine)
    runner.num_kv_blocks = 5
    engine.reset_cache()
    assert engine.figures().num_kv_blocks == 5
    engine.submit(new_request(2, [1] * 9))
    assert run(engine)[1][2].num_cached_tokens == 0


def test_step_is_no_longer_than_the_runner_finds_useful() -> None:
    runner = TokenRunner(max_step_tokens=4)
    engine = new_engine(runner)
    engine.submit(new_request(1, [1] * 9))
    run(engine)
    assert max(batch.num_tokens for batch in runner.batches) == 4


def test_unseeded_sequences_get_different_seeds() -> None:
    runner = TokenRunner()
    engine = new_engine(runner)
    for id in (1, 2):
        engine.submit(new_request(id, [id], sampling=SamplingParams(max_tokens=1)))
    engine.submit(new_request(3, [3], sampling=SamplingParams(max_tokens=1, seed=11)))
    engine.step()
    seeds = [item.seed for item in runner.batches[0].sequences]
    assert seeds[0] != seeds[1]
    assert seeds[2] == 11


@pytest.mark.parametrize("failing", range(1, 6))
def test_a_batch_that_fails_when_its_tokens_are_chosen_changes_no_answer(failing: int) -> None:
    runner = TokenRunner()
    failures = iter([False] * failing + [True])
    runner.fail_late = lambda batch: "out of memory" if next(failures, False) else None
    engine = new_engine(runner)
    prompts = {1: [1, 2, 3], 2: [4, 5]}
    for id, prompt in prompts.items():
        engine.submit(new_request(id, prompt, max_tokens=6))
    tokens, finished = run(engine)
    assert tokens == {id: answer(prompt, 6, VOCAB_SIZE) for id, prompt in prompts.items()}
    assert {end.reason for end in finished.values()} == {FinishReason.LENGTH}
    assert next(failures, None) is None, "it has failed"


@pytest.mark.parametrize("stop", [-1, VOCAB_SIZE])
def test_a_stop_token_outside_the_vocabulary_is_refused(stop: int) -> None:
    engine = new_engine(TokenRunner())
    sampling = SamplingParams(max_tokens=4, min_tokens=2, stop_token_ids=frozenset({stop}))
    with pytest.raises(InvalidSequence, match="stop_token_ids"):
        engine.submit(new_request(1, [1], sampling=sampling))


def test_a_models_end_token_outside_its_vocabulary_harms_nobody() -> None:
    engine = new_engine(TokenRunner(), eos=frozenset({VOCAB_SIZE, 10 * VOCAB_SIZE}))
    sampling = SamplingParams(temperature=0.0, max_tokens=4, min_tokens=2)
    engine.submit(new_request(1, [1], sampling=sampling))
    assert run(engine)[0] == {1: answer([1], 4, VOCAB_SIZE)}


def test_preemptions_are_logged_now_and_then() -> None:
    engine = new_engine(TokenRunner(num_kv_blocks=4))
    for id in range(4):
        engine.submit(new_request(id, [id] * 4, max_tokens=8))
    with capture_logs() as logs:
        run(engine)
    told = [entry for entry in logs if entry["event"] == "preempted"]
    assert engine.figures().num_preemptions > len(told) == 1
    assert told[0]["num_times"] > 0


@pytest.mark.parametrize("is_late", [True, False])
def test_an_engine_whose_device_is_lost_does_not_go_on(*, is_late: bool) -> None:
    runner = TokenRunner()
    engine = new_engine(runner)
    engine.submit(new_request(1, [1, 2, 3], max_tokens=8))
    engine.step()
    runner.is_lost = True
    if is_late:
        runner.fail_late = lambda batch: "CUDA error"
    else:
        runner.fail = lambda batch: "CUDA error"
    with pytest.raises(RuntimeError, match="illegal memory access"):
        run(engine)
