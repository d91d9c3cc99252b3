"""Prompts with a suffix, for models that were trained to fill in what is between.

The order is prefix, suffix, middle (Bavarian et al., Efficient Training of Language Models to Fill
in the Middle, 2022, section 3); model families differ in their markers only.
"""

from dataclasses import dataclass
from typing import Self

from tokenizers import Tokenizer

_BAR = "\N{FULLWIDTH VERTICAL LINE}"
_FAMILIES = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen-Coder, CodeGemma
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder, Granite
    (f"<{_BAR}fim▁begin{_BAR}>", f"<{_BAR}fim▁hole{_BAR}>", f"<{_BAR}fim▁end{_BAR}>"),  # DeepSeek
)
_ENDS = (
    "<|fim_pad|>", "<fim_pad>", "<|file_sep|>", "<|file_separator|>", "<file_sep>", "<|repo_name|>",
    "<repo_name>",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Infill:
    """How a model is asked to fill in.

    Attributes:
        markers: What goes before the prefix, before the suffix and before the answer.
        end_token_ids: What a model writes when it goes on past the middle; its own end is not
            among them.
    """

    markers: tuple[str, str, str]
    end_token_ids: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Self | None:
        """Return how a tokenizer's model is asked; None if it has no such markers."""
        for markers in _FAMILIES:
            if all(tokenizer.token_to_id(marker) is not None for marker in markers):
                ids = (tokenizer.token_to_id(end) for end in (*markers, *_ENDS))
                known = tuple(token_id for token_id in ids if token_id is not None)
                return cls(markers=markers, end_token_ids=known)
        return None

    def prompt(self, prefix: str, suffix: str) -> str:
        """Return the prompt whose answer goes between two texts."""
        before_prefix, before_suffix, before_answer = self.markers
        return f"{before_prefix}{prefix}{before_suffix}{suffix}{before_answer}"
