"""A controller's scaling world on fake machines and loop time."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

from controller.host_cache.host_cache import HostCache
from controller.ledger.ledger import Batch, LastKnown, Ledger
from controller.ledger.report import Figures
from controller.metrics import Metrics
from controller.scaling.contention import Contention
from controller.scaling.deployment import Deployment
from controller.scaling.devices import HostMemory
from controller.scaling.function import Function
from controller.scaling.generation import GenerationRequest
from controller.scaling.journal import Entry, Journal
from controller.scaling.last_logs import LastLogs
from controller.scaling.node import Node
from controller.scaling.placement import CPU_DEVICE_ID, Device, DeviceKind, MemoryLedger, demand_of
from controller.scaling.standby import StandbyPool
from controller.scaling.starts import Starts
from functions.spec import FunctionSpec
from runtime.rpc import inference_pb2 as pb
from tests.fakes.backend import FakeBackend
from tests.fakes.runtime import FakeConnection, FakeRuntime

START = datetime(2026, 3, 2, 12, 0, tzinfo=UTC)
SNAPSHOT = "tiny@0123456789ab"


class LoopClock:
    """The event loop's time as both clocks."""

    def monotonic(self) -> float:
        return asyncio.get_running_loop().time()

    def now(self) -> datetime:
        return START + timedelta(seconds=self.monotonic())


class ForgetfulRepository:
    """Keeps the last batch and nothing else."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []

    async def last_known(self) -> LastKnown:
        return LastKnown(heartbeat_us=None, open_intervals=(), device_ends_us={})

    async def save(self, batch: Batch) -> None:
        self.batches.append(batch)

    async def figures(self, since_us: int, until_us: int) -> Figures:
        return Figures(since_us=since_us, until_us=until_us)

    async def compact(self, before_us: int) -> int:
        return 0


class MemoryLogs(LastLogs):
    """Keeps the last logs in memory, and takes no thread's time."""

    def __init__(self) -> None:
        super().__init__(Path("/nowhere"))
        self.kept: dict[str, bytes] = {}

    async def _write(self, function: str, data: bytes) -> None:
        self.kept[function] = data

    async def _read(self, function: str) -> bytes:
        return self.kept.get(function, b"")

    async def forget(self, function: str) -> None:
        self.kept.pop(function, None)


def spec_of(**sections: object) -> FunctionSpec:
    """Return a spec of a tiny CPU function with some sections replaced."""
    base: dict[str, object] = {
        "name": "tiny",
        "model": {"source": "./model"},
        "resources": {"gpus": 0},
    }
    return FunctionSpec.model_validate(base | sections)


def deployment(spec: FunctionSpec, runtime_hash: str = "hash") -> Deployment:
    """Return a deployment of a spec."""
    return Deployment(
        spec=spec,
        revision="r1",
        backend="fake",
        snapshot=SNAPSHOT,
        runtime_hash=runtime_hash,
        max_model_len=128,
        demand=demand_of(spec),
    )


class World:
    """One node; runtimes come into being as the backend creates them.

    Args:
        num_gpus: How many GPUs the machine has.
        num_standbys: How many runtimes are kept in standby.
        max_starts: How many starts may be under way.
        make_runtime: Makes the runtime behind each new endpoint.
    """

    def __init__(
        self,
        *,
        num_gpus: int = 0,
        num_standbys: int = 0,
        max_starts: int = 100,
        make_runtime: Callable[[], FakeRuntime] = FakeRuntime,
    ) -> None:
        self.backend = FakeBackend()
        self.available_bytes = 64 << 30
        self.runtimes: dict[str, FakeRuntime] = {}
        self.entries: list[Entry] = []
        self.make_runtime = make_runtime
        gpus = [
            Device(id=f"GPU-{index}", kind=DeviceKind.GPU, memory_bytes=100 << 30)
            for index in range(num_gpus)
        ]
        devices = [*gpus, Device(id=CPU_DEVICE_ID, kind=DeviceKind.CPU, memory_bytes=1 << 30)]
        clock = LoopClock()
        self.ledger = Ledger(
            devices={device.id: Decimal("2.50") for device in devices},
            clock=clock,
            repository=ForgetfulRepository(),
        )
        self.functions: list[Function] = []
        memory = MemoryLedger(devices)
        memory.on_release(self.poke_all)
        starts = Starts(max_starts, clock)
        self.node = Node(
            clock=clock,
            connect=self.connect,
            memory=memory,
            host_memory=HostMemory(
                floor_bytes=2 << 30, available_bytes=lambda: self.available_bytes
            ),
            contention=Contention(memory, clock, min_residency_s=1.0, turn_s=30.0),
            starts=starts,
            standbys=StandbyPool(
                size=num_standbys,
                connect=self.connect,
                places=starts,
                snapshot_store=Path("/nowhere"),
                gpus=tuple(gpu.id for gpu in gpus),
            ),
            ledger=self.ledger,
            journal=Journal(self.write),
            metrics=Metrics(),
            snapshot_store=Path("/nowhere"),
            last_logs=MemoryLogs(),
            host_cache=HostCache(0, Path("/nowhere"), engine_user_id=0),
            gpu_hour_usd=Decimal("2.50"),
            epoch=1,
        )

        self.node.contention.among(lambda: (one.tenancy for one in self.functions))

    def connect(self, endpoint: str) -> FakeConnection:
        """Connect to the runtime behind an endpoint."""
        return FakeConnection(self.runtimes.setdefault(endpoint, self.make_runtime()))

    async def write(self, entries: list[Entry]) -> None:
        """Keep the journal's entries."""
        self.entries += entries

    def poke_all(self) -> None:
        """Have every function look again."""
        for function in self.functions:
            function.poke()

    @property
    def runtime(self) -> FakeRuntime:
        """The only runtime there ever was."""
        (runtime,) = self.runtimes.values()
        return runtime

    @asynccontextmanager
    async def function(
        self,
        spec: FunctionSpec | None = None,
        *,
        on_snapshot_unusable: Callable[[str, str], None] = lambda _snapshot, _reason: None,
    ) -> AsyncIterator[Function]:
        """Run a function, swept four times a second."""
        function = Function(
            deployment(spec or spec_of()),
            self.backend,
            self.node,
            created=0,
            on_snapshot_unusable=on_snapshot_unusable,
        )
        self.functions.append(function)
        owner = asyncio.create_task(function.run(), name="owner")
        sweeper = asyncio.create_task(self._sweep(function), name="sweeper")
        try:
            yield function
        finally:
            sweeper.cancel()
            owner.cancel()
            await asyncio.wait([owner, sweeper])
            self.functions.remove(function)
        if not owner.cancelled():
            owner.result()

    async def _sweep(self, function: Function) -> None:
        while True:
            await asyncio.sleep(0.25)
            function.sweep()


def request(num_prompt: int = 3, max_tokens: int = 4, request_id: str = "r") -> GenerationRequest:
    """Return a request; the fake runtime answers with numbers counting up from its length."""
    return GenerationRequest(
        request_id=request_id,
        prompt_token_ids=list(range(1, num_prompt + 1)),
        sampling=pb.SamplingParams(max_tokens=max_tokens),
        num_bytes=10,
    )


async def collect(function: Function, **options: Any) -> list[int]:
    """Return all tokens of one request."""
    tokens: list[int] = []
    async with function.generate(request(**options)) as generation:
        async for chunk in generation:
            tokens += chunk.token_ids
    return tokens
