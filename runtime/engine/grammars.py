"""Grammars that an output must match: compiled off the step loop, by llguidance.

A grammar is what the wire carries: llguidance's JSON form or its dialect of Lark, made and checked
by the gateway. Here it meets the model's tokens. Compiling takes milliseconds, the first time half
a second more for the tokenizer, so threads do it; the step loop only asks whether they are done.
"""

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from runtime.errors import InvalidSequence

MAX_CACHED = 128  # grammars; a compiled one takes some hundred kilobytes
NUM_THREADS = 2
LIMITS = LLParserLimits(verbose_errors=False)  # else errors repeat the grammar and the output


class GrammarCompiler:
    """Compiles each grammar once, as long as it is in use.

    Args:
        read_tokenizer: Returns the text of the model's tokenizer.json; called in a thread, once.
        vocab_size: Of the model; may be larger than the tokenizer's.
        eos_token_ids: Tokens by which an output that matches may end.
    """

    def __init__(
        self,
        read_tokenizer: Callable[[], str],
        *,
        vocab_size: int,
        eos_token_ids: frozenset[int],
    ) -> None:
        self._read_tokenizer = read_tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = sorted(eos_token_ids)
        self._compiled: OrderedDict[str, Future[LLMatcher]] = OrderedDict()

    def compile(self, grammar: str) -> "Future[LLMatcher]":
        """Return what will be the grammar's matcher, at its beginning; copy it before use.

        The future raises InvalidSequence if no output could match, or the grammar is none.
        """
        future = self._compiled.get(grammar)
        if future is None:
            future = self._compiled[grammar] = self._threads.submit(self._compile, grammar)
            if len(self._compiled) > MAX_CACHED:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(grammar)
        return future

    @cached_property
    def _threads(self) -> ThreadPoolExecutor:
        # The tokenizer is the first thing a thread makes, and a cached one is made only once.
        threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="grammar")
        self._tokenizer = threads.submit(self._make_tokenizer)
        return threads

    def _make_tokenizer(self) -> LLTokenizer:
        return LLTokenizer(
            self._read_tokenizer(), n_vocab=self._vocab_size, eos_token=self._eos_token_ids
        )

    def _compile(self, grammar: str) -> LLMatcher:
        matcher = LLMatcher(self._tokenizer.result(), grammar, log_level=0, limits=LIMITS)
        if matcher.is_error():
            raise InvalidSequence(f"the grammar cannot be followed: {matcher.get_error()}")
        first = matcher.deep_copy()
        first.compute_bitmask()
        if first.is_error():  # e.g. a rule that leads nowhere but to itself
            raise InvalidSequence("the grammar cannot be followed: nothing matches it")
        return matcher
