"""Which files deserve the page cache. Pure."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

MUCH_BETTER = 0.2
"""How much likelier to be wanted a file must be to take the place of one that is held."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A file that could be held.

    Attributes:
        path: Where it is.
        num_bytes: Its size.
        reuse_probability: How likely it will be read soon. Reading costs in proportion to size and
            so does holding: that leaves the probability alone to decide.
    """

    path: str
    num_bytes: int
    reuse_probability: float


def choose(
    candidates: Sequence[Candidate], held: Collection[str], budget_bytes: int
) -> dict[str, int]:
    """Return paths to hold and their sizes; what is held already stays unless others are better."""

    def worth(candidate: Candidate) -> float:
        return candidate.reuse_probability + (MUCH_BETTER if candidate.path in held else 0.0)

    chosen: dict[str, int] = {}
    left_bytes = budget_bytes
    for candidate in sorted(candidates, key=worth, reverse=True):
        if candidate.num_bytes <= left_bytes:
            chosen[candidate.path] = candidate.num_bytes
            left_bytes -= candidate.num_bytes
    return chosen
