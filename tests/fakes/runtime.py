"""Runtimes that only pretend, on loop time, and can be told to fail."""

import asyncio
import struct
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version

from runtime.rpc import inference_pb2 as pb
from runtime.rpc.client import (
    RuntimeRefused,
    RuntimeTimedOut,
    RuntimeUnavailable,
    SequenceSink,
    SnapshotUnusable,
    StreamOverrun,
)

WEIGHTS_BYTES = 1 << 20


@dataclass
class FakeRuntime:
    """One runtime: how long it takes, what it has been told, and its sequences."""

    load_s: float = 1.0
    park_s: float = 0.1
    suspend_s: float = 0.0  # more of a park, when only a context is left on the GPU
    wake_s: float = 0.2
    step_s: float = 0.01
    embed_s: float = 0.05
    fails: set[str] = field(default_factory=set)  # of "load", "attach", "park", "wake", "unload"
    damage: str = ""  # what it finds wrong with the snapshot whenever it reads it
    state: int = pb.RUNTIME_STATE_STANDBY
    calls: list[str] = field(default_factory=list)
    sequences: dict[int, asyncio.Task[None]] = field(default_factory=dict)
    sinks: dict[int, SequenceSink] = field(default_factory=dict)
    watchers: list[asyncio.Queue[pb.RuntimeStatus | None]] = field(default_factory=list)
    is_alive: bool = True
    is_stuck: bool = False
    num_submitted: int = 0
    num_cached_tokens: int = 0
    kept_bytes: int = 0
    context_bytes: int = 0
    host_bytes: int = 0
    park_modes: list[int] = field(default_factory=list)
    heartbeat_age_s: float = 0.0
    profile: pb.ProfileUse | None = None
    learned: pb.ProfileResponse = field(default_factory=pb.ProfileResponse)
    owner: pb.Owner | None = None
    device_uuids: list[str] = field(default_factory=list)

    def status(self) -> pb.RuntimeStatus:
        """What it says about itself."""
        held = WEIGHTS_BYTES if self.state == pb.RUNTIME_STATE_READY else 0
        return pb.RuntimeStatus(
            build=version("coldspark"),
            owner=self.owner,
            device_uuids=self.device_uuids,
            state=self.state,  # type: ignore[arg-type]  # the stubs want the enum type
            memory=pb.Memory(
                weights_bytes=held,
                kept_bytes=self.context_bytes,
                host_rss_bytes=self.host_bytes,
            ),
            heartbeat_age_s=self.heartbeat_age_s,
            profile=self.profile,
        )

    def enter(self, state: int) -> None:
        """Change state and tell the watchers."""
        self.state = state
        for watcher in self.watchers:
            watcher.put_nowait(self.status())

    def crash(self) -> None:
        """Die: streams break, watchers end, calls fail."""
        self.is_alive = False
        for task in self.sequences.values():
            task.cancel()
        sinks, self.sinks = self.sinks, {}
        for sink in sinks.values():
            sink.on_broken(RuntimeUnavailable("the runtime is gone"))
        for watcher in self.watchers:
            watcher.put_nowait(None)

    def overrun(self) -> None:
        """Cancel every sequence because they are read too slowly; be well."""
        sequences, self.sequences = self.sequences, {}
        for task in sequences.values():
            task.cancel()
        sinks, self.sinks = self.sinks, {}
        for sink in sinks.values():
            sink.on_broken(StreamOverrun("read faster"))

    async def work(self, name: str, seconds: float) -> None:
        """Take time over a call, and fail it if told to."""
        self.calls.append(name)
        await asyncio.sleep(seconds)
        if not self.is_alive:
            raise RuntimeUnavailable("the runtime is gone")
        if name in self.fails:
            raise RuntimeRefused(f"told to refuse {name}")
        if self.damage and name in {"load", "wake"}:
            raise SnapshotUnusable(self.damage)


class FakeAttachment:
    """The stream of sequences of a fake runtime."""

    def __init__(self, runtime: FakeRuntime) -> None:
        self._runtime = runtime

    @property
    def is_broken(self) -> bool:
        """Whether nothing can be submitted any more."""
        return not self._runtime.is_alive

    def submit(
        self,
        prompt_token_ids: Sequence[int],
        sampling: pb.SamplingParams,
        sink: SequenceSink,
        *,
        priority: int = 0,
        cache_salt: str = "",
    ) -> int:
        """Begin to produce max_tokens tokens: the prompt's length, counting up."""
        runtime = self._runtime
        if not runtime.is_alive:
            raise RuntimeUnavailable("the runtime is gone")
        assert runtime.state == pb.RUNTIME_STATE_READY, "a sequence for a runtime that is not ready"
        runtime.num_submitted += 1
        sequence_id = runtime.num_submitted
        runtime.sinks[sequence_id] = sink
        runtime.sequences[sequence_id] = asyncio.create_task(
            self._generate(sequence_id, len(prompt_token_ids), sampling.max_tokens)
        )
        return sequence_id

    def cancel(self, sequence_id: int) -> None:
        """End a sequence at the next turn of the loop."""
        asyncio.get_running_loop().call_soon(
            self._finish, sequence_id, pb.FINISH_REASON_CANCELLED, 0
        )

    async def close(self) -> None:
        """Nothing to close."""

    async def _generate(self, sequence_id: int, first: int, max_tokens: int) -> None:
        runtime = self._runtime
        for offset in range(max_tokens):
            await asyncio.sleep(1e9 if runtime.is_stuck else runtime.step_s)
            if offset == 0:
                runtime.sinks[sequence_id].on_started(
                    pb.Started(sequence_id=sequence_id, num_cached_tokens=runtime.num_cached_tokens)
                )
            runtime.sinks[sequence_id].on_token(first + offset)
        self._finish(sequence_id, pb.FINISH_REASON_LENGTH, max_tokens)

    def _finish(self, sequence_id: int, reason: int, num_tokens: int) -> None:
        task = self._runtime.sequences.pop(sequence_id, None)
        sink = self._runtime.sinks.pop(sequence_id, None)
        if task is not None and task is not asyncio.current_task():
            task.cancel()
        if sink is not None:
            sink.on_finished(
                pb.Finished(
                    sequence_id=sequence_id,
                    reason=reason,  # type: ignore[arg-type]  # the stubs want the enum type
                    num_output_tokens=num_tokens,
                )
            )


class FakeConnection:
    """The client of a fake runtime."""

    def __init__(self, runtime: FakeRuntime) -> None:
        self._runtime = runtime

    async def wait_reachable(self, timeout_s: float) -> None:
        """Return at once from a living runtime, and never from a dead one."""
        if not self._runtime.is_alive:
            await asyncio.sleep(timeout_s)
            raise RuntimeUnavailable("nothing answers")

    async def load(self, request: pb.LoadRequest, *, timeout_s: float) -> pb.LoadResponse:
        """Become ready."""
        self._runtime.owner = request.owner
        self._runtime.device_uuids = list(request.device_uuids)
        await self._runtime.work("load", self._runtime.load_s)
        self._runtime.enter(pb.RUNTIME_STATE_READY)
        return pb.LoadResponse(phases=[pb.Phase(name="read", seconds=self._runtime.load_s)])

    async def embed(self, request: pb.EmbedRequest, *, timeout_s: float) -> pb.EmbedResponse:
        """Return each text's length as its vector."""
        assert self._runtime.state == pb.RUNTIME_STATE_READY, "texts for a runtime not ready"
        await self._runtime.work("embed", min(self._runtime.embed_s, timeout_s))
        if self._runtime.embed_s > timeout_s:
            raise RuntimeTimedOut("too slow")
        return pb.EmbedResponse(
            embeddings=[struct.pack("<f", len(text.token_ids)) for text in request.texts]
        )

    async def park(self, *, timeout_s: float, mode: pb.ParkMode.ValueType) -> pb.ParkResponse:
        """Become parked, unless sequences run."""
        self._runtime.park_modes.append(mode)
        if self._runtime.sequences:
            raise RuntimeRefused("sequences in flight")
        await self._runtime.work("park", self._runtime.park_s)
        if self._runtime.suspend_s:
            self._runtime.enter(pb.RUNTIME_STATE_PARKING)
            await self._runtime.work("suspend", self._runtime.suspend_s)
        self._runtime.enter(pb.RUNTIME_STATE_PARKED)
        memory = pb.Memory(kept_bytes=self._runtime.kept_bytes)
        return pb.ParkResponse(freed_bytes=WEIGHTS_BYTES, memory=memory)

    async def wake(self, device_uuids: Sequence[str], *, timeout_s: float) -> pb.WakeResponse:
        """Become ready again."""
        await self._runtime.work("wake", self._runtime.wake_s)
        self._runtime.enter(pb.RUNTIME_STATE_READY)
        return pb.WakeResponse(phases=[pb.Phase(name="read", seconds=self._runtime.wake_s)])

    async def profile(self, *, with_kernels: bool, timeout_s: float) -> pb.ProfileResponse:
        """Say what was learned."""
        await self._runtime.work("profile with kernels" if with_kernels else "profile", 0.0)
        learned = pb.ProfileResponse()
        learned.CopyFrom(self._runtime.learned)
        if not with_kernels:
            del learned.kernels[:]
        return learned

    async def unload(self, *, timeout_s: float) -> None:
        """Be in standby again."""
        await self._runtime.work("unload", 0.05)
        self._runtime.owner, self._runtime.device_uuids = None, []
        self._runtime.enter(pb.RUNTIME_STATE_STANDBY)

    async def health(self, *, timeout_s: float) -> pb.RuntimeStatus:
        """Say how it is."""
        if not self._runtime.is_alive:
            raise RuntimeUnavailable("nothing answers")
        return self._runtime.status()

    async def watch(self) -> AsyncIterator[pb.RuntimeStatus]:
        """Yield a status now and after each change."""
        queue: asyncio.Queue[pb.RuntimeStatus | None] = asyncio.Queue()
        self._runtime.watchers.append(queue)
        yield self._runtime.status()
        while (status := await queue.get()) is not None:
            yield status
        raise RuntimeUnavailable("the runtime is gone")

    async def attach(self) -> FakeAttachment:
        """Open a stream."""
        if "attach" in self._runtime.fails:
            raise RuntimeRefused("told to refuse attach")
        return FakeAttachment(self._runtime)

    async def close(self) -> None:
        """Nothing to close."""
