"""Which devices a replica gets.

A GPU serves one resident replica at a time; parked replicas hold no memory and so no GPU. A
function that asks for no GPU shares the machine's processor.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum

CPU_DEVICE_ID = "cpu:0"


class DeviceKind(StrEnum):
    """What a replica computes on."""

    GPU = "gpu"
    CPU = "cpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One accelerator, or the processor of a machine."""

    id: str  # GPU UUID, or "cpu:0"
    kind: DeviceKind
    memory_bytes: int


class Unschedulable(Exception):
    """The machine can never hold the replica."""


class DevicePool:
    """Who holds which device.

    Args:
        devices: All devices of the machine.
    """

    def __init__(self, devices: Iterable[Device]) -> None:
        self.devices = tuple(devices)
        self._holders: dict[str, str] = {}
        self._on_release: Callable[[], None] = lambda: None

    def on_release(self, call: Callable[[], None]) -> None:
        """Have something called after every release; somebody may be waiting for the device."""
        self._on_release = call

    def check(self, num_gpus: int) -> None:
        """Check that the machine could ever place a replica.

        Raises:
            Unschedulable: It has too few GPUs.
        """
        total = len(self._gpu_ids())
        if num_gpus > total:
            raise Unschedulable(
                f"resources.gpus is {num_gpus} and this machine has {total}; lower it, or set it "
                "to 0 to run on the CPU"
            )

    def reserve(self, replica_id: str, num_gpus: int) -> tuple[str, ...] | None:
        """Give a replica its devices, or None while too few are free."""
        if num_gpus == 0:
            return (CPU_DEVICE_ID,)
        free = [gpu for gpu in self._gpu_ids() if gpu not in self._holders]
        if len(free) < num_gpus:
            return None
        chosen = tuple(free[:num_gpus])
        self._holders.update(dict.fromkeys(chosen, replica_id))
        return chosen

    def claim(self, replica_id: str, device_ids: Iterable[str]) -> bool:
        """Take back the devices a parked replica used, all or none; says whether it got them."""
        gpus = [device for device in device_ids if device != CPU_DEVICE_ID]
        if any(self._holders.get(gpu, replica_id) != replica_id for gpu in gpus):
            return False
        self._holders.update(dict.fromkeys(gpus, replica_id))
        return True

    def release(self, replica_id: str) -> None:
        """Free whatever a replica holds; harmless when it holds nothing."""
        held = [gpu for gpu, holder in self._holders.items() if holder == replica_id]
        for gpu in held:
            del self._holders[gpu]
        if held:
            self._on_release()

    def _gpu_ids(self) -> list[str]:
        return [device.id for device in self.devices if device.kind is DeviceKind.GPU]
