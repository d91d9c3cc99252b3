from runtime.engine.batch import ScheduledBatch, ScheduledSequence
from runtime.engine.pacing import Pacing
from runtime.engine.sequence import SamplingParams, SequenceKey

RUN_S = 0.010
LAUNCH_S = 0.001


def batch_of(*sizes: int) -> ScheduledBatch:
    return ScheduledBatch(
        sequences=tuple(
            ScheduledSequence(
                key=SequenceKey(0, index),
                number=index,
                start=0,
                token_ids=(0,) * size,
                num_pending_tokens=0,
                block_ids=(),
                is_sampled=True,
                sampling=SamplingParams(),
                seed=0,
                num_preemptions=0,
            )
            for index, size in enumerate(sizes)
        )
    )


def simulate(pacing: Pacing, batch: ScheduledBatch, num_steps: int) -> list[float]:
    """Run a device that takes RUN_S for a batch; return how long it was idle before each."""
    now = 0.0
    pacing.launched(now, now + LAUNCH_S, is_next=True)
    ends_at = now + LAUNCH_S + RUN_S
    idle = []
    for _ in range(num_steps):
        now = max(now, ends_at - RUN_S) + pacing.spare_s(batch, max(now, ends_at - RUN_S))
        pacing.launched(now, now + LAUNCH_S, is_next=False)
        next_begins_at = max(now + LAUNCH_S, ends_at)
        idle.append(next_begins_at - ends_at)
        now = ends_at
        pacing.finished(batch, now)
        ends_at = next_begins_at + RUN_S
    return idle


def test_nothing_is_put_off_before_durations_are_known() -> None:
    assert Pacing().spare_s(batch_of(1), 0.0) == 0.0


def test_next_batch_is_put_off_and_the_device_never_waits() -> None:
    pacing = Pacing()
    idle = simulate(pacing, batch_of(1, 1), 200)
    assert max(idle) == 0.0
    spare_s = pacing.spare_s(batch_of(1, 1), pacing._free_at)
    assert 0.5 * RUN_S < spare_s < RUN_S - LAUNCH_S


def test_other_kinds_of_batches_are_known_apart() -> None:
    pacing = Pacing()
    simulate(pacing, batch_of(1, 1), 20)
    assert pacing.spare_s(batch_of(1, 512), pacing._free_at) == 0.0
