"""Which devices a replica gets: the node's books of device memory.

Every byte a replica may use is promised to it before it starts or wakes, so that no start runs out
of memory because of another function. A parked replica is promised what it still holds. What
processes that are not ours hold is promised to nobody.
"""

from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from functions.spec import FunctionSpec

CPU_DEVICE_ID = "cpu:0"
ENGINE_OVERHEAD_BYTES = 2 << 30
"""Of a GPU: context, kernels, CUDA graphs and the results of a step."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What a replica needs to be ready.

    Attributes:
        num_gpus: How many GPUs; 0 for the processor.
        memory_bytes: Of each device; None for a share.
        memory_share: Of each device's memory, if no size is given.
    """

    num_gpus: int
    memory_bytes: int | None = None
    memory_share: float = 1.0

    def bytes_on(self, device: Device) -> int:
        """Return how much of a device's memory it needs."""
        if self.memory_bytes is not None:
            return self.memory_bytes
        return int(self.memory_share * device.memory_bytes)


class Unschedulable(Exception):
    """The machine can never hold the replica.

    Args:
        message: What it lacks and what to change.
        param: The key of the spec to change.
    """

    def __init__(self, message: str, *, param: str) -> None:
        super().__init__(message)
        self.param = param


def demand_of(
    spec: FunctionSpec,
    weights_bytes: Callable[[], int] = lambda: 0,
    *,
    working_bytes: int | None = None,
) -> Demand:
    """Return what each replica of a function needs.

    Args:
        spec: The function.
        weights_bytes: Returns the size of the snapshot's weights, over all ranks, if it matters.
        working_bytes: What it needs beside them if it keeps no KV cache; None if it keeps one.
    """
    num_gpus = spec.resources.gpus
    if num_gpus == 0:
        return Demand(num_gpus=0, memory_bytes=spec.resources.memory or 0)
    kv_bytes = spec.engine.kv_cache_memory_bytes if working_bytes is None else working_bytes
    if kv_bytes is None:
        return Demand(num_gpus=num_gpus, memory_share=spec.engine.gpu_memory_utilization)
    weights_each = -(-weights_bytes() // num_gpus)
    return Demand(num_gpus=num_gpus, memory_bytes=weights_each + kv_bytes + ENGINE_OVERHEAD_BYTES)


class MemoryLedger:
    """Whom each device's memory is promised to.

    Args:
        devices: All devices of the machine.
    """

    def __init__(self, devices: Iterable[Device]) -> None:
        self.devices: Mapping[str, Device] = MappingProxyType({one.id: one for one in devices})
        self._held: dict[str, dict[str, int]] = {device_id: {} for device_id in self.devices}
        self._foreign: dict[str, int] = {}
        self._on_release: Callable[[], None] = lambda: None

    def on_release(self, call: Callable[[], None]) -> None:
        """Have something called after memory was freed; somebody may be waiting for it."""
        self._on_release = call

    def check(self, demand: Demand) -> None:
        """Check that the machine could hold a replica if it held nothing else.

        Raises:
            Unschedulable: It has too few GPUs, or too little memory.
        """
        devices = self.suitable(demand)
        if demand.num_gpus > len(devices):
            raise Unschedulable(
                f"resources.gpus is {demand.num_gpus} and this machine has {len(devices)}; lower "
                "it, or set it to 0 to run on the CPU",
                param="resources.gpus",
            )
        largest = max((device.memory_bytes for device in devices), default=0)
        needed = demand.memory_bytes or 0
        if needed > largest:
            what = "a GPU" if demand.num_gpus else "this machine"
            param = "engine.kv_cache_memory_bytes" if demand.num_gpus else "resources.memory"
            raise Unschedulable(
                f"a replica needs {needed} bytes and {what} has {largest}; lower {param}",
                param=param,
            )

    def suitable(self, demand: Demand) -> list[Device]:
        """Return the devices of the kind that is needed."""
        kind = DeviceKind.GPU if demand.num_gpus else DeviceKind.CPU
        return [device for device in self.devices.values() if device.kind is kind]

    def free_bytes(self, device_id: str) -> int:
        """Return how much of a device can be promised; less than 0 if others have taken too much."""
        taken_bytes = self.promised_bytes(device_id) + (self.foreign_bytes(device_id) or 0)
        return self.devices[device_id].memory_bytes - taken_bytes

    def promised_bytes(self, device_id: str) -> int:
        """Return how much of a device is promised to replicas."""
        return sum(self._held[device_id].values())

    def foreign_bytes(self, device_id: str) -> int | None:
        """Return how much of a device others than replicas hold; None when that is not known."""
        return self._foreign.get(device_id)

    def set_foreign(self, device_id: str, num_bytes: int | None) -> None:
        """Note how much of a device others than replicas hold; None when that is not known."""
        before = self._foreign.pop(device_id, 0)
        if num_bytes is not None:
            self._foreign[device_id] = num_bytes
        if (num_bytes or 0) < before:
            self._on_release()

    def obstacle(self, demand: Demand) -> str:
        """Return what others hold if that alone keeps a replica from its place; else nothing."""
        devices = self.suitable(demand)
        taken = [
            (device.id, num_bytes)
            for device in devices
            if (num_bytes := self.foreign_bytes(device.id) or 0)
            and demand.bytes_on(device) + num_bytes > device.memory_bytes
        ]
        if len(devices) - len(taken) >= max(demand.num_gpus, 1):
            return ""
        held = ", ".join(f"{num_bytes / 2**30:.1f} GiB of {one}" for one, num_bytes in taken)
        return f"{held} are held by processes that are not Coldspark's"

    def held(self, device_id: str) -> Mapping[str, int]:
        """Return what is promised to whom on a device, by replica."""
        return MappingProxyType(self._held[device_id])

    def missing_bytes(self, replica_id: str, demand: Demand, device_id: str) -> int:
        """Return how much more a device would need to have free; 0 or less if it has enough."""
        own = self._held[device_id].get(replica_id, 0)
        return demand.bytes_on(self.devices[device_id]) - own - self.free_bytes(device_id)

    def place(
        self, replica_id: str, demand: Demand, among: Container[str] | None = None
    ) -> tuple[str, ...] | None:
        """Promise a replica the devices with the most room, or None while too few have enough.

        Args:
            replica_id: Which replica.
            demand: What it needs.
            among: The devices it may be given; None for all of the right kind.
        """
        fitting = [
            device
            for device in self.suitable(demand)
            if (among is None or device.id in among)
            and self.missing_bytes(replica_id, demand, device.id) <= 0
        ]
        num_devices = max(demand.num_gpus, 1)
        if len(fitting) < num_devices:
            return None
        fitting.sort(key=lambda device: -self.free_bytes(device.id))
        chosen = tuple(device.id for device in fitting[:num_devices])
        self.hold(replica_id, chosen, demand)
        return chosen

    def claim(self, replica_id: str, device_ids: Iterable[str], demand: Demand) -> bool:
        """Promise a parked replica its own devices' memory, all or none; says whether it got it."""
        device_ids = tuple(device_ids)
        if any(self.missing_bytes(replica_id, demand, one) > 0 for one in device_ids):
            return False
        self.hold(replica_id, device_ids, demand)
        return True

    def hold(self, replica_id: str, device_ids: Iterable[str], demand: Demand) -> None:
        """Note that a replica has what it demands, whether there is room or not."""
        for device_id in device_ids:
            if device_id in self.devices:
                self._held[device_id][replica_id] = demand.bytes_on(self.devices[device_id])

    def keep(self, replica_id: str, device_ids: Iterable[str], num_bytes: int) -> None:
        """Note that a replica is parked and holds no more than this of each of its devices."""
        for device_id in device_ids:
            if device_id in self.devices:
                self._held[device_id][replica_id] = num_bytes
        self._on_release()

    def release(self, replica_id: str) -> None:
        """Free whatever a replica holds; harmless when it holds nothing."""
        holdings = [held for held in self._held.values() if replica_id in held]
        for held in holdings:
            del held[replica_id]
        if holdings:
            self._on_release()
