"""What one function's replicas have learned goes beside its snapshot, for later starts.

A start without a fitting profile is followed by a recording as soon as the replica has a quiet
moment; every parking brings the figures up to date. All of it is a convenience: what goes wrong is
logged, and requests hear nothing of it.
"""

import asyncio
from collections.abc import Coroutine, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from controller.errors import Conflict
from controller.scaling.background import Background
from controller.scaling.lifecycle import ReplicaState
from controller.scaling.link import RuntimeLink
from controller.scaling.replica import Replica
from runtime.rpc import inference_pb2 as pb
from runtime.rpc.client import RuntimeRpcError
from snapshots.errors import SnapshotError
from snapshots.profiles import (
    ColdStartTimes,
    MemoryPlan,
    Profile,
    ProfileUnusable,
    StepSize,
    find_profile,
    kernel_files,
)
from snapshots.store import SnapshotStore

if TYPE_CHECKING:
    from controller.scaling.function import Function

log = structlog.get_logger(__name__)

QUIET_S = 1.0  # a replica idle for less is likely between two calls
TIMEOUT_S = 30.0
MAX_STEPS = 256
MAX_PROPERTIES = 100
MAX_TEXT = 1000


class Profiles:
    """Records what a function's replicas have learned. Event loop only."""

    def __init__(self, function: "Function") -> None:
        self._function = function
        self._background = Background()
        self._under_way: set[str] = set()

    def idle(self, replica: Replica) -> None:
        """Note that a replica has no request: what its start missed can be recorded soon."""
        link = self._function.links.get(replica.id)
        if link is None or replica.id in self._under_way or not _misses_some(link):
            return
        self._start(replica, self._record_when_quiet(replica, link))

    def parked(self, replica: Replica) -> None:
        """Note that a replica was parked: nobody waits for it, so figures can be kept."""
        link = self._function.links.get(replica.id)
        if link is None or replica.id in self._under_way or not link.status.profile.key:
            return
        self._start(replica, self._record_quietly(replica, link))

    async def record(self) -> Profile:
        """Record what a living replica has learned, now, and return it.

        Raises:
            Conflict: None is ready or parked, or it cannot be recorded, and why.
        """
        function = self._function
        for replica in function.set.replicas.values():
            link = function.links.get(replica.id)
            if link is None or replica.state not in (ReplicaState.READY, ReplicaState.PARKED):
                continue
            try:
                return await self._record(replica, link, with_kernels=True)
            except (RuntimeRpcError, ProfileUnusable, SnapshotError, OSError) as error:
                raise Conflict(f"{function.name!r} could not be profiled: {error}") from error
        raise Conflict(f"{function.name!r} has no replica to learn from; warm it first")

    async def close(self) -> None:
        """End what is under way."""
        await self._background.cancel()

    def _start(self, replica: Replica, work: Coroutine[Any, Any, None]) -> None:
        self._under_way.add(replica.id)
        task = self._background.start(work, f"profile {replica.id}")
        task.add_done_callback(lambda _: self._under_way.discard(replica.id))

    async def _record_when_quiet(self, replica: Replica, link: RuntimeLink) -> None:
        await asyncio.sleep(QUIET_S)
        is_there = self._function.links.get(replica.id) is link
        if is_there and replica.in_flight == 0:  # else its next idle moment will do
            await self._record_quietly(replica, link)

    async def _record_quietly(self, replica: Replica, link: RuntimeLink) -> None:
        try:
            with_kernels = _misses_some(link)
            profile = await self._record(replica, link, with_kernels=with_kernels)
        except (RuntimeRpcError, ProfileUnusable, SnapshotError, OSError) as error:
            link.is_profiled = True  # the next start may have more luck
            log.warning("profile not recorded", function=self._function.name, reason=str(error))
        else:
            if with_kernels:
                log.info("profile recorded", function=self._function.name, key=profile.key)

    async def _record(self, replica: Replica, link: RuntimeLink, *, with_kernels: bool) -> Profile:
        function = self._function
        snapshot = function.deployment.snapshot
        if replica.runtime_hash != function.deployment.runtime_hash:
            raise ProfileUnusable("the replica is of an earlier revision")
        learned = await link.connection.profile(with_kernels=with_kernels, timeout_s=TIMEOUT_S)
        times = function.books.cold_start_times()
        store = SnapshotStore(function.node.snapshot_store)
        profile = await asyncio.to_thread(
            _write, store, snapshot, learned, times, with_kernels=with_kernels
        )
        if with_kernels:
            link.is_profiled = True
        return profile


def _misses_some(link: RuntimeLink) -> bool:
    use = link.status.profile
    is_complete = use.is_used and not use.num_compilations
    return bool(use.key) and not is_complete and not link.is_profiled


def _write(
    store: SnapshotStore,
    ref: str,
    learned: pb.ProfileResponse,
    times: dict[str, ColdStartTimes],
    *,
    with_kernels: bool,
) -> Profile:
    """Join what was learned with what was known, and write it unless it is the same."""
    fingerprint = _checked(learned.fingerprint.items())
    contents = {file.path: file.content for file in learned.kernels} if with_kernels else None
    profile = Profile(
        fingerprint=fingerprint,
        memory=MemoryPlan(
            weights_bytes=learned.weights_bytes,
            kv_cache_bytes=learned.kv_cache_bytes,
            num_kv_blocks=learned.num_kv_blocks,
            max_model_len=learned.max_model_len,
        ),
        kernels=() if contents is None else kernel_files(contents),
    )
    known = _known(store.root / ref, profile)
    profile = replace(
        profile,
        kernels=profile.kernels if with_kernels or known is None else known.kernels,
        steps=_joined(learned.steps, () if known is None else known.steps),
        cold_starts=times if known is None else {**known.cold_starts, **times},
    )
    if profile != known:
        store.record(ref, profile, contents)
    return profile


def _known(snapshot: Path, profile: Profile) -> Profile | None:
    try:
        return find_profile(snapshot, profile.fingerprint)
    except ProfileUnusable:
        return None


def _checked(properties: Iterable[tuple[str, str]]) -> dict[str, str]:
    fingerprint = dict(properties)
    longest = max((len(text) for pair in fingerprint.items() for text in pair), default=0)
    if len(fingerprint) > MAX_PROPERTIES or longest > MAX_TEXT:
        raise ProfileUnusable("the runtime's fingerprint is too large")
    return fingerprint


def _joined(newest: Iterable[pb.StepSize], known: Iterable[StepSize]) -> tuple[StepSize, ...]:
    """Return what the newest run has used, then what others have."""
    steps = {
        (step.num_tokens, step.num_tiles): StepSize(
            num_tokens=step.num_tokens, num_tiles=step.num_tiles, count=step.count
        )
        for step in newest
    }
    for step in known:
        steps.setdefault((step.num_tokens, step.num_tiles), step)
    return tuple(steps.values())[:MAX_STEPS]
