"""Random lives of a controller, crashes and all, against the plainest bookkeeping there is."""

import asyncio
import contextlib
from collections import Counter
from dataclasses import dataclass, field
from decimal import Decimal

from hypothesis import given, settings
from hypothesis import strategies as st

from controller.clock import unix_us
from controller.ledger.intervals import WHOLE_PPM, AdoptedClaim, LedgerState
from controller.ledger.ledger import Ledger
from controller.ledger.report import GroupBy
from controller.store.errors import DatabaseUnavailable
from tests.fakes.books import Failure, FakeBooks
from tests.fakes.clock import START, FakeClock

S = LedgerState
DEVICES = ("gpu0", "gpu1", "gpu2")
RATE = Decimal("2.50")
NODE_RATE = Decimal("1.25")
START_US = unix_us(START)
HOLDING = (S.STARTING, S.LOADING, S.ACTIVE, S.IDLE, S.DRAINING, S.FAILED)

Claims = dict[str, tuple[LedgerState, tuple[str, ...]]]


@dataclass(frozen=True)
class Wait:
    seconds: float


@dataclass(frozen=True)
class SetClaim:
    replica: str
    state: LedgerState
    devices: tuple[str, ...]


@dataclass(frozen=True)
class DropClaim:
    replica: str


@dataclass(frozen=True)
class Flush:
    failure: Failure | None


@dataclass(frozen=True)
class JumpWall:
    seconds: int


@dataclass(frozen=True)
class Compact:
    pass


@dataclass(frozen=True)
class Crash:
    """The controller dies, is gone for a while, and finds some of its replicas alive."""

    away_s: int
    adopted: frozenset[str]
    worked_s: int  # how long after the last heartbeat their last request ended


Event = Wait | SetClaim | DropClaim | Flush | JumpWall | Compact | Crash

replicas = st.sampled_from(["a", "b", "c"])
events: st.SearchStrategy[Event] = st.one_of(
    st.builds(Wait, st.integers(0, 4_000_000_000).map(lambda us: us / 1e6)),
    st.builds(Wait, st.floats(0, 3)),
    st.builds(
        SetClaim,
        replicas,
        st.sampled_from([*HOLDING, S.PARKED]),
        st.sets(st.sampled_from(DEVICES), min_size=1).map(lambda chosen: tuple(sorted(chosen))),
    ),
    st.builds(DropClaim, replicas),
    st.builds(Flush, st.sampled_from([None, None, Failure.BEFORE, Failure.AFTER])),
    st.builds(JumpWall, st.integers(-200_000, 200_000)),
    st.builds(Compact),
    st.builds(Crash, st.integers(0, 100_000), st.frozensets(replicas), st.integers(0, 90_000)),
)


@dataclass
class Oracle:
    """Every stretch of time with all claims that held in it."""

    moment_us: int
    stretches: list[tuple[int, int, Claims]] = field(default_factory=list)
    claims: Claims = field(default_factory=dict)

    def reach(self, moment_us: int) -> None:
        self.stretches.append((self.moment_us, moment_us, dict(self.claims)))
        self.moment_us = moment_us

    def forget_after(self, moment_us: int) -> None:
        self.stretches = [
            (start, min(end, moment_us), claims)
            for start, end, claims in self.stretches
            if start < moment_us
        ]
        self.moment_us = moment_us

    def device_times(self) -> Counter[tuple[str, str | None, LedgerState]]:
        sums: Counter[tuple[str, str | None, LedgerState]] = Counter()
        for start, end, claims in self.stretches:
            for device in DEVICES:
                for replica, state, share in shares(device, claims):
                    sums[device, replica, state] += (end - start) * share
        return +sums


def shares(device: str, claims: Claims) -> list[tuple[str | None, LedgerState, int]]:
    here = [(name, state) for name, (state, devices) in claims.items() if device in devices]
    sharing = [one for one in here if one[1] is not S.PARKED] or here
    if not sharing:
        return [(None, S.UNALLOCATED, WHOLE_PPM)]
    equal = WHOLE_PPM // len(sharing)
    first = WHOLE_PPM - equal * (len(sharing) - 1)
    return [(*one, first if index == 0 else equal) for index, one in enumerate(sharing)]


class World:
    """A ledger, its repository, and the oracle, taken through the same events."""

    def __init__(self) -> None:
        self.clock, self.books = FakeClock(), FakeBooks()
        self.oracle = Oracle(START_US)
        self.ledger = self._new_ledger()

    def _new_ledger(self) -> Ledger:
        rates = dict.fromkeys(DEVICES, NODE_RATE)
        return Ledger(devices=rates, clock=self.clock, repository=self.books, max_pending=8)

    async def apply(self, event: Event) -> None:
        self.oracle.reach(self.ledger.now_us())
        match event:
            case Wait(seconds=seconds):
                self.clock.advance(seconds)
            case JumpWall(seconds=seconds):
                self.clock.jump_wall(seconds)
            case SetClaim(replica=replica, state=state, devices=devices):
                self._claim(replica, state, devices)
            case DropClaim(replica=replica):
                self.ledger.drop_claim(replica)
                self.oracle.claims.pop(replica, None)
            case Flush(failure=failure):
                self.books.failure = failure
                with contextlib.suppress(DatabaseUnavailable):
                    await self.ledger.flush()
                self.books.failure = None
            case Compact():
                await self.ledger.compact()
            case Crash():
                await self._crash(event)

    def _claim(self, replica: str, state: LedgerState, devices: tuple[str, ...]) -> None:
        self.ledger.set_claim(
            replica, function="f-" + replica, devices=devices, state=state, rate_usd_per_hour=RATE
        )
        before = self.oracle.claims.get(replica)
        if before is not None and before[1] != devices:
            # On every device it stays on it keeps its place, which decides who gets a remainder.
            # The oracle has one order for all devices, so such a move is made a new arrival.
            self.ledger.drop_claim(replica)
            self.oracle.claims.pop(replica)
            self._claim(replica, state, devices)
        self.oracle.claims[replica] = (state, devices)

    async def _crash(self, crash: Crash) -> None:
        heartbeat_us = self.books.heartbeat_us
        assert heartbeat_us is not None
        survivors = {
            replica: claim
            for replica, claim in self.oracle.claims.items()
            if replica in crash.adopted
        }
        self.clock.advance(crash.away_s)
        last_active_us = heartbeat_us + crash.worked_s * 1_000_000
        adopted = {
            replica: AdoptedClaim(
                function="f-" + replica,
                devices=devices,
                state=S.PARKED if state is S.PARKED else S.IDLE,
                rate_usd_per_hour=RATE,
                last_active_us=last_active_us,
            )
            for replica, (state, devices) in survivors.items()
        }
        self.ledger = self._new_ledger()
        await self.ledger.recover(adopted)
        back_us = self.ledger.now_us()
        assert back_us == max(unix_us(self.clock.now()), heartbeat_us)
        self._expect_downtime(survivors, heartbeat_us, min(last_active_us, back_us), back_us)

    def _expect_downtime(
        self, survivors: Claims, heartbeat_us: int, worked_until_us: int, back_us: int
    ) -> None:
        oracle = self.oracle
        oracle.forget_after(heartbeat_us)
        for state, until_us in ((S.ACTIVE, worked_until_us), (S.IDLE, back_us)):
            oracle.claims = {
                replica: (S.PARKED if before is S.PARKED else state, devices)
                for replica, (before, devices) in survivors.items()
            }
            oracle.reach(until_us)


@settings(max_examples=150)
@given(st.lists(events, max_size=40))
def test_every_microsecond_is_in_exactly_one_state_through_crashes_and_clock_jumps(
    history: list[Event],
) -> None:
    asyncio.run(_live(history))


async def _live(history: list[Event]) -> None:
    world = World()
    await world.ledger.recover({})
    for event in history:
        await world.apply(event)
    world.oracle.reach(world.ledger.now_us())
    await world.ledger.flush()
    _assert_told(world)
    _assert_gap_free(world)
    await _assert_reports_add_up(world)
    await world.ledger.compact()
    _assert_told(world)
    _assert_gap_free(world)


def _assert_told(world: World) -> None:
    told: Counter[tuple[str, str | None, LedgerState]] = Counter()
    for one in world.books.told():
        assert one.end_us is not None
        told[one.device, one.replica_id, one.state] += (one.end_us - one.start_us) * one.share_ppm
        assert one.function == (None if one.replica_id is None else "f-" + one.replica_id)
        assert one.rate_usd_per_hour == (NODE_RATE if one.replica_id is None else RATE)
    assert +told == world.oracle.device_times()


def _assert_gap_free(world: World) -> None:
    """At every moment since the start the shares of each device add up to one."""
    end_us = world.books.heartbeat_us
    for device in DEVICES:
        changes: Counter[int] = Counter()
        for one in world.books.told():
            if one.device == device and one.end_us is not None and one.start_us != one.end_us:
                assert one.start_us < one.end_us
                changes[one.start_us] += one.share_ppm
                changes[one.end_us] -= one.share_ppm
        moments = sorted(changes)
        if moments:
            assert (moments[0], moments[-1]) == (START_US, end_us)
        else:
            assert end_us == START_US
        level = 0
        for moment in moments[:-1]:
            level += changes[moment]
            assert level == WHOLE_PPM


async def _assert_reports_add_up(world: World) -> None:
    wall_s = Decimal(world.ledger.now_us() - START_US) / 1_000_000
    for by in GroupBy:
        report = await world.ledger.cost(since=START, by=by)
        assert sum(report.total.seconds.values()) == wall_s * len(DEVICES)
        for state in LedgerState:
            assert sum(row.seconds[state] for row in report.rows) == report.total.seconds[state]
        assert sum(row.cost_usd for row in report.rows) == report.total.cost_usd
        paid = report.total.cost_usd + report.total.given_back_usd
        exact = sum(
            report.total.seconds[state] * (NODE_RATE if state is S.UNALLOCATED else RATE)
            for state in LedgerState
        ) / Decimal(3600)
        assert abs(paid - exact) < Decimal("1e-8") * (len(report.rows) + 1)
