"""What every kernel launch needs: block sizes, and a count of compilations that came late."""

import triton


def next_power_of_2(size: int) -> int:
    """Return the smallest power of two that is at least `size`; Triton's blocks are such."""
    return 1 << max(0, size - 1).bit_length()


class LateCompilations:
    """Counts Triton compilations from `start` on; a serving engine must see none."""

    def __init__(self) -> None:
        self.count = 0
        self.names: list[str] = []

    def start(self) -> None:
        """Count from now on, in this process."""
        triton.knobs.runtime.jit_post_compile_hook = self._note

    def _note(self, **event: object) -> None:
        self.count += 1
        self.names.append(str(event.get("repr", "")))
