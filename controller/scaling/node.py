"""What the functions of one controller share, and where their replicas live."""

from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from controller.backends.base import RuntimeBackend
from controller.clock import Clock
from controller.ledger.ledger import Ledger
from controller.metrics import Metrics
from controller.scaling.journal import Journal
from controller.scaling.last_logs import LastLogs
from controller.scaling.link import Connect
from controller.scaling.placement import CPU_DEVICE_ID, DevicePool


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """What all functions of this controller share."""

    clock: Clock
    connect: Connect
    pool: DevicePool
    ledger: Ledger
    journal: Journal
    metrics: Metrics
    snapshot_store: Path
    last_logs: LastLogs
    gpu_hour_usd: Decimal
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Home:
    """Where a replica lives: the devices it was given and the backend that runs it."""

    device_ids: tuple[str, ...]
    backend: RuntimeBackend

    @property
    def gpus(self) -> tuple[str, ...]:
        """The GPUs among the devices."""
        return tuple(device for device in self.device_ids if device != CPU_DEVICE_ID)
