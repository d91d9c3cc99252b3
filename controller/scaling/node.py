"""What the functions of one controller share, and where their replicas live."""

from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from controller.backends.base import RuntimeBackend
from controller.clock import Clock
from controller.host_cache.host_cache import HostCache
from controller.ledger.ledger import Ledger
from controller.metrics import Metrics
from controller.scaling.contention import Contention
from controller.scaling.deployment import Deployment
from controller.scaling.devices import HostMemory
from controller.scaling.journal import Journal
from controller.scaling.last_logs import LastLogs
from controller.scaling.lifecycle import Tier
from controller.scaling.link import Connect
from controller.scaling.placement import CPU_DEVICE_ID, MemoryLedger
from controller.scaling.standby import Standby, StandbyPool
from controller.scaling.starts import Starts


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """What all functions of this controller share."""

    clock: Clock
    connect: Connect
    memory: MemoryLedger
    host_memory: HostMemory
    contention: Contention
    starts: Starts
    standbys: StandbyPool
    ledger: Ledger
    journal: Journal
    metrics: Metrics
    snapshot_store: Path
    last_logs: LastLogs
    host_cache: HostCache
    gpu_hour_usd: Decimal
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Home:
    """Where a replica lives.

    Attributes:
        deployment: The revision the replica was started for.
        runtime_id: The runtime it is in; one that was in standby has a name of its own.
        device_ids: The devices the replica was given.
        backend: What runs the runtime.
        tier: How warm the runtime was when the replica got it.
        standby: The runtime as it was taken from the pool; None for one made for this replica.
        is_generic: Whether the runtime could serve any function, and so go back to the pool.
    """

    deployment: Deployment
    runtime_id: str
    device_ids: tuple[str, ...]
    backend: RuntimeBackend
    tier: Tier = Tier.STOPPED
    standby: Standby | None = None
    is_generic: bool = False

    @property
    def gpus(self) -> tuple[str, ...]:
        """The GPUs among the devices."""
        return tuple(device for device in self.device_ids if device != CPU_DEVICE_ID)
