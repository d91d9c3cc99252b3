"""Grammars that an output must match: compiled off the step loop, by llguidance.

A grammar is what the wire carries: llguidance's JSON form or its dialect of Lark, made and checked
by the gateway. Here it meets the model's tokens. Compiling takes milliseconds, the first time half
a second more for the tokenizer, so threads do it; the step loop only asks whether they are done.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property

import structlog
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from runtime.errors import InvalidSequence

MAX_CACHED = 128  # grammars; a compiled one takes some hundred kilobytes
NUM_THREADS = 2
LIMITS = LLParserLimits(
    verbose_errors=False,  # else errors repeat the grammar and the output
    step_max_items=10_000,  # by default 50,000, which hold the step loop for half a second a token
)

log = structlog.get_logger()


class GrammarCompiler:
    """Compiles each grammar once, as long as it is in use.

    Args:
        read_tokenizer: Returns the text of the model's tokenizer.json; called in a thread, once.
        vocab_size: Of the model; may be larger than the tokenizer's.
        eos_token_ids: Tokens by which an output that matches may end; those outside of the
            vocabulary count for nothing.
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
        self._eos_token_ids = sorted(id for id in eos_token_ids if 0 <= id < vocab_size)
        self._compiled: OrderedDict[str, Future[LLMatcher]] = OrderedDict()
        self._tokenizer: LLTokenizer | None = None
        self._making_tokenizer = threading.Lock()

    def compile(self, grammar: str) -> "Future[LLMatcher]":
        """Return what will be the grammar's matcher, at its beginning; copy it before use.

        The future raises InvalidSequence if no output could match, or the grammar is none. What
        else it raises is no fault of the grammar's, which is compiled anew the next time.
        """
        future = self._compiled.get(grammar)
        if future is None or _has_failed(future):
            future = self._compiled[grammar] = self._threads.submit(self._compile, grammar)
            if len(self._compiled) > MAX_CACHED:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(grammar)
        return future

    @cached_property
    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="grammar")

    def _get_tokenizer(self) -> LLTokenizer:
        with self._making_tokenizer:
            if self._tokenizer is None:
                self._tokenizer = LLTokenizer(
                    self._read_tokenizer(), n_vocab=self._vocab_size, eos_token=self._eos_token_ids
                )
            return self._tokenizer

    def _compile(self, grammar: str) -> LLMatcher:
        if not self._eos_token_ids:
            raise InvalidSequence(
                "the model has no token that ends an output, so it can follow no grammar"
            )
        matcher = LLMatcher(self._get_tokenizer(), grammar, log_level=0, limits=LIMITS)
        check_followed(matcher)
        first = matcher.deep_copy()
        first.compute_bitmask()
        check_followed(first)  # e.g. a rule that leads nowhere but to itself
        return matcher


def check_followed(matcher: LLMatcher) -> None:
    """Check that a grammar can be followed from where its output is.

    Raises:
        InvalidSequence: It is none, nothing matches it, or it is too large or too ambiguous.
    """
    if not matcher.is_error():
        return
    reason = matcher.get_error().partition("\n")[0]
    if "panic" in reason:  # the library's own words are for its authors
        log.error("grammar_failed", reason=reason)
        reason = "the library that compiles it fails at it; a smaller or simpler one may do"
    raise InvalidSequence(f"the grammar cannot be followed: {reason}")


def _has_failed(future: "Future[LLMatcher]") -> bool:
    if not future.done() or future.cancelled():
        return False
    error = future.exception()
    return error is not None and not isinstance(error, InvalidSequence)
