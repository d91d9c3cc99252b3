"""Parking and waking inside an engine process: memory out, memory in, the process stays."""

from collections.abc import Sequence

import structlog

from runtime.engine_api import OnProgress, Runner, StepEngine
from runtime.errors import WrongState, as_fault
from runtime.phases import PhaseLog, bring_up
from runtime.rpc import inference_pb2 as pb
from runtime.translate import memory_message

log = structlog.get_logger()


class Residency:
    """Whether an engine's weights and KV cache are in memory.

    Args:
        engine: Forgets what its KV cache held.
        runner: Holds the memory; awake at first.
        device_uuids: The devices this process is bound to.
    """

    def __init__(self, engine: StepEngine, runner: Runner, *, device_uuids: Sequence[str]) -> None:
        self.is_parked = False
        self._engine = engine
        self._runner = runner
        self._device_uuids = list(device_uuids)

    def park(self) -> pb.ParkResponse:
        """Give weights and KV cache back; what the cache held is forgotten.

        Raises:
            WrongState: Parked already, or sequences are in flight.
        """
        if self.is_parked:
            raise WrongState("the engine is parked already")
        if self._engine.has_work():
            raise WrongState("sequences are in flight: drain or cancel them first")
        phase_log = PhaseLog()
        with phase_log.measure("release"):
            freed_bytes = self._runner.release()
            self._engine.reset_cache()
        self.is_parked = True
        log.info("parked", freed_bytes=freed_bytes)
        memory = memory_message(self._runner)
        return pb.ParkResponse(freed_bytes=freed_bytes, phases=phase_log.phases, memory=memory)

    def wake(self, request: pb.WakeRequest, on_progress: OnProgress) -> pb.WakeResponse:
        """Take weights and KV cache back.

        Raises:
            WrongState: Not parked, or asked for other devices.
            RuntimeFault: The memory or the snapshot is not there; it stays parked.
        """
        if not self.is_parked:
            raise WrongState("the engine is not parked")
        if request.device_uuids and list(request.device_uuids) != self._device_uuids:
            raise WrongState(
                f"this engine is bound to devices {self._device_uuids}, not "
                f"{list(request.device_uuids)}: load the snapshot in another runtime"
            )
        phase_log = PhaseLog()
        try:
            bring_up(self._runner, phase_log, on_progress)
        except Exception as error:
            log.exception("wake_failed")
            self._runner.release()
            raise as_fault(error) from error
        self.is_parked = False
        log.info("woken")
        return pb.WakeResponse(phases=phase_log.phases, memory=memory_message(self._runner))
