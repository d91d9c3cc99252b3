"""What has to be there before a sequence can be scheduled: the constraints on its output."""

from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass

import structlog
from llguidance import LLMatcher

from runtime.engine.constraints import TokenConstraint
from runtime.engine.grammars import GrammarCompiler
from runtime.engine.sequence import Sequence, SequenceKey
from runtime.errors import InvalidSequence

log = structlog.get_logger()


@dataclass(slots=True, kw_only=True)
class _Preparing:
    sequence: Sequence
    grammar: Future[LLMatcher] | None
    is_given_up: bool = False

    @property
    def is_done(self) -> bool:
        return self.is_given_up or self.grammar is None or self.grammar.done()


class Preparation:
    """Sequences that wait for their grammars; others pass at once.

    Args:
        grammars: Compiles them; None refuses them.
        vocab_size: Token ids are below this.
    """

    def __init__(self, grammars: GrammarCompiler | None, vocab_size: int) -> None:
        self._grammars = grammars
        self._vocab_size = vocab_size
        self._preparing: dict[SequenceKey, _Preparing] = {}

    def __len__(self) -> int:
        return len(self._preparing)

    @property
    def has_prepared(self) -> bool:
        """Whether a sequence is ready to be taken."""
        return any(item.is_done for item in self._preparing.values())

    def keys(self) -> list[SequenceKey]:
        """Return the keys of all sequences that are here."""
        return list(self._preparing)

    def add(self, sequence: Sequence) -> None:
        """Take a sequence in, and start compiling its grammar.

        Raises:
            InvalidSequence: It has a grammar and nothing here compiles one.
        """
        grammar = None
        if sequence.sampling.grammar:
            if self._grammars is None:
                raise InvalidSequence("this engine has no tokenizer, so it follows no grammar")
            grammar = self._grammars.compile(sequence.sampling.grammar)
        self._preparing[sequence.key] = _Preparing(sequence=sequence, grammar=grammar)

    def give_up(self, key: SequenceKey) -> None:
        """Stop waiting for a sequence's grammar, if it is here."""
        if key in self._preparing:
            self._preparing[key].is_given_up = True

    def take_prepared(self) -> Iterator[tuple[Sequence, Exception | None]]:
        """Yield sequences that need no longer be waited for, and why one cannot run.

        That is its own fault if it is InvalidSequence.
        """
        for key in [key for key, item in self._preparing.items() if item.is_done]:
            item = self._preparing.pop(key)
            error = None if item.is_given_up else self._constrain(item)
            yield item.sequence, error

    def _constrain(self, item: _Preparing) -> Exception | None:
        """Give a sequence its constraint; return why that cannot be, if so."""
        sequence = item.sequence
        if not TokenConstraint.is_needed(sequence.sampling):
            return None
        try:
            sequence.constraint = TokenConstraint(
                sequence.sampling,
                end_token_ids=sequence.stop_token_ids,
                matcher=None if item.grammar is None else item.grammar.result().deep_copy(),
                vocab_size=self._vocab_size,
            )
        except InvalidSequence as error:
            return error
        except Exception as error:  # a tokenizer that cannot be read, or a defect
            log.exception("constraint_failed", **sequence.key._asdict())
            return error
        return None
