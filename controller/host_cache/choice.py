"""Which files deserve the host's memory. Pure."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

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
        is_for_gpu: Whether a GPU reads it, which is fastest from pinned memory.
    """

    path: str
    num_bytes: int
    reuse_probability: float
    is_for_gpu: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """How a file is to be held: in pinned memory, else locked in the page cache."""

    num_bytes: int
    is_pinned: bool


def choose(
    candidates: Sequence[Candidate], held: Collection[str], budget_bytes: int
) -> dict[str, Holding]:
    """Return paths to hold and how; what is held already stays unless others are better."""

    def worth(candidate: Candidate) -> float:
        return candidate.reuse_probability + (MUCH_BETTER if candidate.path in held else 0.0)

    chosen: dict[str, Holding] = {}
    left_bytes = budget_bytes
    for candidate in sorted(_merged(candidates), key=worth, reverse=True):
        if candidate.num_bytes <= left_bytes:
            chosen[candidate.path] = Holding(
                num_bytes=candidate.num_bytes, is_pinned=candidate.is_for_gpu
            )
            left_bytes -= candidate.num_bytes
    return chosen


def _merged(candidates: Iterable[Candidate]) -> Iterable[Candidate]:
    """Return one candidate a file, which several functions may want."""
    merged: dict[str, Candidate] = {}
    for candidate in candidates:
        other = merged.get(candidate.path, candidate)
        merged[candidate.path] = replace(
            candidate,
            reuse_probability=max(candidate.reuse_probability, other.reuse_probability),
            is_for_gpu=candidate.is_for_gpu or other.is_for_gpu,
        )
    return merged.values()
