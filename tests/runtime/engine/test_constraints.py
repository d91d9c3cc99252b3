"""Grammars and other limits on what comes next, in the engine's loop; the runner has no tensors."""

import json
import re
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLExecutor, LLMatcher, LLTokenizer
from llguidance.numpy import fill_next_token_bitmask, fill_next_token_bitmask_par
from numpy.typing import NDArray
from tokenizers import Tokenizer

from runtime.config import EngineConfig
from runtime.engine.engine import Engine
from runtime.engine.grammars import LIMITS, GrammarCompiler, check_followed
from runtime.engine.sequence import FinishedSequence, FinishReason, SamplingParams, SequenceKey
from runtime.errors import InvalidSequence
from tests.fakes.token_runner import TokenRunner, answer
from tests.fakes.tokenizers import byte_fallback_tokenizer, byte_level_tokenizer
from tests.runtime.engine.sequences import new_request

TOKENIZER = byte_level_tokenizer()
VOCAB_SIZE = TOKENIZER.get_vocab_size() + 5  # a model's vocabulary is often larger
EOS = 2  # <|im_end|>
WORD = LLMatcher.grammar_from_regex("[a-f]{3,12}")
OBJECT = LLMatcher.grammar_from_json_schema(
    {
        "type": "object",
        "properties": {"warm": {"type": "boolean"}, "name": {"type": "string", "maxLength": 9}},
        "required": ["warm", "name"],
        "additionalProperties": False,
    },
    overrides={"whitespace_flexible": False},
)


def new_engine(
    *,
    max_in_flight: int = 1,
    num_kv_blocks: int = 64,
    tokenizer: Tokenizer = TOKENIZER,
    compiled: Sequence[str] = (),
) -> tuple[Engine, TokenRunner]:
    runner = TokenRunner(
        vocab_size=VOCAB_SIZE,
        max_in_flight=max_in_flight,
        num_kv_blocks=num_kv_blocks,
        max_model_len=100,
    )
    grammars = GrammarCompiler(
        tokenizer.to_str, vocab_size=VOCAB_SIZE, eos_token_ids=frozenset({EOS})
    )
    for grammar in compiled:  # so that all sequences begin together
        grammars.compile(grammar).result()
    config = EngineConfig(block_size=4, max_num_batched_tokens=64)
    return Engine(config, runner, frozenset({EOS}), grammars), runner


def run(engine: Engine) -> tuple[dict[int, list[int]], dict[int, FinishedSequence]]:
    tokens: defaultdict[int, list[int]] = defaultdict(list)
    finished = {}
    while engine.has_work():
        if engine.spare_s() > 0:
            time.sleep(engine.spare_s())
            continue
        result = engine.step()
        for key, token_id in result.tokens:
            tokens[key.sequence_id].append(token_id)
        finished.update({end.key.sequence_id: end for end in result.finished})
    assert engine.figures().num_free_kv_blocks == engine.figures().num_kv_blocks
    return dict(tokens), finished


def generate(
    sampling: Mapping[int, SamplingParams], *, max_in_flight: int = 2, num_kv_blocks: int = 64
) -> tuple[dict[int, list[int]], dict[int, FinishedSequence]]:
    engine, _ = new_engine(max_in_flight=max_in_flight, num_kv_blocks=num_kv_blocks)
    for id, params in sampling.items():
        engine.submit(new_request(id, [id, id + 1, id + 2], sampling=params))
    return run(engine)


def text_of(token_ids: Sequence[int]) -> str:
    text: str = TOKENIZER.decode([token_id for token_id in token_ids if token_id != EOS])
    return text


@pytest.mark.parametrize("max_in_flight", [1, 2])
def test_output_matches_its_grammar_and_ends_with_it(max_in_flight: int) -> None:
    params = SamplingParams(max_tokens=60, grammar=OBJECT)
    tokens, finished = generate(dict.fromkeys(range(1, 9), params), max_in_flight=max_in_flight)
    for id, token_ids in tokens.items():
        value = json.loads(text_of(token_ids))
        assert set(value) == {"warm", "name"}
        assert text_of(token_ids) == json.dumps(value, separators=(",", ":"), ensure_ascii=False)
        assert finished[id].reason is FinishReason.STOP
        assert finished[id].num_output_tokens == len(token_ids)


def test_overlap_neighbours_and_preemption_change_no_constrained_output() -> None:
    grammars = [WORD, OBJECT, "", WORD, OBJECT]
    params = {
        id: SamplingParams(max_tokens=40, grammar=grammar, ignore_eos=not grammar)
        for id, grammar in enumerate(grammars, start=1)
    }
    alone = {id: generate({id: one}, max_in_flight=1)[0][id] for id, one in params.items()}
    together, _ = generate(params, max_in_flight=2)
    assert together == alone
    engine, _ = new_engine(max_in_flight=2, num_kv_blocks=12, compiled=[WORD, OBJECT])
    for id, one in params.items():
        engine.submit(new_request(id, [id, id + 1, id + 2], sampling=one))
    squeezed, _ = run(engine)
    assert engine.figures().num_preemptions > 0
    assert squeezed == alone
    assert alone[3] == answer([3, 4, 5], 40, VOCAB_SIZE)


def test_unconstrained_batches_are_not_held_back() -> None:
    engine, runner = new_engine(max_in_flight=2)
    engine.submit(new_request(1, [1, 2, 3], max_tokens=9))
    run(engine)
    assert not any(batch.is_constrained for batch in runner.batches)


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_a_complete_grammar_ends_the_sequence_without_another_token(ignore_eos: bool) -> None:
    params = SamplingParams(
        grammar=LLMatcher.grammar_from_regex("yes"), max_tokens=20, ignore_eos=ignore_eos
    )
    tokens, finished = generate({1: params})
    assert text_of(tokens[1]) == "yes"
    assert tokens[1][-1] != EOS
    assert finished[1].reason is FinishReason.STOP


def test_a_grammar_that_could_go_on_ends_with_the_models_end_or_the_limit() -> None:
    params = SamplingParams(grammar=LLMatcher.grammar_from_regex("a*"), max_tokens=200)
    tokens, finished = generate(dict.fromkeys(range(1, 30), replace_limit(params, 9)))
    ends = {finished[id].reason for id in tokens}
    assert ends <= {FinishReason.STOP, FinishReason.LENGTH}
    assert all(set(text_of(token_ids)) <= {"a"} for token_ids in tokens.values())


def replace_limit(params: SamplingParams, max_tokens: int) -> SamplingParams:
    return SamplingParams(grammar=params.grammar, max_tokens=max_tokens)


def test_min_tokens_holds_back_every_token_that_ends() -> None:
    stops = frozenset(range(0, VOCAB_SIZE, 2))
    early, _ = generate({1: SamplingParams(max_tokens=30, stop_token_ids=stops)})
    params = SamplingParams(max_tokens=30, stop_token_ids=stops, min_tokens=12)
    tokens, finished = generate({1: params})
    assert len(early[1]) < 12 <= len(tokens[1])
    assert not set(tokens[1][:12]) & (stops | {EOS})
    assert finished[1].reason is FinishReason.STOP


def test_min_tokens_does_not_break_a_grammar() -> None:
    params = SamplingParams(
        grammar=LLMatcher.grammar_from_regex("(yes)?"), max_tokens=9, min_tokens=5
    )
    tokens, finished = generate(dict.fromkeys(range(1, 9), params))
    assert {text_of(token_ids) for token_ids in tokens.values()} == {"yes"}
    assert {end.reason for end in finished.values()} == {FinishReason.STOP}


def test_only_allowed_tokens_are_chosen() -> None:
    allowed = frozenset({40, 41, 300, VOCAB_SIZE - 1})
    tokens, _ = generate({1: SamplingParams(max_tokens=40, allowed_token_ids=allowed)})
    assert len(tokens[1]) == 40
    assert set(tokens[1]) <= allowed


@settings(max_examples=50)
@given(
    st.lists(st.lists(st.sampled_from([40, 41, 42]), min_size=1, max_size=3), max_size=6),
    st.integers(1, 9),
)
def test_bad_words_never_appear(words: list[list[int]], id: int) -> None:
    allowed = frozenset({40, 41, 42, 43})
    params = SamplingParams(
        max_tokens=40, allowed_token_ids=allowed, bad_words=tuple(map(tuple, words))
    )
    tokens, _ = generate({id: params})
    written = "".join(map(chr, tokens[id]))
    assert len(written) == 40
    assert not any("".join(map(chr, word)) in written for word in words)


def test_constraints_that_exclude_each_other_refuse_one_sequence_only() -> None:
    params = {
        1: SamplingParams(grammar=WORD, allowed_token_ids=frozenset({300}), max_tokens=20),
        2: SamplingParams(max_tokens=20, ignore_eos=True),
        3: SamplingParams(grammar=WORD, max_tokens=20),
    }
    tokens, finished = generate(params)
    assert finished[1].reason is FinishReason.REFUSED
    assert "exclude each other" in finished[1].error
    assert 1 not in tokens
    assert tokens[2] == answer([2, 3, 4], 20, VOCAB_SIZE)
    assert re.fullmatch("[a-f]{3,12}", text_of(tokens[3]))


ENDLESS = LLMatcher.grammar_from_json_schema(
    {"$defs": {"x": {"$ref": "#/$defs/x"}}, "$ref": "#/$defs/x"}
)


@pytest.mark.parametrize(
    "grammar", ["start: nowhere", "{", '{"grammars": [{"regex": "("}]}', ENDLESS]
)
def test_a_broken_grammar_is_refused_before_it_runs(grammar: str) -> None:
    params = {1: SamplingParams(grammar=grammar), 2: SamplingParams(max_tokens=5, ignore_eos=True)}
    tokens, finished = generate(params)
    assert finished[1].reason is FinishReason.REFUSED
    assert finished[1].error.startswith("the grammar cannot be followed")
    assert list(tokens) == [2]


def engine_with(grammars: GrammarCompiler) -> Engine:
    runner = TokenRunner(vocab_size=VOCAB_SIZE)
    return Engine(EngineConfig(block_size=4), runner, frozenset({EOS}), grammars)


def follow_word(engine: Engine) -> FinishedSequence:
    engine.submit(new_request(1, [1], sampling=SamplingParams(grammar=WORD)))
    _, finished = run(engine)
    return finished[1]


def test_a_tokenizer_that_cannot_be_read_is_no_fault_of_the_request_and_is_read_again() -> None:
    texts = iter(["no tokenizer", TOKENIZER.to_str()])
    engine = engine_with(
        GrammarCompiler(lambda: next(texts), vocab_size=VOCAB_SIZE, eos_token_ids=frozenset({EOS}))
    )
    end = follow_word(engine)
    assert end.reason is FinishReason.ERROR
    assert "cannot be constrained" in end.error
    assert follow_word(engine).reason is FinishReason.STOP


def test_end_tokens_outside_of_the_vocabulary_count_for_nothing() -> None:
    def ending_with(*token_ids: int) -> Engine:
        return engine_with(
            GrammarCompiler(
                TOKENIZER.to_str, vocab_size=VOCAB_SIZE, eos_token_ids=frozenset(token_ids)
            )
        )

    assert follow_word(ending_with(EOS, VOCAB_SIZE, -1)).reason is FinishReason.STOP
    end = follow_word(ending_with(VOCAB_SIZE))
    assert end.reason is FinishReason.REFUSED
    assert "no token that ends" in end.error


def test_a_grammar_that_grows_too_slow_to_follow_is_given_up() -> None:
    ambiguous = LLMatcher(
        LLTokenizer(TOKENIZER.to_str(), n_vocab=VOCAB_SIZE, eos_token=[EOS]),
        "start: s\ns: s s s | s s | /[a-z]/ | /[a-z ]/ |",
        limits=LIMITS,
    )
    [token_id] = TOKENIZER.encode("a").ids
    for _ in range(200):  # of which each takes longer than the one before
        ambiguous.compute_bitmask()
        ambiguous.consume_token(token_id)
    with pytest.raises(InvalidSequence, match="Too many items") as refusal:
        check_followed(ambiguous)
    assert "\n" not in str(refusal.value)


def test_a_panic_of_the_library_is_not_told_to_clients() -> None:
    words = "panic: assertion failed at /build/lib.rs:7\n<backtrace>"
    broken: Any = SimpleNamespace(is_error=lambda: True, get_error=lambda: words)
    with pytest.raises(InvalidSequence, match="fails at it") as refusal:
        check_followed(broken)
    assert "lib.rs" not in str(refusal.value)


def test_an_engine_without_a_tokenizer_says_so() -> None:
    engine = Engine(EngineConfig(block_size=4), TokenRunner(), frozenset())
    with pytest.raises(InvalidSequence, match="no tokenizer"):
        engine.submit(new_request(1, [1], sampling=SamplingParams(grammar=WORD)))
    assert not engine.has_work()


def test_cancelling_while_the_grammar_is_compiled_ends_the_sequence() -> None:
    engine, runner = new_engine()
    engine.submit(new_request(1, [1], sampling=SamplingParams(grammar=WORD)))
    with pytest.raises(InvalidSequence, match="live already"):
        engine.submit(new_request(1, [1], max_tokens=3))
    assert engine.figures().num_waiting == 1
    engine.cancel(SequenceKey(1, 1))
    _, finished = run(engine)
    assert finished[1].reason is FinishReason.CANCELLED
    assert runner.batches == []


def test_a_batch_that_raises_still_follows_its_grammars() -> None:
    engine, runner = new_engine(max_in_flight=2)
    runner.fail = lambda batch: "too many" if len(batch.sequences) > 1 else None
    for id in (1, 2, 3):
        engine.submit(new_request(id, [id, id + 1, id + 2], sampling=SamplingParams(grammar=WORD)))
    tokens, _ = run(engine)
    alone = {id: generate({id: SamplingParams(grammar=WORD)})[0][id] for id in tokens}
    assert tokens == alone


def test_sentencepiece_tokenizers_are_followed() -> None:
    tokenizer = byte_fallback_tokenizer()
    engine, _ = new_engine(tokenizer=tokenizer)
    grammar = LLMatcher.grammar_from_regex("the (low|café 東)")
    engine.submit(new_request(1, [1, 2], sampling=SamplingParams(grammar=grammar, max_tokens=30)))
    tokens, finished = run(engine)
    assert tokenizer.decode(tokens[1]) in ("the low", "the café 東")
    assert finished[1].reason is FinishReason.STOP


def test_a_grammar_that_the_library_fails_at_ends_its_own_sequence_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opening = TOKENIZER.encode("{").ids

    def check(matcher: LLMatcher) -> None:
        if matcher.validate_tokens(opening):
            raise ValueError("a defect")

    def fill_all(
        executor: LLExecutor, matchers: list[tuple[LLMatcher, int]], masks: NDArray[np.int32]
    ) -> None:
        for matcher, index in matchers:
            masks[index] = 0  # as far as it came
            check(matcher)
        fill_next_token_bitmask_par(executor, matchers, masks)

    def fill_one(matcher: LLMatcher, masks: NDArray[np.int32], index: int) -> None:
        check(matcher)
        fill_next_token_bitmask(matcher, masks, index)

    params = {
        1: SamplingParams(grammar=WORD, max_tokens=20),
        2: SamplingParams(grammar=OBJECT, max_tokens=20),
        3: SamplingParams(max_tokens=20, allowed_token_ids=frozenset({40, 41})),
        4: SamplingParams(grammar=WORD, max_tokens=20),
        5: SamplingParams(max_tokens=20, ignore_eos=True),
    }
    expected, _ = generate({id: one for id, one in params.items() if id != 2})
    monkeypatch.setattr("runtime.engine.constraints.fill_next_token_bitmask_par", fill_all)
    monkeypatch.setattr("runtime.engine.constraints.fill_next_token_bitmask", fill_one)
    engine, _ = new_engine(max_in_flight=2, compiled=[WORD, OBJECT])
    for id, one in params.items():
        engine.submit(new_request(id, [id, id + 1, id + 2], sampling=one))
    tokens, finished = run(engine)
    assert finished[2].reason is FinishReason.REFUSED
    assert "the grammar could not be followed: ValueError: a defect" in finished[2].error
    assert tokens == expected
