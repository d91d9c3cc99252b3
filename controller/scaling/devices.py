"""The devices of this machine: GPUs from NVML, and the processor."""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

import pynvml

from controller.scaling.lifecycle import ReplicaState
from controller.scaling.placement import CPU_DEVICE_ID, Device, DeviceKind
from controller.scaling.replica import Replica

ANSWER_TIMEOUT_S = 2.0

_asked: dict[str, "Future[int | None]"] = {}
"""What each GPU was asked last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostMemory:
    """The memory of the machine itself, which deep parking takes.

    Attributes:
        floor_bytes: Nothing is parked deep while less than this is available.
        available_bytes: Returns how much could be had now, page cache included.
    """

    floor_bytes: int
    available_bytes: Callable[[], int] = lambda: _host_memory_bytes("MemAvailable")
    _parks: dict[Replica, int] = field(default_factory=dict, init=False)

    def shortage(self) -> str:
        """Return why nothing may be parked deep now; empty if it may."""
        promised = self._promised_bytes()
        left = max(self.available_bytes() - promised, 0)
        if left >= self.floor_bytes:
            return ""
        beside = f" beside {promised / 2**30:.1f} GiB for parks under way" if promised else ""
        return (
            f"{left / 2**30:.1f} GiB of host memory are available{beside}, less than "
            f"COLDSPARK_PARK_FLOOR_BYTES, {self.floor_bytes / 2**30:.1f} GiB"
        )

    def promise(self, replica: Replica, num_bytes: int) -> None:
        """Set aside what a deep park may take, until it is over."""
        self._parks[replica] = num_bytes

    def _promised_bytes(self) -> int:
        for replica in list(self._parks):
            if replica.state is not ReplicaState.PARKING:
                del self._parks[replica]
        return sum(self._parks.values())


def find_devices() -> list[Device]:
    """Return every GPU by UUID, then the processor."""
    cpu = Device(id=CPU_DEVICE_ID, kind=DeviceKind.CPU, memory_bytes=_host_memory_bytes("MemTotal"))
    return [*_gpus(), cpu]


def cache_budget_bytes(wanted_bytes: int | None, devices: Sequence[Device]) -> int:
    """Return how much of the host's memory may hold weights; see `Settings.host_cache_bytes`."""
    if wanted_bytes is not None:
        return wanted_bytes
    kinds = {device.kind: device.memory_bytes for device in devices}
    return kinds[DeviceKind.CPU] // 4 if DeviceKind.GPU in kinds else 0


async def measure(device: Device) -> int | None:
    """Return the memory in use on a device now; None when it cannot be read in a moment.

    A GPU may be slow to answer, since a process is being taken off it, or never answer, since it has
    fallen off its bus. So each is asked in a thread of its own, and not again before it has answered.
    """
    if device.kind is DeviceKind.CPU:
        return device.memory_bytes - await asyncio.to_thread(_host_memory_bytes, "MemAvailable")
    answer = _asked.get(device.id)
    if answer is None or answer.done():
        answer = _asked[device.id] = Future()
        threading.Thread(target=_answer, args=(answer, device), name="nvml", daemon=True).start()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            return await asyncio.wrap_future(answer)
    return None


def _answer(answer: "Future[int | None]", device: Device) -> None:
    answer.set_running_or_notify_cancel()  # those who wait may leave, and it is answered still
    try:
        answer.set_result(_used_bytes(device))
    except Exception as error:  # noqa: BLE001  # who waits raises it
        answer.set_exception(error)


def _used_bytes(device: Device) -> int | None:
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(device.id)
        # Without a version, what the driver reserves is counted as used.
        return int(pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2).used)
    except pynvml.NVMLError:
        return None


def _gpus() -> list[Device]:
    try:
        pynvml.nvmlInit()
        handles = [
            pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())
        ]
        return [
            Device(
                id=str(pynvml.nvmlDeviceGetUUID(handle)),
                kind=DeviceKind.GPU,
                memory_bytes=int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
            )
            for handle in handles
        ]
    except pynvml.NVMLError:
        return []


def _host_memory_bytes(field: str) -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, amount = line.partition(":")
        if name == field:
            return int(amount.split()[0]) * 1024
    raise LookupError(f"/proc/meminfo has no {field}")
