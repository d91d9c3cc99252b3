"""The runtime's one status: written by the supervisor, read by Health, followed by Watch."""

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncGenerator, Iterable
from typing import Any

from runtime.linux import private_bytes
from runtime.rpc import inference_pb2 as pb

REPEAT_S = 5.0  # a watcher hears from us at least this often, and sees a hung engine's age grow


class StatusBoard:
    """Holds the newest status; a slow follower skips the ones between.

    Args:
        runtime_id: Named in every status.
        build: Version of the runtime's code.
    """

    def __init__(self, *, runtime_id: str, build: str) -> None:
        self._status = pb.RuntimeStatus(
            state=pb.RUNTIME_STATE_STARTING, runtime_id=runtime_id, build=build
        )
        self._heartbeat_at: float | None = None
        self._may_be_silent = False
        self._followers: set[asyncio.Event] = set()
        self._is_closed = False

    @property
    def state(self) -> pb.RuntimeState.ValueType:
        """The present state."""
        return self._status.state

    @property
    def has_devices(self) -> bool:
        """Whether the engine is on GPUs."""
        return bool(self._status.device_uuids)

    def read(self) -> pb.RuntimeStatus:
        """Return a copy of the status, with the age of the engine's last sign of life.

        The age is 0 while none is expected. The host's memory is measured now: an engine that is
        suspended could not tell.
        """
        status = pb.RuntimeStatus()
        status.CopyFrom(self._status)
        status.memory.host_rss_bytes = private_bytes(os.getpid())
        if self._heartbeat_at is not None and not self._may_be_silent:
            status.heartbeat_age_s = time.monotonic() - self._heartbeat_at
        return status

    def update(
        self,
        *,
        phases: Iterable[pb.Phase] | None = None,
        memory: pb.Memory | None = None,
        profile: pb.ProfileUse | None = None,
        **scalars: Any,
    ) -> None:
        """Set fields and tell the followers."""
        if memory is not None:
            self._status.memory.CopyFrom(memory)
        if profile is not None:
            self._status.profile.CopyFrom(profile)
        for name, value in scalars.items():
            setattr(self._status, name, value)
        if phases is not None:
            del self._status.phases[:]
            self._status.phases.extend(phases)
        self._publish()

    def engine_wanted(self, request: pb.LoadRequest) -> None:
        """Say whose engine is being made, of which snapshot, and for which devices."""
        self._status.owner.CopyFrom(request.owner)
        self._status.device_uuids[:] = request.device_uuids
        self.update(snapshot=request.snapshot, error="", phases=[])

    def engine_forgotten(self) -> None:
        """Say nothing more of an engine that was ended on request."""
        for name in ("owner", "device_uuids", "max_model_len", "last_active_unix_us", "profile"):
            self._status.ClearField(name)
        self.update(snapshot="", error="", phases=[])

    def engine_reported(self, report: pb.RuntimeStatus) -> None:
        """Take over what a living engine says of itself: memory, figures, last activity."""
        self._heartbeat_at = time.monotonic()
        self._status.memory.CopyFrom(report.memory)
        self._status.load.CopyFrom(report.load)
        if report.last_active_unix_us:
            self._status.last_active_unix_us = report.last_active_unix_us
        self._publish()

    def engine_started(self, pid: int) -> None:
        """Expect signs of life from now on."""
        self.expect_silence(False)
        self.update(engine_pid=pid)

    def expect_silence(self, may_be_silent: bool, /) -> None:
        """Expect no signs of life of an engine that is suspended, and new ones when it is not."""
        self._may_be_silent = may_be_silent
        self._heartbeat_at = time.monotonic()

    def engine_gone(self) -> None:
        """Drop everything an engine had said; work it had in flight ended just now."""
        if self._status.load.num_running or self._status.load.num_waiting:
            self._status.last_active_unix_us = time.time_ns() // 1000
        self._heartbeat_at = None
        self._status.ClearField("memory")
        self._status.ClearField("load")
        self.update(engine_pid=0)

    async def follow(self) -> AsyncGenerator[pb.RuntimeStatus, None]:
        """Yield the status now, after every change, and after a silence, until `close`."""
        changed = asyncio.Event()
        self._followers.add(changed)
        try:
            while not self._is_closed:
                yield self.read()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(REPEAT_S):
                        await changed.wait()
                changed.clear()
        finally:
            self._followers.discard(changed)

    def close(self) -> None:
        """End all followers."""
        self._is_closed = True
        self._publish()

    def _publish(self) -> None:
        for changed in self._followers:
            changed.set()
