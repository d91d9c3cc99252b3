"""The state of one runtime: keeps a zygote alive, at most one engine, and says what is allowed.

    STARTING → STANDBY → LOADING → READY ⇄ PARKED (through PARKING and LOADING)
                                   READY → DRAINING
    any of them → FAILED → LOADING
    READY, PARKED, DRAINING, FAILED → UNLOADING → STANDBY

Operations are decided here synchronously, so that two of them can never overlap; they run to their
end even when the caller goes away.
"""

import asyncio
import re
from collections.abc import Coroutine, Iterator, Set
from contextlib import contextmanager
from typing import Any, TypeAlias, TypeVar

import structlog

from runtime.engine_handle import EngineHandle
from runtime.engine_stream import EngineStream
from runtime.errors import (
    EngineDied,
    InvalidRequest,
    RuntimeFault,
    ShuttingDown,
    UnknownSnapshot,
    WrongState,
    ZygoteDied,
    as_fault,
)
from runtime.fork_server import ForkServer
from runtime.ipc import FrameKind
from runtime.memory.checkpoint import KEPT_BYTES, CheckpointFailed, ProcessCheckpoints
from runtime.phases import PhaseLog
from runtime.restarts import WINDOW_S, Restarts
from runtime.rpc import inference_pb2 as pb
from runtime.spawn import ZygoteOptions, ZygoteProcess, spawn_zygote
from runtime.status_board import StatusBoard
from runtime.suspension import Suspension

_SNAPSHOT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}@[0-9a-f]{12}")
_LOADABLE = frozenset(
    {pb.RUNTIME_STATE_STARTING, pb.RUNTIME_STATE_STANDBY, pb.RUNTIME_STATE_FAILED}
)
_DRAINABLE = frozenset({pb.RUNTIME_STATE_READY, pb.RUNTIME_STATE_DRAINING})
_UNLOADABLE = _DRAINABLE | {pb.RUNTIME_STATE_PARKED, pb.RUNTIME_STATE_FAILED}
_ATTACHABLE = _DRAINABLE | {pb.RUNTIME_STATE_PARKING, pb.RUNTIME_STATE_PARKED}

State: TypeAlias = pb.RuntimeState.ValueType

STOP_GRACE_S = 2.0  # for operations to end when everything below us is gone

ResultT = TypeVar("ResultT")

log = structlog.get_logger()


class Supervisor:
    """Owns the processes below the runtime server.

    Args:
        options: How to start a zygote again after one died.
        board: Receives every change.
        suspension: Takes engines off their GPUs; None for the CUDA driver's checkpoints.
    """

    def __init__(
        self, options: ZygoteOptions, board: StatusBoard, suspension: Suspension | None = None
    ) -> None:
        self._options = options
        self._board = board
        self._zygote: ForkServer | None = None
        self._suspension = suspension or Suspension(ProcessCheckpoints.open)
        self._engine: EngineHandle | None = None
        self._suspended: EngineHandle | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._restarts = Restarts()
        self._restart: asyncio.Task[None] | None = None

    def start(self, zygote: ZygoteProcess) -> None:
        """Take over the first zygote."""
        self._zygote = ForkServer(
            zygote, on_ready=self._zygote_is_ready, on_dead=self._zygote_is_dead
        )

    async def load(self, request: pb.LoadRequest) -> pb.LoadResponse:
        """Fork an engine and bring a snapshot to READY; waits for a starting zygote.

        Raises:
            RuntimeFault: Refused with the state unchanged, or failed and now FAILED.
        """
        self._check_snapshot(request.snapshot)
        self._move("load", _LOADABLE, pb.RUNTIME_STATE_LOADING)
        self._board.engine_wanted(request)
        log.info("assigned", replica_id=request.owner.replica_id, snapshot=request.snapshot)
        return await self._to_the_end(self._load(request), name="load")

    async def embed(self, request: pb.EmbedRequest) -> pb.EmbedResponse:
        """Embed texts; a caller that leaves takes them along.

        Raises:
            WrongState: Not READY, or the engine generates.
            InvalidSequence: A text that the engine cannot embed; none of the call was.
            RuntimeFault: The engine could not.
        """
        if self._board.state != pb.RUNTIME_STATE_READY:
            raise WrongState(f"cannot embed: the runtime is {self._state_name}")
        return await self._living_engine.embed(request)

    async def park(self, request: pb.ParkRequest) -> pb.ParkResponse:
        """Give back weights and KV cache.

        Raises:
            WrongState: Not READY, or sequences are in flight.
        """
        self._move("park", {pb.RUNTIME_STATE_READY}, pb.RUNTIME_STATE_PARKING)
        return await self._to_the_end(self._park(request), name="park")

    async def wake(self, request: pb.WakeRequest) -> pb.WakeResponse:
        """Take weights and KV cache back.

        Raises:
            WrongState: Not PARKED.
            RuntimeFault: The engine could not; it is PARKED again, or FAILED if it died.
        """
        self._move("wake", {pb.RUNTIME_STATE_PARKED}, pb.RUNTIME_STATE_LOADING)
        return await self._to_the_end(self._wake(request), name="wake")

    async def drain(self, request: pb.DrainRequest) -> pb.DrainResponse:
        """Refuse new sequences and wait for the running ones; again joins the first drain.

        Raises:
            WrongState: Neither READY nor DRAINING.
        """
        self._move("drain", _DRAINABLE, pb.RUNTIME_STATE_DRAINING)
        return await self._to_the_end(self._drain(request), name="drain")

    async def unload(self) -> None:
        """End the engine and be in STANDBY again, its memory free.

        Raises:
            WrongState: Something else is under way, or nothing is loaded.
        """
        self._move("unload", _UNLOADABLE, pb.RUNTIME_STATE_UNLOADING)
        await self._to_the_end(self._unload(), name="unload")

    async def profile(self, request: pb.ProfileRequest) -> pb.ProfileResponse:
        """Return what the engine has learned for later starts.

        Raises:
            WrongState: No engine is loaded.
        """
        if self._board.state not in _ATTACHABLE:
            raise WrongState(f"there is nothing to profile: the runtime is {self._state_name}")
        return await self._living_engine.call(FrameKind.PROFILE, request, pb.ProfileResponse)

    def open_stream(self) -> EngineStream:
        """Return a stream to the engine; parking and waking do not end it.

        Raises:
            WrongState: No engine is loaded.
        """
        if self._board.state not in _ATTACHABLE:
            raise WrongState(f"cannot attach: the runtime is {self._state_name}")
        return self._living_engine.open_stream()

    async def stop(self) -> None:
        """End all streams and calls, then all processes; the driver is not waited for."""
        fault = ShuttingDown("the runtime is stopping")
        if self._engine is not None:
            self._engine.fail_streams(fault)
            self._engine.fail_calls(fault)
            self._engine.close()
        self._suspension.close()
        if self._restart is not None:
            self._restart.cancel()
        if self._zygote is not None:
            await self._zygote.stop()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=STOP_GRACE_S)

    async def _load(self, request: pb.LoadRequest) -> pb.LoadResponse:
        phase_log = PhaseLog()
        engine: EngineHandle | None = None
        try:
            with phase_log.measure("runtime_import"):
                zygote = await self._ready_zygote()
            with phase_log.measure("fork"):
                engine = await EngineHandle.start(
                    zygote, on_status=self._engine_reported, on_lost=self._engine_is_lost
                )
            self._engine = engine
            self._board.engine_started(engine.pid)
            response = await engine.call(FrameKind.LOAD, request, pb.LoadResponse)
        except Exception as error:  # whatever it is, we must not stay LOADING
            if engine is self._engine:  # else its death was noted already
                await self._abandon_load(as_fault(error))
            raise
        phases = [*phase_log.phases, *response.phases]
        del response.phases[:]
        response.phases.extend(phases)
        self._board.update(
            state=pb.RUNTIME_STATE_READY,
            phases=phases,
            memory=response.memory,
            profile=response.profile,
            max_model_len=response.max_model_len,
        )
        return response

    async def _abandon_load(self, fault: RuntimeFault) -> None:
        """Say FAILED once the engine's memory is free."""
        await self._end_engine(fault)
        self._board.update(state=pb.RUNTIME_STATE_FAILED, error=str(fault))

    async def _unload(self) -> None:
        await self._end_engine(ShuttingDown("the engine was unloaded"))
        self._board.engine_forgotten()
        if self._zygote is not None and self._zygote.is_ready:
            self._board.update(state=pb.RUNTIME_STATE_STANDBY)
            return
        self._board.update(state=pb.RUNTIME_STATE_STARTING)
        if self._zygote is None or self._zygote.is_dead:
            try:
                self._start_zygote()
            except ZygoteDied as fault:
                self._give_up(str(fault))

    async def _end_engine(self, fault: RuntimeFault) -> None:
        """Kill the engine, if there is one, and return when its memory is free."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.fail_streams(fault)
            engine.fail_calls(fault)
            engine.close()
            await engine.obituary()
        self._board.engine_gone()

    async def _park(self, request: pb.ParkRequest) -> pb.ParkResponse:
        with self._undone_on_failure(pb.RUNTIME_STATE_PARKING, pb.RUNTIME_STATE_READY):
            engine = self._living_engine
            response = await engine.call(FrameKind.PARK, request, pb.ParkResponse)
        if request.mode != pb.PARK_MODE_LIGHT and self._board.has_devices:
            await self._suspend(engine, response)
        if engine is not self._engine:
            raise EngineDied("the engine died while it was parked")
        self._board.update(state=pb.RUNTIME_STATE_PARKED, memory=response.memory)
        phases = {phase.name: round(phase.seconds, 3) for phase in response.phases}
        log.info("parked", phases=phases)
        return response

    async def _suspend(self, engine: EngineHandle, response: pb.ParkResponse) -> None:
        """Take the rest of a parked engine off its GPUs, or say why it stays there."""
        try:
            response.phases.extend(await self._suspension.suspend(engine.pid))
        except CheckpointFailed as failure:
            log.warning("not_suspended", engine_pid=engine.pid, reason=str(failure))
            if failure.is_fatal:
                raise await self._given_up(engine, f"it cannot be parked: {failure}") from failure
            response.memory.kept_reason += f"; it was parked no deeper because {failure}"
        else:
            self._suspended = engine
            self._board.expect_silence(True)
            _say_suspended(response.memory)

    async def _resume(self, engine: EngineHandle) -> list[pb.Phase]:
        """Put a suspended engine back on its GPUs."""
        if engine is not self._suspended:
            return []
        try:
            phases = await self._suspension.resume(engine.pid)
        except CheckpointFailed as failure:
            raise await self._given_up(engine, f"it cannot be woken: {failure}") from failure
        self._suspended = None
        self._board.expect_silence(False)
        return phases

    async def _given_up(self, engine: EngineHandle, reason: str) -> EngineDied:
        """Kill an engine that cannot go on; returns the fault to raise."""
        fault = EngineDied(reason)
        if engine is self._engine:
            await self._end_engine(fault)
            self._board.update(state=pb.RUNTIME_STATE_FAILED, error=reason)
        return fault

    def _engine_reported(self, report: pb.RuntimeStatus) -> None:
        if self._is_suspended:
            _say_suspended(report.memory)
        self._board.engine_reported(report)

    async def _wake(self, request: pb.WakeRequest) -> pb.WakeResponse:
        with self._undone_on_failure(pb.RUNTIME_STATE_LOADING, pb.RUNTIME_STATE_PARKED):
            engine = self._living_engine
            phases = await self._resume(engine)
            response = await engine.call(FrameKind.WAKE, request, pb.WakeResponse)
            phases += response.phases
            del response.phases[:]
            response.phases.extend(phases)
        self._board.update(state=pb.RUNTIME_STATE_READY, phases=response.phases)
        return response

    async def _drain(self, request: pb.DrainRequest) -> pb.DrainResponse:
        return await self._living_engine.call(FrameKind.DRAIN, request, pb.DrainResponse)

    @property
    def _is_suspended(self) -> bool:
        """Whether the engine there is now was suspended; an earlier one may have been, and died."""
        return self._engine is not None and self._engine is self._suspended

    @property
    def _living_engine(self) -> EngineHandle:
        assert self._engine is not None, "no state that allows this is without an engine"
        return self._engine

    @property
    def _state_name(self) -> str:
        return pb.RuntimeState.Name(self._board.state).removeprefix("RUNTIME_STATE_")

    def _check_snapshot(self, name: str) -> None:
        if not _SNAPSHOT_NAME.fullmatch(name):
            raise InvalidRequest(f"snapshot {name!r} is not of the form name@digest12")
        if not (self._options.store / name / "manifest.json").is_file():
            raise UnknownSnapshot(f"the store {self._options.store} has no snapshot {name!r}")

    def _move(self, operation: str, allowed: Set[State], to: State) -> None:
        if self._board.state not in allowed:
            raise WrongState(f"cannot {operation}: the runtime is {self._state_name}")
        self._board.update(state=to)

    @contextmanager
    def _undone_on_failure(self, during: State, before: State) -> Iterator[None]:
        """Return to the state before, unless the engine's death has set another meanwhile."""
        try:
            yield
        except Exception:
            if self._board.state == during:
                self._board.update(state=before)
            raise

    async def _to_the_end(self, operation: Coroutine[Any, Any, ResultT], *, name: str) -> ResultT:
        """Run an operation that goes on when its caller is cancelled."""
        return await asyncio.shield(self._spawn(operation, name=name))

    def _spawn(
        self, operation: Coroutine[Any, Any, ResultT], *, name: str
    ) -> asyncio.Task[ResultT]:
        task = asyncio.create_task(operation, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._finish)
        return task

    def _finish(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.warning("operation_failed", operation=task.get_name(), reason=str(error))

    def _engine_is_lost(self, engine: EngineHandle) -> None:
        if engine is self._engine:
            _ = self._spawn(self._bury(engine), name="bury")

    async def _bury(self, engine: EngineHandle) -> None:
        """Learn how an engine ended, then tell everybody; that takes milliseconds."""
        death = await engine.obituary()
        log.error("engine_died", engine_pid=engine.pid, reason=str(death))
        if engine is self._engine:
            self._engine = None
            self._board.engine_gone()
            self._board.update(state=pb.RUNTIME_STATE_FAILED, error=str(death))
        engine.fail_streams(death)
        engine.fail_calls(death)

    async def _ready_zygote(self) -> ForkServer:
        if self._zygote is None or self._zygote.is_dead:
            self._start_zygote()
        assert self._zygote is not None
        await self._zygote.ready()
        return self._zygote

    def _zygote_is_ready(self, import_s: float) -> None:
        if self._board.state == pb.RUNTIME_STATE_STARTING:
            phase = pb.Phase(name="runtime_import", seconds=import_s)
            self._board.update(state=pb.RUNTIME_STATE_STANDBY, phases=[phase])

    def _zygote_is_dead(self, death: ZygoteDied, was_ready: bool) -> None:
        """Start another one, unless it could not even import: then the next load tries again."""
        log.error("zygote_died", reason=str(death))
        if not was_ready:
            self._give_up(str(death))
            return
        if self._board.state == pb.RUNTIME_STATE_STANDBY:
            self._board.update(state=pb.RUNTIME_STATE_STARTING)
        self._restarts.note_death()
        if self._restarts.is_hopeless:
            self._give_up(
                f"zygotes have died {self._restarts.num_deaths} times within {WINDOW_S:g} s, no "
                f"other is started until the next load; the last one: {death}"
            )
        else:
            self._restart = self._spawn(self._start_another(), name="restart")

    async def _start_another(self) -> None:
        await asyncio.sleep(self._restarts.delay_s)
        if self._zygote is None or not self._zygote.is_dead:
            return  # a load was faster
        try:
            self._start_zygote()
        except ZygoteDied as fault:
            self._give_up(str(fault))

    def _start_zygote(self) -> None:
        try:
            self.start(spawn_zygote(self._options))
        except OSError as error:
            raise ZygoteDied(
                f"no zygote can be started: {error}; the next load tries again"
            ) from error

    def _give_up(self, reason: str) -> None:
        """Say why there is no zygote, if nobody is at work to whom that is told anyway."""
        if self._board.state == pb.RUNTIME_STATE_STARTING:
            self._board.update(state=pb.RUNTIME_STATE_FAILED, error=reason)


def _say_suspended(memory: pb.Memory) -> None:
    """Correct what an engine says of memory that the driver has taken from it."""
    memory.kept_bytes = KEPT_BYTES
    memory.kept_reason = ""
