"""The controller's entry point: wire the parts, serve, shut down in order.

Shutdown: refuse new requests, let running streams end, close the gateway, let go of the runtimes
(the next start adopts them), write the books, close the store.
"""

import asyncio
import fcntl
import gc
import logging
import signal
import socket
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import TextIO, cast

import structlog
import uvicorn
import uvloop

from controller.backends.base import RuntimeBackend
from controller.backends.container import owner_ids
from controller.backends.docker import DockerBackend
from controller.backends.gpu_access import GpuAccess, gpu_device_files
from controller.backends.process import ProcessBackend
from controller.clock import SystemClock, unix_us
from controller.dashboard.views import dashboard_router
from controller.gateway.app import create_app
from controller.gateway.calls import Gateway
from controller.gateway.routes.admin import admin_router
from controller.gateway.text import ModelTexts
from controller.host_cache.host_cache import HostCache
from controller.jobs import Jobs
from controller.ledger.intervals import WHOLE_PPM, Interval
from controller.ledger.ledger import Ledger
from controller.metrics import Metrics
from controller.records import Records
from controller.scaling.contention import Contention
from controller.scaling.devices import HostMemory, cache_budget_bytes, find_devices
from controller.scaling.journal import Journal
from controller.scaling.last_logs import LastLogs
from controller.scaling.node import Node
from controller.scaling.placement import Device, DeviceKind, MemoryLedger
from controller.scaling.plane import ControlPlane
from controller.scaling.reaper import Reaper
from controller.scaling.standby import StandbyPool
from controller.scaling.starts import Starts, usual_limit
from controller.settings import Settings, family_of, url_of
from controller.store.database import Database
from controller.store.errors import DatabaseUnavailable
from controller.store.ledger import LedgerStore
from runtime.logs import LossyStderr
from runtime.rpc.client import RuntimeClient

log = structlog.get_logger(__name__)

FLUSH_S = 1.0
COMPACT_S = 3600.0
GC_THRESHOLD = 20_000  # allocations; Python's 700 would collect for every few hundred tokens


class AlreadyRunning(Exception):
    """Another controller owns this home directory."""


def serve(settings: Settings, backends: Sequence[RuntimeBackend] | None = None) -> None:
    """Run the controller until SIGINT or SIGTERM; each further one gives up on what it waits for.

    Args:
        settings: Where it lives and listens.
        backends: What can start runtimes; None for all that come with it.

    Raises:
        AlreadyRunning: Another controller owns the home directory.
        KeyboardInterrupt: It had to give up on something.
        OSError: The address cannot be listened on.
    """
    configure_logging()
    settings.home.mkdir(parents=True, exist_ok=True, mode=0o700)
    with home_lock(settings.home):
        try:
            uvloop.run(run(settings, backends))
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None


async def run(settings: Settings, backends: Sequence[RuntimeBackend] | None = None) -> None:
    """Wire the parts, serve until a signal, and take them down in reverse."""
    clock, metrics, reaper = SystemClock(), Metrics(), Reaper(expected=DatabaseUnavailable)
    devices = find_devices()
    async with AsyncExitStack() as stack:
        listener = stack.enter_context(listen(settings.host, settings.port))
        database = Database.open(settings.database_url)
        stack.callback(database.close)
        ledger = Ledger(
            devices=device_rates(devices, settings.gpu_hour_usd),
            clock=clock,
            repository=LedgerStore(database),
            on_spent=partial(count_device_time, metrics),
        )
        stack.push_async_callback(ledger.flush)
        records = Records(database, ledger, clock)
        journal = Journal(records.write, on_dropped=metrics.journal_entry_dropped)
        stack.push_async_callback(journal.flush)
        epoch = unix_us(clock.now()) // 1_000_000
        memory = MemoryLedger(devices)
        host_cache = HostCache(
            cache_budget_bytes(settings.host_cache_bytes, devices),
            settings.snapshot_store,
            engine_user_id=owner_ids()[0],
        )
        host_cache.start()
        starts = Starts(settings.max_concurrent_starts or usual_limit(), clock)
        stack.push_async_callback(host_cache.close)
        node = Node(
            clock=clock,
            connect=RuntimeClient,
            memory=memory,
            host_memory=HostMemory(floor_bytes=settings.park_floor_bytes),
            contention=Contention(
                memory,
                clock,
                min_residency_s=settings.min_residency_s,
                turn_s=settings.device_turn_s,
            ),
            starts=starts,
            standbys=StandbyPool(
                size=settings.standby_replicas,
                connect=RuntimeClient,
                places=starts,
                snapshot_store=settings.snapshot_store,
                gpus=tuple(device.id for device in devices if device.kind is DeviceKind.GPU),
                epoch=epoch,
            ),
            ledger=ledger,
            journal=journal,
            metrics=metrics,
            snapshot_store=settings.snapshot_store,
            last_logs=LastLogs(settings.last_logs_dir),
            host_cache=host_cache,
            gpu_hour_usd=settings.gpu_hour_usd,
            epoch=epoch,
        )
        backends = backends or open_backends(settings)
        for backend in backends:
            stack.push_async_callback(backend.close)
        by_name = {backend.name: backend for backend in backends}
        texts = ModelTexts(clock)
        plane = ControlPlane(node, by_name, records, reaper, on_servable=texts.warm)
        stack.push_async_callback(plane.stop, stop_runtimes=settings.stop_runtimes_on_exit)
        stack.callback(reaper.stop)  # first: what a stopping plane leaves looks like orphans to it
        first_key = settings.home / "bootstrap.key"
        if settings.require_api_keys and await records.bootstrap_key(first_key):
            log.warning("API keys are required and there were none", first_key_in=str(first_key))
        await plane.start()
        gateway = Gateway(
            registry=plane,
            settings=settings,
            clock=clock,
            metrics=metrics,
            texts=texts,
            is_ready=lambda: True,
        )
        jobs = Jobs(settings, database, clock, gateway, records)
        stack.push_async_callback(jobs.stop)
        await jobs.start(reaper)
        reaper.every(settings.tick_s, "sweep", plane.sweep)
        reaper.every(settings.tick_s, "look at devices", plane.look_at_devices)
        reaper.every(settings.reconcile_s, "reconcile", plane.reconcile)
        reaper.every(FLUSH_S, "flush ledger", ledger.flush)
        reaper.every(FLUSH_S, "flush journal", journal.flush)
        reaper.every(COMPACT_S, "compact ledger", ledger.compact)
        reaper.every(COMPACT_S, "prune history", partial(records.prune, settings.history_days))
        reaper.start()
        spare_the_collector()
        server = GatewayServer(settings, plane, records, node, listener, texts, jobs)
        await server.serve_until_signal()


def listen(host: str, port: int) -> socket.socket:
    """Return a listening TCP socket.

    Raises:
        OSError: The address is taken or not ours.
    """
    return socket.create_server((host, port), family=family_of(host), backlog=2048)


def spare_the_collector() -> None:
    """Keep what was made at the start out of garbage collection, which halts every stream."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD)


class GatewayServer:
    """The HTTP server, with a shutdown in our order rather than uvicorn's."""

    def __init__(
        self,
        settings: Settings,
        plane: ControlPlane,
        records: Records,
        node: Node,
        listener: socket.socket,
        texts: ModelTexts,
        jobs: Jobs,
    ) -> None:
        self._settings = settings
        self._jobs = jobs
        self._plane = plane
        self._listener = listener
        self._stopping = asyncio.Event()
        app = create_app(
            plane,
            records,
            settings,
            node.clock,
            metrics=node.metrics,
            texts=texts,
            is_ready=lambda: not self._stopping.is_set(),
            extra_routers=[
                *jobs.routers(),
                admin_router(plane, records, records, node.clock),
                dashboard_router(plane, records, node.clock),
            ],
        )
        self._server = _Server(
            uvicorn.Config(
                app,
                http="httptools",
                lifespan="off",
                access_log=False,
                log_config=None,
                timeout_keep_alive=75,
                timeout_graceful_shutdown=5,
            )
        )

    async def serve_until_signal(self) -> None:
        """Serve, and return when a signal has come and the last stream is over.

        A second signal cancels the calling task, here or in whatever it does afterwards.
        """
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        for name in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(name, self._on_signal, task)
        host, port = self._listener.getsockname()[:2]
        log.info("listening", url=url_of(host, port))
        serving = asyncio.create_task(self._server.serve(sockets=[self._listener]), name="gateway")
        stopping = asyncio.create_task(self._stopping.wait(), name="signal")
        try:
            await asyncio.wait([serving, stopping], return_when=asyncio.FIRST_COMPLETED)
            log.info("stopping")
            await self._jobs.stop()
            await self._plane.finish_requests(self._settings.shutdown_timeout_s)
            self._server.should_exit = True
            await serving
        finally:
            for left in (serving, stopping):
                left.cancel()
            await asyncio.wait([serving, stopping])

    def _on_signal(self, task: asyncio.Task[None]) -> None:
        if self._stopping.is_set():
            log.warning("not waiting any longer")
            task.cancel()
        self._stopping.set()


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to the controller."""
        yield


def open_backends(settings: Settings) -> Sequence[RuntimeBackend]:
    """Return every backend; none is contacted yet."""
    return (
        ProcessBackend(settings.runtimes_dir, cluster=settings.cluster),
        DockerBackend(
            settings.runtimes_dir,
            cluster=settings.cluster,
            image=settings.docker_image,
            gpu_access=GpuAccess(
                device_files=gpu_device_files if settings.docker_gpu_access == "devices" else None,
                mounts=settings.docker_gpu_mounts,
                kernel_cache=settings.container_kernels_dir,
            ),
        ),
    )


def count_device_time(metrics: Metrics, interval: Interval) -> None:
    """Add a ledger interval that has ended to the exported device-seconds."""
    assert interval.end_us is not None, "only time that has passed is counted"
    device_us = (interval.end_us - interval.start_us) * interval.share_ppm / WHOLE_PPM
    metrics.add_gpu_seconds(
        function=interval.function or "", state=str(interval.state), seconds=device_us / 1e6
    )


def device_rates(devices: Sequence[Device], gpu_hour_usd: Decimal) -> dict[str, Decimal]:
    """Return what each device costs an hour while nobody holds it.

    The processor is what a machine without GPUs sells; beside GPUs it comes with them.
    """
    has_gpu = any(device.kind is DeviceKind.GPU for device in devices)
    return {
        device.id: Decimal(0) if has_gpu and device.kind is DeviceKind.CPU else gpu_hour_usd
        for device in devices
    }


@contextmanager
def home_lock(home: Path) -> Iterator[None]:
    """Own a home directory.

    Raises:
        AlreadyRunning: Another controller does.
    """
    with (home / "controller.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise AlreadyRunning(
                f"another controller runs on {home}; stop it, or set COLDSPARK_HOME to another "
                "directory"
            ) from error
        yield


def configure_logging() -> None:
    """Log one JSON object a line on stderr, the standard library's records included."""
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    structlog.configure(
        processors=[*shared, structlog.processors.JSONRenderer()],
        logger_factory=structlog.WriteLoggerFactory(file=cast(TextIO, LossyStderr())),
    )
    logging.basicConfig(
        level=logging.WARNING,
        stream=cast(TextIO, LossyStderr()),
        format='{"logger": "%(name)s", "event": "%(message)s"}',
    )
