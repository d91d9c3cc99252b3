"""The line in front of each device: functions that wait for memory, first come first served.

Whoever is at the head has room made for it, by the rules of `room`. Event loop only; nothing here
waits. A function asks again whenever something has changed.
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from controller.clock import Clock
from controller.scaling.placement import Demand, MemoryLedger
from controller.scaling.room import Room, Tenant, make_room

TIMER_RESOLUTION_S = 0.001


class Party(Protocol):
    """A function, as those see it who want its place."""

    @property
    def name(self) -> str:
        """The function's name."""

    def tenants(self) -> Mapping[str, Tenant]:
        """Return its replicas that hold device memory, by id."""

    def evict(self, replica_id: str, *, reason: str, may_park: bool = True) -> None:
        """Park an idle replica, or stop a parked one, or one that may not be parked, now."""

    def yield_place(self, replica_id: str, *, reason: str) -> None:
        """Give a replica no more requests, and park it when it is empty."""

    def keep_place(self, replica_id: str) -> None:
        """Reverse `yield_place`; harmless for a replica that has been parked or is gone."""

    def poke(self) -> None:
        """Have its owner look again."""


@dataclass(slots=True, kw_only=True)
class _Wait:
    since: float
    device_ids: frozenset[str]
    room: Room = field(default_factory=Room)
    yielding: dict[str, Party] = field(default_factory=dict)  # by replica, since it came
    timer: asyncio.TimerHandle | None = None

    def stop_timer(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None


_Owners = Mapping[str, tuple[Party, Tenant]]


class Contention:
    """Who waits for which device, and who gives way.

    Args:
        memory: The node's books.
        clock: Its clock.
        min_residency_s: A replica is not parked for others sooner after it became ready.
        turn_s: How long a busy replica may serve while others wait for its place.
    """

    def __init__(
        self, memory: MemoryLedger, clock: Clock, *, min_residency_s: float, turn_s: float
    ) -> None:
        self._memory = memory
        self._clock = clock
        self._min_residency_s = min_residency_s
        self._turn_s = turn_s
        self._waits: dict[str, _Wait] = {}
        self._parties: Callable[[], Iterable[Party]] = tuple

    def among(self, parties: Callable[[], Iterable[Party]]) -> None:
        """Take the functions of this node from a call."""
        self._parties = parties

    def place(
        self, party: Party, replica_id: str, demand: Demand, device_ids: tuple[str, ...] = ()
    ) -> tuple[str, ...] | None:
        """Promise a replica memory, or take its function into the line and have room made.

        Args:
            party: The replica's function.
            replica_id: Which replica.
            demand: What it needs.
            device_ids: The devices it is bound to; empty for any of the right kind.

        Returns:
            The devices, or None: ask again when poked.
        """
        wanted = device_ids or tuple(one.id for one in self._memory.suitable(demand))
        num_devices = len(device_ids) or max(demand.num_gpus, 1)
        left = self._left_by_earlier(party.name, wanted)
        placed = None
        if not device_ids:
            placed = self._memory.place(replica_id, demand, left)
        elif left == wanted and self._memory.claim(replica_id, device_ids, demand):
            placed = device_ids
        if placed is None:
            self._wait(party, replica_id, demand, wanted, num_devices)
        return placed

    def has_room_elsewhere(self, party: Party, replica_id: str, demand: Demand) -> bool:
        """Return whether a replica that waits in vain for its own devices could be on others.

        In vain means that nobody there may give way now, or not before its last response, while
        others have room or may make some.
        """
        wait = self._waits.get(party.name)
        if wait is None or (wait.room.is_enough and wait.room.is_soon):
            return False
        suitable = tuple(one.id for one in self._memory.suitable(demand))
        left = self._left_by_earlier(party.name, suitable)
        num_devices = max(demand.num_gpus, 1)
        room = self._room(replica_id, demand, left, num_devices, self._owners(party), wait.since)
        return room.is_enough and (room.is_soon or not wait.room.is_enough)

    def leave(self, name: str) -> float:
        """Take a function out of the line; returns the seconds it was in it."""
        wait = self._waits.pop(name, None)
        if wait is None:
            return 0.0
        wait.stop_timer()
        self._end_yielding(wait)
        self.look_again()  # those behind may be at the head now
        return self._clock.monotonic() - wait.since

    def _end_yielding(self, wait: _Wait) -> None:
        """Let replicas serve that have yielded to one who left, unless the next one wants that."""
        for other in self._waits.values():
            if other.device_ids & wait.device_ids:
                other.yielding |= wait.yielding
                return
        for replica_id, party in wait.yielding.items():
            party.keep_place(replica_id)

    def look_again(self) -> None:
        """Have those in the line ask again: something has changed."""
        if self._waits:
            for party in self._parties():
                if party.name in self._waits:
                    party.poke()

    def _left_by_earlier(self, name: str, device_ids: tuple[str, ...]) -> tuple[str, ...]:
        """Return those devices that nobody who came earlier is about to get."""
        for other, wait in self._waits.items():
            if other == name:
                break
            if self._holds_the_line(wait):
                device_ids = tuple(one for one in device_ids if one not in wait.device_ids)
        return device_ids

    def _holds_the_line(self, wait: _Wait) -> bool:
        """Return whether others have to let it pass; not while there is no hope for it."""
        is_long = self._clock.monotonic() - wait.since >= self._turn_s
        return wait.room.is_enough or (is_long and wait.room.retry_in_s is not None)

    def _wait(
        self,
        party: Party,
        replica_id: str,
        demand: Demand,
        device_ids: tuple[str, ...],
        num_devices: int,
    ) -> None:
        now, wanted = self._clock.monotonic(), frozenset(device_ids)
        wait = self._waits.setdefault(party.name, _Wait(since=now, device_ids=wanted))
        wait.device_ids = wanted
        wait.stop_timer()
        left = self._left_by_earlier(party.name, device_ids)
        if len(left) < num_devices:
            return
        held_the_line = self._holds_the_line(wait)
        owners = self._owners(party)
        wait.room = self._room(replica_id, demand, left, num_devices, owners, wait.since)
        if wait.room.retry_in_s is not None:
            delay_s = max(wait.room.retry_in_s, 0.0) + TIMER_RESOLUTION_S
            wait.timer = asyncio.get_running_loop().call_later(delay_s, party.poke)
        if wait.room.is_enough:
            reason = f"{party.name} needs its device"
            for one in wait.room.evict:
                owners[one][0].evict(one, reason=reason)
            for one in wait.room.stop:
                owners[one][0].evict(one, reason=reason, may_park=False)
            for one in wait.room.yielding:
                wait.yielding[one] = owners[one][0]
                owners[one][0].yield_place(one, reason=reason)
        if held_the_line and not self._holds_the_line(wait):
            self.look_again()  # those behind may pass

    def _room(
        self,
        replica_id: str,
        demand: Demand,
        device_ids: Sequence[str],
        num_devices: int,
        owners: _Owners,
        since: float,
    ) -> Room:
        """Return how room is made on as many of the devices as are needed."""
        rooms = [
            make_room(
                self._on_device(device_id, owners),
                self._memory.missing_bytes(replica_id, demand, device_id),
                waited_s=self._clock.monotonic() - since,
                min_residency_s=self._min_residency_s,
                turn_s=self._turn_s,
            )
            for device_id in device_ids
        ]
        chosen = sorted(rooms, key=_preference)[:num_devices]
        retries = [room.retry_in_s for room in rooms if room.retry_in_s is not None]
        return Room(
            evict=tuple(dict.fromkeys(one for room in chosen for one in room.evict)),
            stop=tuple(dict.fromkeys(one for room in chosen for one in room.stop)),
            yielding=tuple(dict.fromkeys(one for room in chosen for one in room.yielding)),
            is_enough=all(room.is_enough for room in chosen),
            is_soon=all(room.is_soon for room in chosen),
            retry_in_s=min(retries, default=None),
        )

    def _owners(self, party: Party) -> _Owners:
        """Return the replicas that hold device memory: others', and its own that are leaving."""
        return {
            tenant.replica_id: (other, tenant)
            for other in self._parties()
            for tenant in other.tenants().values()
            if other is not party or tenant.leaves_within_s > 0
        }

    def _on_device(self, device_id: str, owners: _Owners) -> list[Tenant]:
        held = self._memory.held(device_id)
        return [
            tenant.on_device(held_bytes=held[replica_id])
            for replica_id, (_, tenant) in owners.items()
            if held.get(replica_id)
        ]


def _preference(room: Room) -> tuple[bool, bool, int, float]:
    return (not room.is_enough, not room.is_soon, len(room.stop), room.cost_s)
