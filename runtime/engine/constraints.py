"""What a request allows, forbids and demands of its next token, as one bit per token.

Grammar, allowed tokens, bad words and the least length all come down to a set of tokens. A set is
packed into int32 words, bit t % 32 of word t // 32 being token t, and goes to the runner's sampler.
It depends on all tokens before, so it is made when those are committed, while the model runs.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import structlog
from llguidance import LLExecutor, LLMatcher
from llguidance.numpy import fill_next_token_bitmask, fill_next_token_bitmask_par
from numpy.typing import NDArray

from runtime.engine.batch import ScheduledBatch, TokenMasks
from runtime.engine.grammars import check_followed
from runtime.engine.sequence import SamplingParams, SequenceKey
from runtime.errors import InvalidSequence

Words = NDArray[np.uint32]

log = structlog.get_logger()


class TokenConstraint:
    """The state of one sequence's constraints; implements `runtime.engine.sequence.Constraint`.

    Args:
        sampling: The sequence's.
        end_token_ids: Tokens that end it, which have to wait for `min_tokens`.
        matcher: Of its grammar, at the beginning and used by nobody else.
        vocab_size: Token ids are below this.
    """

    def __init__(
        self,
        sampling: SamplingParams,
        *,
        end_token_ids: frozenset[int],
        matcher: LLMatcher | None,
        vocab_size: int,
    ) -> None:
        self.matcher = matcher
        self._allowed = _packed(sampling.allowed_token_ids, vocab_size)
        self._is_any_allowed = not sampling.allowed_token_ids
        self._not_ends = ~_packed(end_token_ids, vocab_size)
        self._min_tokens = sampling.min_tokens
        self._bad_words = [(list(word[:-1]), word[-1]) for word in sampling.bad_words]
        self._output: list[int] = []

    @staticmethod
    def is_needed(sampling: SamplingParams) -> bool:
        """Return whether a request restricts its tokens at all."""
        return bool(
            sampling.grammar
            or sampling.allowed_token_ids
            or sampling.bad_words
            or sampling.min_tokens
        )

    def accept(self, token_id: int) -> bool:
        """Take over a token that was chosen; return whether no other could follow it."""
        self._output.append(token_id)
        matcher = self.matcher
        return matcher is not None and matcher.consume_token(token_id) and matcher.is_stopped()

    def restrict(self, words: Words) -> None:
        """Take tokens out of a set, in place.

        Args:
            words: uint32 [num_words], what the grammar allows.

        Raises:
            InvalidSequence: None is left, or the grammar has become too complex to follow.
        """
        matcher = self.matcher
        if matcher is not None:
            check_followed(matcher)
        if not self._is_any_allowed:
            words &= self._allowed
        for beginning, last in self._bad_words:
            if beginning == self._output[len(self._output) - len(beginning) :]:
                words[last // 32] &= ~np.uint32(1 << last % 32)
        if len(self._output) < self._min_tokens:
            longer = words & self._not_ends
            if matcher is None or longer.any():  # a grammar may end before
                words &= self._not_ends
        if not words.any():
            raise InvalidSequence(
                "no token is left to choose: grammar, allowed_token_ids, bad_words and min_tokens "
                "exclude each other"
            )


class MaskMaker:
    """Makes the masks of whole batches, on several threads; one batch at a time.

    Args:
        vocab_size: Token ids are below this.
    """

    def __init__(self, vocab_size: int) -> None:
        self._all = _packed(range(vocab_size), vocab_size)
        self._executor: LLExecutor | None = None  # its threads must not be there when we fork

    def masks(self, batch: ScheduledBatch) -> tuple[TokenMasks | None, dict[SequenceKey, str]]:
        """Return a batch's masks, and which sequences have no token left and why.

        All earlier batches are committed. A sequence that has ended since gets any mask.
        """
        sampled = [item for item in batch.sequences if item.is_sampled]
        found = [
            (row, item.key, item.constraint)
            for row, item in enumerate(sampled)
            if isinstance(item.constraint, TokenConstraint)
        ]
        if not found:
            return None, {}
        words = np.tile(self._all, (len(found), 1))
        has_failed = False
        try:
            self._fill_all([constraint for _, _, constraint in found], words)
        except Exception:  # a defect of the library must not end the step loop
            log.exception("masks_failed", num_sequences=len(found))
            has_failed = True
        errors = {}
        for index, (_, key, constraint) in enumerate(found):
            try:
                if has_failed:
                    self._fill_one(constraint, words, index)
                constraint.restrict(words[index])
            except InvalidSequence as error:
                errors[key] = str(error)
                words[index] = self._all
        rows = tuple(row for row, _, _ in found)
        return TokenMasks(rows=rows, bits=words.data.cast("B")), errors

    def _fill_all(self, constraints: Sequence[TokenConstraint], words: Words) -> None:
        """Write what the grammars allow."""
        matchers = [
            (constraint.matcher, index)
            for index, constraint in enumerate(constraints)
            if constraint.matcher is not None
        ]
        if matchers:
            self._executor = self._executor or LLExecutor()
            fill_next_token_bitmask_par(self._executor, matchers, words.view(np.int32))

    def _fill_one(self, constraint: TokenConstraint, words: Words, index: int) -> None:
        """Write what one grammar allows, whatever is there; raise InvalidSequence if that fails."""
        words[index] = self._all
        if constraint.matcher is None:
            return
        try:
            fill_next_token_bitmask(constraint.matcher, words.view(np.int32), index)
        except Exception as error:  # the same defect
            raise InvalidSequence(
                f"the grammar could not be followed: {type(error).__name__}: {error}"
            ) from error


def _packed(token_ids: Iterable[int], vocab_size: int) -> Words:
    is_in = np.zeros(-(-vocab_size // 32) * 32, dtype=np.uint8)
    is_in[list(token_ids)] = 1
    return np.packbits(is_in, bitorder="little").view(np.uint32)
