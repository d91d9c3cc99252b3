"""Runtimes as they are against replicas as they should be: adopt, remove, replace."""

import asyncio
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import structlog

from controller.backends.base import (
    BackendError,
    BackendUnavailable,
    RuntimeBackend,
    RuntimeInfo,
    RuntimePhase,
)
from controller.ledger.intervals import AdoptedClaim, LedgerState
from controller.scaling.function import Function
from controller.scaling.lifecycle import ReplicaState
from controller.scaling.link import RuntimeLink
from controller.scaling.node import Home, Node
from controller.scaling.placement import CPU_DEVICE_ID
from controller.scaling.standby import Standby
from runtime.rpc import inference_pb2 as pb
from runtime.rpc.client import RuntimeRpcError
from runtime.version import VERSION

log = structlog.get_logger(__name__)

HEALTH_TIMEOUT_S = 5.0
LIVENESS_LIMIT_S = 30.0
ADOPTABLE = {
    pb.RUNTIME_STATE_READY: ReplicaState.READY,
    pb.RUNTIME_STATE_PARKED: ReplicaState.PARKED,
}
"""What can be taken over; a half-started runtime is removed, which costs no request."""

RESTING = frozenset({ReplicaState.READY, ReplicaState.PARKED})
"""States in which no call to the runtime is under way that would fail by itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A running runtime that still fits its function."""

    function: Function
    replica_id: str
    runtime_hash: str
    home: Home
    link: RuntimeLink
    state: ReplicaState


async def find_adoptable(
    backend: RuntimeBackend,
    functions: Mapping[str, Function],
    owned: Callable[[], AbstractSet[str]],
    node: Node,
) -> list[Found]:
    """Return a backend's running runtimes to take over; remove all others of this cluster.

    Those without a model go to the pool. Replicas that are owned already are left alone. The end of
    a removed one's log is kept.

    Raises:
        BackendError: The backend cannot say what there is.
    """
    infos = await backend.list()
    checked = await asyncio.gather(
        *(
            _check(info, backend, functions, node)
            for info in infos
            if info.runtime_id not in owned()
        )
    )
    return [candidate for candidate in checked if candidate is not None]


def adopted_claims(found: Iterable[Found]) -> dict[str, AdoptedClaim]:
    """Return what the ledger must know of the replicas that were taken over, by id."""
    return {
        candidate.replica_id: AdoptedClaim(
            function=candidate.function.name,
            devices=candidate.home.device_ids,
            state=LedgerState.PARKED
            if candidate.state is ReplicaState.PARKED
            else LedgerState.IDLE,
            rate_usd_per_hour=candidate.function.books.rate_usd_per_hour,
            last_active_us=int(candidate.link.status.last_active_unix_us) or None,
        )
        for candidate in found
    }


async def replace_silent(function: Function) -> None:
    """Give up replicas whose runtime does not answer, or whose engine died or is silent.

    Parked ones too: else the next request would be the first to notice, and would wait for it.
    """
    for replica in list(function.set.replicas.values()):
        link = function.links.get(replica.id)
        if link is None or replica.state not in RESTING:
            continue
        try:
            status = await link.connection.health(timeout_s=LIVENESS_LIMIT_S)
        except RuntimeRpcError as error:
            function.lost(replica, f"the runtime does not answer: {error}")
            continue
        link.status = status
        if status.state == pb.RUNTIME_STATE_FAILED:
            function.lost(replica, f"the engine died: {status.error}")
        elif status.heartbeat_age_s > LIVENESS_LIMIT_S:
            function.lost(replica, f"the engine was silent for {status.heartbeat_age_s:.0f} s")


async def remove_orphans(
    backends: Iterable[RuntimeBackend], owned: Callable[[], AbstractSet[str]]
) -> int:
    """Remove every runtime that is no function's replica; returns how many.

    Args:
        backends: Where to look.
        owned: Returns the ids of all replicas. Asked before and after each listing, which takes
            time: a replica may have been created, or may be on its way out, meanwhile.
    """
    num_removed = 0
    for backend in backends:
        try:
            before = owned()
            for info in await backend.list():
                if info.runtime_id not in before | owned():
                    log.warning("removing an orphan", runtime_id=info.runtime_id)
                    await backend.delete(info.runtime_id)
                    num_removed += 1
        except BackendUnavailable:
            # Said at the start already; a machine without Docker needs no warning every time.
            continue
        except BackendError as error:
            log.warning("cannot look for orphans", backend=backend.name, error=str(error))
    return num_removed


async def _check(
    info: RuntimeInfo,
    backend: RuntimeBackend,
    functions: Mapping[str, Function],
    node: Node,
) -> Found | None:
    link = RuntimeLink(node.connect(info.endpoint))
    try:
        if info.phase is RuntimePhase.RUNNING:
            link.status = await link.connection.health(timeout_s=HEALTH_TIMEOUT_S)
            if (found := _fit(info, backend, functions, link, node)) is not None:
                await link.attach()
                return found
            if _is_standby(info, link.status):
                node.standbys.give(Standby(runtime_id=info.runtime_id, backend=backend, link=link))
                return None
    except RuntimeRpcError as error:
        log.warning("cannot adopt", runtime_id=info.runtime_id, error=str(error))
    await link.close()
    log.info("removing a runtime that cannot be adopted", runtime_id=info.runtime_id)
    if (function := functions.get(link.status.owner.function or info.function)) is not None:
        await node.last_logs.keep(function.name, backend, info.runtime_id)
    try:
        await backend.delete(info.runtime_id)
    except BackendError as error:
        log.warning("delete failed", runtime_id=info.runtime_id, error=str(error))
    return None


def _fit(
    info: RuntimeInfo,
    backend: RuntimeBackend,
    functions: Mapping[str, Function],
    link: RuntimeLink,
    node: Node,
) -> Found | None:
    """Return the runtime as its owner's replica; None if that does not want it any more."""
    status = link.status
    function, state = functions.get(status.owner.function), ADOPTABLE.get(status.state)
    if function is None or state is None or function.backend is not backend:
        return None
    if function.deployment.runtime_hash != status.owner.revision:
        return None
    device_ids = tuple(status.device_uuids) or (CPU_DEVICE_ID,)
    if not node.memory.devices.keys() >= set(device_ids):
        return None  # a GPU we do not see has no books, and could not be woken on
    home = Home(
        deployment=function.deployment,
        runtime_id=info.runtime_id,
        device_ids=device_ids,
        backend=backend,
        is_generic=not info.function,
    )
    return Found(
        function=function,
        replica_id=status.owner.replica_id,
        runtime_hash=status.owner.revision,
        home=home,
        link=link,
        state=state,
    )


def _is_standby(info: RuntimeInfo, status: pb.RuntimeStatus) -> bool:
    is_generic = not info.function and status.build == VERSION
    return is_generic and status.state == pb.RUNTIME_STATE_STANDBY
