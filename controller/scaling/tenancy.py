"""One function's replicas as tenants of devices: how they get a place, and how they give way."""

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

import structlog

from controller.scaling.lifecycle import ReplicaState, Tier
from controller.scaling.node import Home
from controller.scaling.replica import Replica
from controller.scaling.reuse import CallRate
from controller.scaling.room import Tenant
from functions.spec import ParkMode
from runtime.rpc import inference_pb2 as pb

if TYPE_CHECKING:
    from controller.scaling.function import Function

log = structlog.get_logger(__name__)

LIKELY_KEPT_BYTES = {ParkMode.DEEP: 8 << 20, ParkMode.LIGHT: 1 << 30}
"""What a parked engine may still hold of a GPU, before it has said so."""
_TIER_AFTER = {ReplicaState.READY: Tier.PARKED, ReplicaState.PARKED: Tier.STANDBY}
"""What is left of a replica that gives way."""


class Tenancy:
    """A function's side of the contention for devices; a `Party` of it."""

    def __init__(self, function: "Function") -> None:
        self._function = function
        self._node = function.node
        self._calls = CallRate()
        self._shown: object = None

    @property
    def name(self) -> str:
        """The function's name."""
        return self._function.name

    def called(self, now: float) -> None:
        """Count a request: functions that are called often keep their place longer."""
        self._calls.note(now)

    def settle(self, replica: Replica) -> Home | None:
        """Give a new replica devices and a runtime; None while others hold the memory or start."""
        function, demand = self._function, self._function.deployment.demand
        starts, has_callers = self._node.starts, self._function.set.num_queued > 0
        if not starts.take(self.name, replica.id, is_urgent=has_callers, poke=self.poke):
            return None
        device_ids = self._node.contention.place(self, replica.id, demand)
        if device_ids is None:
            starts.done(replica.id)
            return None
        standby = self._node.standbys.take(function.backend)
        if standby is None:
            return Home(
                deployment=function.deployment,
                runtime_id=replica.id,
                device_ids=device_ids,
                backend=function.backend,
            )
        return Home(
            deployment=function.deployment,
            runtime_id=standby.runtime_id,
            device_ids=device_ids,
            backend=function.backend,
            tier=Tier.STANDBY if standby.is_ready else Tier.STOPPED,
            standby=standby,
            is_generic=True,
        )

    def reclaim(self, replica: Replica) -> bool:
        """Give a parked replica its devices' memory back; False while others hold it."""
        demand = self._function.deployment.demand
        device_ids = self._function.homes[replica.id].device_ids
        return self._node.contention.place(self, replica.id, demand, device_ids) is not None

    def has_room_elsewhere(self, replica: Replica) -> bool:
        """Return whether a parked replica had better be started anew on other devices."""
        demand = self._function.deployment.demand
        return self._node.contention.has_room_elsewhere(self, replica.id, demand)

    def leave_line(self) -> float:
        """Wait for no device any more; returns the seconds it was waited for."""
        return self._node.contention.leave(self.name)

    def show(self) -> None:
        """Have those in the line ask again if they would not see the same tenants any more."""
        replicas = self._function.set
        shown = (
            replicas.floor,
            replicas.num_queued > 0,
            [
                (one.id, one.state, one.in_flight > 0, replicas.yields(one))
                for one in replicas.replicas.values()
            ],
        )
        if shown != self._shown:
            self._shown = shown
            self._node.contention.look_again()

    def adopted(self, replica: Replica) -> None:
        """Note what a replica holds that was there already."""
        device_ids = self._function.homes[replica.id].device_ids
        if replica.state is ReplicaState.PARKED:
            self.parked(replica, self._function.links[replica.id].status.memory.kept_bytes)
        else:
            self._node.memory.hold(replica.id, device_ids, self._function.deployment.demand)

    def reported(self, replica: Replica, status: pb.RuntimeStatus) -> None:
        """Take the memory back that a replica has released, while the rest is still suspended."""
        memory = status.memory
        if (
            replica.state is ReplicaState.PARKING
            and status.state == pb.RUNTIME_STATE_PARKING
            and not (memory.weights_bytes or memory.kv_cache_bytes)
        ):
            device_ids = self._function.homes[replica.id].device_ids
            self._node.memory.keep(replica.id, device_ids, memory.kept_bytes)

    def parked(self, replica: Replica, kept_bytes: int) -> None:
        """Note that a replica holds no more than this of each of its devices."""
        self._function.links[replica.id].kept_bytes = kept_bytes
        self._node.memory.keep(replica.id, self._function.homes[replica.id].device_ids, kept_bytes)

    def host_bytes(self) -> Mapping[str, int]:
        """Return what its replicas hold of the host's memory, as they have said last, by state."""
        held: Counter[str] = Counter()
        for replica_id, link in self._function.links.items():
            if (replica := self._function.set.replicas.get(replica_id)) is not None:
                held[str(replica.state)] += link.status.memory.host_rss_bytes
        return held

    def park_obstacle(self, replica: Replica) -> str:
        """Return why a replica must be stopped rather than parked; empty if it may be parked."""
        return self._node.host_memory.shortage() if self._moved_bytes(replica) else ""

    def parks(self, replica: Replica) -> None:
        """Set aside what the park that begins will take of the host's memory."""
        if moved_bytes := self._moved_bytes(replica):
            self._node.host_memory.promise(replica, moved_bytes)

    def promised_bytes(self, home: Home) -> int:
        """Return how much of each of its GPUs a replica was promised; 0 on the CPU."""
        gpus = [self._node.memory.devices[gpu] for gpu in home.gpus]
        return min((self._function.deployment.demand.bytes_on(gpu) for gpu in gpus), default=0)

    @property
    def reuse_probability(self) -> float:
        """How likely the function is to be called within a minute."""
        return self._calls.reuse_probability(self._function.clock.monotonic())

    def tenants(self) -> dict[str, Tenant]:
        """Return its replicas that hold device memory, by id."""
        function, now = self._function, self._function.clock.monotonic()
        reuse = self.reuse_probability
        return {
            replica.id: Tenant(
                replica_id=replica.id,
                state=replica.state,
                kept_bytes=self._kept_bytes(replica),
                value_s=reuse
                * function.books.reload_s(_TIER_AFTER.get(replica.state, Tier.STOPPED)),
                resident_s=now - replica.lifecycle.since,
                idle_s=now - replica.idle_since,
                is_busy=replica.in_flight > 0 or self._has_callers(replica),
                is_needed=function.set.is_needed(replica),
                is_yielding=function.set.yields(replica),
                refuses_s=replica.parking.retry_at - now if replica.parking.holds(now) else 0.0,
            )
            for replica in function.set.replicas.values()
            if replica.id in function.homes
        }

    def evict(self, replica_id: str, *, reason: str, may_park: bool = True) -> None:
        """Park an idle replica, or stop a parked one, or one that may not be parked, now."""
        function, now = self._function, self._function.clock.monotonic()
        replica = function.set.replicas[replica_id]
        instruction = function.set.evict(replica, now=now, reason=reason, may_park=may_park)
        if instruction is not None:
            function.execute([instruction])

    def yield_place(self, replica_id: str, *, reason: str) -> None:
        """Give a replica no more requests, and park it when it is empty."""
        replicas = self._function.set
        if replicas.yield_place(replicas.replicas[replica_id]):
            log.info("replica yields", function=self.name, replica_id=replica_id, reason=reason)
            self.poke()

    def keep_place(self, replica_id: str) -> None:
        """Reverse `yield_place`; harmless for a replica that has been parked or is gone."""
        replica = self._function.set.replicas.get(replica_id)
        if replica is not None and replica.is_yielding:
            log.info("replica serves on", function=self.name, replica_id=replica_id)
            replica.is_yielding = False
            self.poke()

    def poke(self) -> None:
        """Have the function's owner look again."""
        self._function.poke()

    def _moved_bytes(self, replica: Replica) -> int:
        """Return how much a park is likely to move to the host: what a light one would leave."""
        is_deep = self._function.spec.scaling.park is ParkMode.DEEP
        num_gpus = len(self._function.homes[replica.id].gpus)
        return num_gpus * LIKELY_KEPT_BYTES[ParkMode.LIGHT] if is_deep else 0

    def _has_callers(self, replica: Replica) -> bool:
        """Return whether requests are about to be given to a replica."""
        replicas = self._function.set
        has_queue = replica.state is ReplicaState.READY and replicas.num_queued > 0
        return has_queue and not replicas.yields(replica)

    def _kept_bytes(self, replica: Replica) -> int:
        """Return what a replica holds of each device when parked, as far as that is known."""
        function, link = self._function, self._function.links.get(replica.id)
        if link is not None and link.kept_bytes is not None:
            return link.kept_bytes
        has_gpu = bool(function.homes[replica.id].gpus)
        return LIKELY_KEPT_BYTES[function.spec.scaling.park] if has_gpu else 0
