"""Packing a model's weights a little at a time.

Packing takes longer than reading the weights, so a woken engine answers first and packs a layer
before each of its next steps. What cannot be packed is served unpacked.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import structlog
from torch import Tensor

from runtime.cpu.linear import PackedLinear, pack_all

log = structlog.get_logger()


class Packer:
    """Packs groups of linears, one group a call.

    Args:
        groups: In the order in which to pack them.
        num_threads: Weights packed at the same time.
        discard: Told of every weight that is not used any more.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[PackedLinear]],
        *,
        num_threads: int,
        discard: Callable[[Tensor], None],
    ) -> None:
        self.packed_bytes = 0
        self._groups = list(reversed(groups))
        self._num_threads = num_threads
        self._discard = discard

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to pack."""
        return not self._groups

    def pack_group(self) -> None:
        """Pack the next group, which blocks for about one step; if that fails, pack no other."""
        group = self._groups.pop()
        try:
            with ThreadPoolExecutor(self._num_threads, "pack") as executor:
                for weight in pack_all(group, executor):
                    self._discard(weight)
        except Exception:  # such as memory that is not there; nobody's sequence needs it
            log.exception("packing_failed")
            self._groups.clear()
        self.packed_bytes += sum(linear.packed_bytes for linear in group)
