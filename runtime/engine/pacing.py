"""When to launch the next batch: as late as the device allows. No torch.

A batch launched while the one before has just begun keeps the device busy, but a request that
comes a moment later waits for both. Batches of one kind take about the same time, so the next one
can wait until the present one is nearly done.
"""

from runtime.engine.batch import ScheduledBatch

LEARNING_RATE = 0.2
LEAD_FACTOR = 2.0  # launching is given twice the time it usually takes
LEAD_S = 0.0005

_Kind = tuple[bool, int]


class Pacing:
    """Learns how long batches run and how long launching takes, in seconds of one clock."""

    def __init__(self) -> None:
        self._durations: dict[_Kind, float] = {}
        self._launch_s = 0.0
        self._free_at = 0.0  # when the device could begin the batch that is oldest in flight

    def launched(self, began: float, ended: float, *, is_next: bool) -> None:
        """Note when a batch was scheduled and launched.

        Args:
            began: Before it was scheduled.
            ended: After it was launched.
            is_next: Whether the device had nothing else to do.
        """
        launch_s = ended - began
        # Slow launches are believed at once: too late costs more than too early.
        self._launch_s = max(launch_s, self._launch_s + LEARNING_RATE * (launch_s - self._launch_s))
        if is_next:
            self._free_at = began

    def finished(self, batch: ScheduledBatch, now: float) -> None:
        """Note that the oldest batch in flight is done."""
        kind = _kind(batch)
        duration = now - self._free_at
        known = self._durations.get(kind, duration)
        # A batch that had to wait for the host seems long: believe short ones at once.
        self._durations[kind] = min(duration, known + LEARNING_RATE * (duration - known))
        self._free_at = now

    def spare_s(self, batch: ScheduledBatch, now: float) -> float:
        """Return for how long nothing needs to follow a batch that runs; 0 if that is unknown."""
        duration = self._durations.get(_kind(batch), 0.0)
        lead = LEAD_FACTOR * self._launch_s + LEAD_S
        return max(0.0, self._free_at + duration - lead - now)


def _kind(batch: ScheduledBatch) -> _Kind:
    """Return what batches of about the same duration have in common."""
    num_tokens = batch.num_tokens
    is_decode = num_tokens == len(batch.sequences)
    return is_decode, num_tokens // 64 if num_tokens > 64 else -num_tokens
