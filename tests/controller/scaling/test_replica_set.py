"""Decisions on replicas and requests, without any effect."""

import itertools
import random

import pytest

from controller.errors import ActivationFailed, QueueFull
from controller.scaling.lifecycle import COMING, ENDING, ReplicaState, Tier
from controller.scaling.replica import (
    Instruction,
    ParkReplica,
    Replica,
    StartReplica,
    StopReplica,
    Waiter,
    WakeReplica,
)
from controller.scaling.replica_set import ReplicaSet
from functions.spec import FunctionSpec

S = ReplicaState
NUM_INTERLEAVINGS = 10_000


def spec_of(**sections: dict[str, object]) -> FunctionSpec:
    base: dict[str, object] = {"name": "tiny", "model": {"source": "./model"}}
    return FunctionSpec.model_validate(base | sections)


def set_of(spec: FunctionSpec | None = None) -> ReplicaSet:
    ids = (f"tiny-{number}" for number in itertools.count())
    return ReplicaSet(spec or spec_of(), "hash", new_id=lambda: next(ids))


def bring_up(replica_set: ReplicaSet, now: float) -> Replica:
    """Start whatever is planned and make it ready."""
    (instruction,) = replica_set.plan(now)
    assert isinstance(instruction, StartReplica)
    replica_set.loading(instruction.replica, now=now, reason="answers")
    replica_set.ready(instruction.replica, now=now)
    return instruction.replica


def request(replica_set: ReplicaSet, now: float = 0.0, num_bytes: int = 10) -> Waiter:
    waiter = Waiter(num_bytes=num_bytes)
    replica_set.admit(waiter, now=now)
    return waiter


def warm_set(spec: FunctionSpec | None = None) -> tuple[ReplicaSet, Replica]:
    replica_set = set_of(spec)
    waiter = request(replica_set)
    replica = bring_up(replica_set, 0.0)
    assert replica_set.grant() == [waiter]
    replica_set.release(replica, now=0.0)
    return replica_set, replica


def test_many_waiters_share_one_activation() -> None:
    replica_set = set_of()
    waiters = [request(replica_set) for _ in range(20)]
    replica = bring_up(replica_set, 1.0)
    assert replica_set.plan(1.0) == []
    assert replica_set.grant() == waiters
    assert replica.in_flight == 20


def test_waiters_are_served_in_order_up_to_the_concurrency_limit() -> None:
    replica_set = set_of(
        spec_of(scaling={"max_concurrency": 2, "target_concurrency": 2, "max_replicas": 1})
    )
    waiters = [request(replica_set) for _ in range(3)]
    replica = bring_up(replica_set, 0.0)
    assert replica_set.grant() == waiters[:2]
    replica_set.release(replica, now=1.0)
    assert replica_set.grant() == waiters[2:]


def test_a_full_queue_refuses_by_count_and_by_bytes() -> None:
    replica_set = set_of(spec_of(queue={"max_requests": 2, "max_bytes": 100}))
    request(replica_set, num_bytes=60)
    with pytest.raises(QueueFull, match=r"queue\.max_bytes"):
        request(replica_set, num_bytes=60)
    leaving = request(replica_set, num_bytes=40)
    with pytest.raises(QueueFull, match=r"queue\.max_requests"):
        request(replica_set, num_bytes=0)
    replica_set.abandon(leaving)
    request(replica_set, num_bytes=40)


def test_idle_time_counts_from_the_last_release() -> None:
    replica_set, replica = warm_set(spec_of(scaling={"idle_timeout": 10}))
    assert replica_set.plan(9.9) == []
    waiter = request(replica_set, now=9.9)
    assert waiter.replica is replica
    assert replica_set.plan(50.0) == [], "a lease is out"
    replica_set.release(replica, now=50.0)
    assert replica_set.plan(59.9) == []
    assert replica_set.plan(60.0) == [ParkReplica(replica=replica)]
    assert replica_set.plan(60.0) == [], "asked once"


def test_zero_idle_timeout_parks_at_once_and_null_never() -> None:
    at_once, replica = warm_set(spec_of(scaling={"idle_timeout": 0}))
    assert at_once.plan(0.0) == [ParkReplica(replica=replica)]
    never, _ = warm_set(spec_of(scaling={"idle_timeout": None}))
    assert never.plan(1e9) == []


def test_a_request_during_parking_waits_and_wakes_the_same_replica() -> None:
    replica_set, replica = warm_set(spec_of(scaling={"idle_timeout": 1}))
    assert replica_set.plan(1.0) == [ParkReplica(replica=replica)]
    waiter = request(replica_set, now=1.0)
    assert waiter.replica is None
    assert replica_set.plan(1.0) == [], "cheaper to wait for the park than to start another"
    replica_set.parked(replica, now=1.5)
    assert replica_set.tier is Tier.PARKED
    assert replica_set.plan(1.5) == [WakeReplica(replica=replica)]
    replica_set.ready(replica, now=2.0)
    assert replica_set.grant() == [waiter]


def test_a_parked_replica_is_stopped_after_the_park_timeout() -> None:
    replica_set, replica = warm_set(spec_of(scaling={"idle_timeout": 1, "park_timeout": 100}))
    replica_set.plan(1.0)
    replica_set.parked(replica, now=2.0)
    assert replica_set.next_deadline(2.0) == 102.0
    assert replica_set.plan(101.9) == []
    assert replica_set.plan(102.0) == [StopReplica(replica=replica)]
    replica_set.stopped(replica, now=103.0)
    assert replica_set.tier is Tier.STOPPED
    assert not replica_set.replicas


def test_a_failed_start_fails_the_waiters_at_once_and_backs_off() -> None:
    replica_set = set_of()
    waiter = request(replica_set)
    (instruction,) = replica_set.plan(0.0)
    lost = replica_set.failed(instruction.replica, now=1.0, reason="no such file", is_start=True)
    assert lost == [waiter]
    assert isinstance(waiter.failure, ActivationFailed)
    assert "no such file" in waiter.failure.message
    replica_set.stopped(instruction.replica, now=1.0)
    with pytest.raises(ActivationFailed) as refused:
        request(replica_set, now=1.5)
    assert refused.value.retry_after_s == pytest.approx(0.5)
    request(replica_set, now=2.5)
    assert len(replica_set.plan(2.5)) == 1, "the back-off expires by itself"


def test_repeated_failures_back_off_longer_and_success_forgets_them() -> None:
    replica_set = set_of()
    now, waits = 0.0, []
    for _ in range(3):
        request(replica_set, now=now)
        (instruction,) = replica_set.plan(now)
        replica_set.failed(instruction.replica, now=now, reason="broken", is_start=True)
        replica_set.stopped(instruction.replica, now=now)
        waits.append(replica_set.backoff.retry_at - now)
        now = replica_set.backoff.retry_at
    assert waits == sorted(set(waits))
    request(replica_set, now=now)
    bring_up(replica_set, now)
    assert replica_set.backoff.num_failures == 0


def kill(replica_set: ReplicaSet, replica: Replica, now: float) -> list[Waiter]:
    """Have a replica killed while it starts, and be removed."""
    lost = replica_set.failed(replica, now=now, reason="killed", is_start=True, was_killed=True)
    replica_set.stopped(replica, now=now)
    return lost


def test_a_start_that_is_killed_is_made_again_at_once_and_nobody_hears_of_it() -> None:
    replica_set = set_of()
    waiter = request(replica_set)
    (first,) = replica_set.plan(0.0)
    assert kill(replica_set, first.replica, 1.0) == []
    late = request(replica_set, now=1.0)
    bring_up(replica_set, 1.0)
    assert replica_set.grant() == [waiter, late]


def test_the_second_start_to_be_killed_fails_its_waiters_and_backs_off() -> None:
    replica_set = set_of()
    waiter = request(replica_set)
    (first,) = replica_set.plan(0.0)
    kill(replica_set, first.replica, 1.0)
    (second,) = replica_set.plan(1.0)
    replica_set.unplace(second.replica, parked=False)  # which is no try
    (second,) = replica_set.plan(2.0)
    assert kill(replica_set, second.replica, 3.0) == [waiter]
    assert replica_set.backoff.holds(3.0)
    request(replica_set, now=4.5)
    (third,) = replica_set.plan(4.5)
    assert kill(replica_set, third.replica, 5.0) == [], "a new start has its own second try"


def test_a_start_of_its_own_has_its_own_second_try() -> None:
    replica_set = set_of(spec_of(scaling={"target_concurrency": 1}))
    waiters = [request(replica_set), request(replica_set)]
    one, two = (start.replica for start in replica_set.plan(0.0))
    assert kill(replica_set, one, 1.0) == []
    (again,) = replica_set.plan(1.0)
    assert kill(replica_set, two, 1.0) == []
    bring_up(replica_set, 1.0)
    assert kill(replica_set, again.replica, 2.0) == [], "another one will serve"
    assert replica_set.backoff.holds(2.0)
    assert replica_set.grant() == waiters


def test_a_start_that_is_killed_during_a_back_off_is_not_made_again_before_its_end() -> None:
    replica_set = set_of(spec_of(scaling={"target_concurrency": 1}))
    waiters = [request(replica_set), request(replica_set)]
    broken, killed = (start.replica for start in replica_set.plan(0.0))
    assert replica_set.failed(broken, now=1.0, reason="broken", is_start=True) == []
    assert kill(replica_set, killed, 1.5) == waiters


def test_the_back_off_of_failed_starts_does_not_keep_a_parked_replica_from_waking() -> None:
    replica_set, parked = warm_set(spec_of(scaling={"target_concurrency": 1, "idle_timeout": 0}))
    waiters = [request(replica_set), request(replica_set)]
    (start,) = replica_set.plan(0.0)
    assert replica_set.failed(start.replica, now=0.0, reason="broken", is_start=True) == []
    replica_set.stopped(start.replica, now=0.0)
    for waiter in waiters:
        assert waiter.replica is parked
        replica_set.release(parked, now=0.1)
    assert replica_set.plan(0.1) == [ParkReplica(replica=parked)]
    replica_set.parked(parked, now=0.2)
    for _ in range(2):
        request(replica_set, now=0.3)
    assert replica_set.backoff.holds(0.3)
    assert replica_set.plan(0.3) == [WakeReplica(replica=parked)], "and nothing is started"


def test_replicas_that_are_lost_as_soon_as_they_are_ready_are_started_ever_more_slowly() -> None:
    replica_set = set_of(spec_of(scaling={"min_replicas": 1}))
    replica_set.floor = 1
    now, waits = 0.0, []
    for _ in range(4):
        replica = bring_up(replica_set, now)
        now += 2.0
        assert replica_set.failed(replica, now=now, reason="broken", is_start=False) == []
        replica_set.stopped(replica, now=now)
        waits.append(replica_set.backoff.retry_at - now)
        now = replica_set.backoff.retry_at
    assert waits == [0.0, 1.0, 2.0, 4.0]
    replica = bring_up(replica_set, now)
    replica_set.failed(replica, now=now + 6.0, reason="out of memory", is_start=False)
    replica_set.stopped(replica, now=now + 6.0)
    bring_up(replica_set, now + 6.0)  # at once: it was of use for a while


def test_a_wake_is_not_a_start_whose_loss_would_count() -> None:
    replica_set, replica = warm_set(spec_of(scaling={"idle_timeout": 0}))
    replica_set.plan(50.0)
    replica_set.parked(replica, now=50.0)
    request(replica_set, now=51.0)
    replica_set.plan(51.0)
    replica_set.ready(replica, now=51.5)
    replica_set.failed(replica, now=52.0, reason="broken", is_start=False)
    assert replica_set.backoff.num_failures == 0


def test_a_waking_replica_is_as_warm_as_a_parked_one() -> None:
    replica_set, replica = warm_set(spec_of(scaling={"idle_timeout": 0}))
    replica_set.plan(0.0)
    replica_set.parked(replica, now=1.0)
    request(replica_set, now=2.0)
    replica_set.plan(2.0)
    assert replica.state is S.LOADING
    assert replica_set.tier is Tier.PARKED


def test_a_replica_that_does_not_wake_is_replaced_without_failing_anyone() -> None:
    replica_set, replica = warm_set(spec_of(scaling={"idle_timeout": 0}))
    replica_set.plan(0.0)
    replica_set.parked(replica, now=1.0)
    waiter = request(replica_set, now=2.0)
    assert replica_set.plan(2.0) == [WakeReplica(replica=replica)]
    assert replica_set.failed(replica, now=3.0, reason="restore refused", is_start=False) == []
    bring_up(replica_set, 3.0)
    assert replica_set.grant() == [waiter]


def test_min_replicas_are_started_without_requests_and_never_reaped() -> None:
    replica_set = set_of(spec_of(scaling={"min_replicas": 1, "idle_timeout": 1}))
    replica_set.floor = 1
    bring_up(replica_set, 0.0)
    assert replica_set.plan(1e6) == []
    replica_set.floor = 0
    (instruction,) = replica_set.plan(1e6)
    assert isinstance(instruction, ParkReplica)


def test_load_above_target_adds_replicas_up_to_the_maximum() -> None:
    replica_set = set_of(spec_of(scaling={"target_concurrency": 2, "max_replicas": 3}))
    for _ in range(20):
        request(replica_set)
    assert len(replica_set.plan(0.0)) == 3


def test_surplus_replicas_finish_their_requests_then_park_after_the_delay() -> None:
    spec = spec_of(
        scaling={
            "target_concurrency": 1,
            "max_replicas": 2,
            "scale_down_delay": 30,
            "idle_timeout": 1000,
        }
    )
    replica_set = set_of(spec)
    waiters = [request(replica_set), request(replica_set)]
    for instruction in replica_set.plan(0.0):
        replica_set.loading(instruction.replica, now=0.0, reason="answers")
        replica_set.ready(instruction.replica, now=0.0)
    assert replica_set.grant() == waiters
    first = waiters[0].replica
    assert first is not None
    replica_set.release(first, now=1.0)
    assert replica_set.plan(1.0) == []
    assert replica_set.next_deadline(1.0) == 31.0
    assert replica_set.plan(31.0) == [ParkReplica(replica=first)]
    assert waiters[1].replica is not None
    assert waiters[1].replica.state is S.READY


def test_a_new_revision_replaces_replicas_once_they_are_idle() -> None:
    replica_set, old = warm_set()
    request(replica_set)
    replica_set.update(spec_of(engine={"block_size": 32}), "other-hash")
    late = request(replica_set)
    assert late.replica is None, "the old replica takes no new request"
    (start,) = replica_set.plan(1.0)
    assert isinstance(start, StartReplica)
    replica_set.release(old, now=2.0)
    assert replica_set.plan(2.0) == [StopReplica(replica=old)]


def test_a_start_of_an_older_revision_is_given_up_and_its_end_harms_nobody() -> None:
    replica_set = set_of()
    waiter = request(replica_set)
    (start,) = replica_set.plan(0.0)
    replica_set.update(spec_of(engine={"block_size": 32}), "other-hash")
    instructions = replica_set.plan(1.0)
    assert StopReplica(replica=start.replica) in instructions
    (other,) = (one for one in instructions if isinstance(one, StartReplica))
    assert replica_set.failed(start.replica, now=2.0, reason="killed", is_start=True) == []
    assert not replica_set.backoff.holds(2.0)
    replica_set.loading(other.replica, now=3.0, reason="answers")
    replica_set.ready(other.replica, now=4.0)
    assert replica_set.grant() == [waiter]


def test_a_refused_park_is_tried_again_ever_more_seldom() -> None:
    replica_set, replica = warm_set(spec_of(scaling={"idle_timeout": 0}))
    at = 0.0
    for wait_s in (1.0, 2.0, 4.0):
        assert replica_set.plan(at) == [ParkReplica(replica=replica)]
        replica_set.park_refused(replica, now=at, reason="not now")
        assert replica_set.plan(at + wait_s - 0.1) == []
        assert replica_set.next_deadline(at) == at + wait_s
        at += wait_s
    replica_set.plan(at)
    replica_set.parked(replica, now=at)
    assert not replica.parking.num_failures


def test_parking_on_demand_leaves_busy_replicas_alone() -> None:
    replica_set, replica = warm_set()
    request(replica_set)
    assert replica_set.park_now(now=1.0, reason="asked to") == []
    replica_set.release(replica, now=1.0)
    assert replica_set.park_now(now=1.0, reason="asked to") == [ParkReplica(replica=replica)]


def kept_set(floor: int = 1) -> tuple[ReplicaSet, Replica, Replica]:
    """Two ready replicas of which as many must stay; the second was called last."""
    replica_set = set_of(
        spec_of(scaling={"idle_timeout": None, "target_concurrency": 1, "scale_down_delay": 1e6})
    )
    waiters = [request(replica_set) for _ in range(2)]
    for instruction in replica_set.plan(0.0):
        replica_set.loading(instruction.replica, now=0.0, reason="answers")
        replica_set.ready(instruction.replica, now=0.0)
    first, second = replica_set.replicas.values()
    assert replica_set.grant() == waiters
    replica_set.release(first, now=1.0)
    replica_set.release(second, now=2.0)
    replica_set.floor = floor
    return replica_set, first, second


def test_as_many_as_must_be_ready_are_needed_the_most_valuable_ones() -> None:
    replica_set, first, second = kept_set()
    assert [replica_set.is_needed(one) for one in (first, second)] == [False, True]
    request(replica_set, now=3.0)
    assert first.in_flight == 1
    assert [replica_set.is_needed(one) for one in (first, second)] == [True, False]
    replica_set.floor = 2
    assert [replica_set.is_needed(one) for one in (first, second)] == [True, True]
    replica_set.floor = 0
    assert [replica_set.is_needed(one) for one in (first, second)] == [False, False]


def test_one_that_must_stay_is_not_evicted() -> None:
    replica_set, first, second = kept_set()
    assert replica_set.evict(second, now=3.0, reason="") is None
    assert replica_set.evict(first, now=3.0, reason="") == ParkReplica(replica=first)
    assert replica_set.evict(second, now=3.0, reason="") is None


def test_an_idle_one_that_may_not_be_parked_is_stopped() -> None:
    replica_set, replica = warm_set()
    evicted = replica_set.evict(replica, now=1.0, reason="", may_park=False)
    assert evicted == StopReplica(replica=replica)


def test_one_that_must_stay_does_not_yield() -> None:
    replica_set, first, second = kept_set()
    for _ in range(2):
        request(replica_set, now=3.0)
    assert [replica_set.yield_place(one) for one in (first, second)] == [True, False]
    assert [replica_set.yields(one) for one in (first, second)] == [True, False]
    replica_set.failed(second, now=4.0, reason="died", is_start=False)
    assert request(replica_set, now=4.0).replica is first, "it is the only one now"
    for _ in range(2):
        replica_set.release(first, now=5.0)
    assert not any(isinstance(one, ParkReplica) for one in replica_set.plan(5.0))


def test_a_parked_one_does_not_yield() -> None:
    replica_set, first, _ = kept_set(floor=0)
    replica_set.evict(first, now=3.0, reason="")
    replica_set.parked(first, now=3.1)
    assert not replica_set.yield_place(first)
    assert not replica_set.yields(first)


def test_no_free_device_leaves_no_trace_and_is_tried_again() -> None:
    replica_set = set_of()
    request(replica_set)
    (instruction,) = replica_set.plan(0.0)
    replica_set.unplace(instruction.replica, parked=False)
    assert replica_set.transitions == []
    assert not replica_set.replicas
    assert len(replica_set.plan(1.0)) == 1


def test_a_wake_that_finds_no_free_device_leaves_no_trace_on_the_parked_replica() -> None:
    replica_set, replica = warm_set(spec_of(scaling={"idle_timeout": 1, "park_timeout": 10}))
    replica_set.plan(1.0)
    replica_set.parked(replica, now=2.0)
    before = replica.lifecycle.history
    replica_set.transitions.clear()
    waiter = request(replica_set, now=5.0)
    for now in (5.0, 6.0, 7.0):
        assert replica_set.plan(now) == [WakeReplica(replica=replica)]
        replica_set.unplace(replica, parked=True)
    assert replica.lifecycle.history == before
    assert replica_set.transitions == []
    replica_set.abandon(waiter)
    assert replica_set.plan(11.9) == []
    assert replica_set.plan(12.0) == [StopReplica(replica=replica)], "parked since 2 s"


class Storm:
    """Random requests, effects and time against one replica set, checked after every move."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.set = set_of(
            spec_of(
                scaling={
                    "idle_timeout": self.random.choice([0, 1, 3]),
                    "park_timeout": self.random.choice([0, 2, None]),
                    "max_replicas": self.random.choice([1, 2, 3]),
                    "target_concurrency": self.random.choice([1, 2]),
                    "max_concurrency": self.random.choice([2, 4]),
                    "scale_down_delay": self.random.choice([0, 2]),
                },
                queue={"max_requests": 8},
            )
        )
        self.now = 0.0
        self.waiting: list[Waiter] = []
        self.leased: list[Waiter] = []
        self.effects: list[Instruction] = []

    def run(self, num_moves: int) -> None:
        moves = [self.arrive, self.finish, self.leave, self.pass_time, self.complete, self.complete]
        for _ in range(num_moves):
            self.random.choice(moves)()
            self.turn()

    def settle(self) -> None:
        """Let every effect succeed and every request finish; nobody may be left waiting."""
        for _ in range(200):
            if not (self.waiting or self.leased or self.effects):
                return
            self.now += 100.0
            self.turn()
            while self.effects:
                self.complete(may_fail=False)
            self.turn()
            while self.leased:
                self.finish()
        raise AssertionError(f"{len(self.waiting)} requests wait for ever")

    def turn(self) -> None:
        granted = self.set.grant()
        for waiter in granted:
            self.take(waiter)
        self.effects += self.set.plan(self.now)
        self.check()

    def take(self, waiter: Waiter) -> None:
        assert waiter.replica is not None
        assert waiter.replica.state is S.READY, "a lease on a replica that is being reaped"
        if waiter in self.waiting:
            self.waiting.remove(waiter)
        self.leased.append(waiter)

    def arrive(self) -> None:
        waiter = Waiter(num_bytes=1)
        try:
            self.set.admit(waiter, now=self.now)
        except (QueueFull, ActivationFailed):
            return
        if waiter.replica is not None:
            self.take(waiter)
        else:
            self.waiting.append(waiter)

    def finish(self) -> None:
        if self.leased:
            waiter = self.leased.pop(self.random.randrange(len(self.leased)))
            assert waiter.replica is not None
            self.set.release(waiter.replica, now=self.now)

    def leave(self) -> None:
        if self.waiting:
            waiter = self.waiting.pop(self.random.randrange(len(self.waiting)))
            self.set.abandon(waiter)

    def pass_time(self) -> None:
        self.now += self.random.choice([0.1, 1.0, 5.0])

    def complete(self, *, may_fail: bool = True) -> None:
        if not self.effects:
            return
        effect = self.effects.pop(self.random.randrange(len(self.effects)))
        replica, fails = effect.replica, may_fail and self.random.random() < 0.15
        if fails and replica.state not in ENDING:
            self.fail(replica, is_start=isinstance(effect, StartReplica))
        elif isinstance(effect, StartReplica):
            self.set.loading(replica, now=self.now, reason="answers")
            self.set.ready(replica, now=self.now)
        elif isinstance(effect, WakeReplica):
            self.set.ready(replica, now=self.now)
        elif isinstance(effect, ParkReplica):
            self.set.parked(replica, now=self.now)
        else:
            self.set.stopped(replica, now=self.now)

    def fail(self, replica: Replica, *, is_start: bool) -> None:
        for waiter in self.set.failed(replica, now=self.now, reason="storm", is_start=is_start):
            assert waiter.failure is not None
            self.waiting.remove(waiter)
        self.set.stopped(replica, now=self.now)

    def check(self) -> None:
        out: dict[str, int] = {}
        for waiter in self.leased:
            assert waiter.replica is not None
            out[waiter.replica.id] = out.get(waiter.replica.id, 0) + 1
        alive = [r for r in self.set.replicas.values() if r.state not in ENDING]
        assert len(alive) <= self.set.spec.scaling.max_replicas
        for replica in self.set.replicas.values():
            assert replica.in_flight == out.get(replica.id, 0)
            if replica.state in COMING | {S.PARKING, S.PARKED}:
                assert replica.in_flight == 0, f"{replica.state} with requests in flight"
        assert self.set.num_queued == len(self.waiting)


def test_reaping_and_requests_never_cross_in_ten_thousand_interleavings() -> None:
    for seed in range(NUM_INTERLEAVINGS):
        storm = Storm(seed)
        storm.run(num_moves=30)
        storm.settle()
