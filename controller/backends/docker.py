"""Runtimes as containers of a Docker Engine on this machine.

A container has no network, no capabilities, a read-only root and an unprivileged user; it is
spoken to over a socket in a directory mounted into it, and reads the snapshots from another.
"""

import asyncio
import math
import os
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

import docker
import structlog
from docker.errors import APIError, ImageNotFound, NotFound

from controller.backends.base import (
    BackendError,
    BackendUnavailable,
    RuntimeInfo,
    RuntimeNotFound,
    RuntimeSpec,
)
from controller.backends.container import (
    RUNTIME_ID_LABEL,
    Container,
    cluster_filter,
    container_name,
    container_of,
    container_options,
    is_labelled,
    owner_ids,
    resized,
)
from controller.backends.directories import RUNTIME_ID, RuntimeDirectories
from controller.backends.docker_engine import DockerEngine
from controller.backends.exit_tracker import ExitTracker
from controller.backends.gpu_access import GpuAccess
from controller.backends.lines import LineSplitter
from controller.backends.serial import SerialOperations

log = structlog.get_logger(__name__)

REMOVED_TIMEOUT_S = 30
RECONNECT_MIN_S = 0.1
RECONNECT_MAX_S = 2.0
CONFLICT = 409


class DockerBackend:
    """Runs each runtime as a container. See `RuntimeBackend`.

    Args:
        runtimes_dir: The directory mounted into each container is made in here.
        cluster: Containers labelled with other clusters are left alone.
        image: What to run; built by `make image`.
        entrypoint: What to run in it instead of its own entry point.
        engine: The engine to use instead of the environment's.
    """

    name = "docker"

    def __init__(
        self,
        runtimes_dir: Path,
        *,
        cluster: str,
        image: str,
        entrypoint: Sequence[str] | None = None,
        engine: DockerEngine | None = None,
        gpu_access: GpuAccess | None = None,
    ) -> None:
        self._directories = RuntimeDirectories(runtimes_dir, backend=self.name, cluster=cluster)
        self._cluster = cluster
        self._image = image
        self._entrypoint = list(entrypoint) if entrypoint is not None else None
        self._engine = engine or DockerEngine()
        self._gpu_access = gpu_access or GpuAccess()
        self._serial = SerialOperations()
        self._is_tidy = False

    async def create(self, spec: RuntimeSpec) -> RuntimeInfo:
        """Create and start a container, or return the one that already has this runtime id."""
        return await self._serial.run(spec.runtime_id, self._create(spec))

    async def resize(self, runtime_id: str, *, cpu: float | None, memory_bytes: int | None) -> None:
        """Set a container's limits; the engine cannot lift them again."""
        await self._engine.call(
            lambda client: self._resize(client, runtime_id, cpu=cpu, memory_bytes=memory_bytes)
        )

    async def delete(self, runtime_id: str, *, grace_s: float = 5.0) -> None:
        """Stop and remove a container, and remove its directory."""
        await self._serial.run(runtime_id, self._delete(runtime_id, grace_s))

    async def inspect(self, runtime_id: str) -> RuntimeInfo:
        """Return one runtime, running or exited."""
        return (await self._engine.call(lambda client: self._find(client, runtime_id))).info

    async def list(self) -> list[RuntimeInfo]:
        """Return every runtime of this cluster, ordered by id."""
        containers = await self._engine.call(self._containers)
        if not self._is_tidy:
            await self._tidy({container.info.runtime_id for container in containers})
        return [container.info for container in containers]

    def watch(self) -> AsyncIterator[RuntimeInfo]:
        """Yield a runtime each time one exits; goes on after the engine has restarted."""
        return self._watch(ExitTracker(since=datetime.now(UTC)))

    async def logs(
        self, runtime_id: str, *, tail: int = 100, follow: bool = False
    ) -> AsyncIterator[str]:
        """Yield the last lines, then new ones until the container has exited."""
        container = await self._engine.call(lambda client: self._find(client, runtime_id))
        splitter = LineSplitter()
        async with self._engine.stream(
            lambda client: client.api.logs(container.id, stream=True, follow=follow, tail=tail)
        ) as chunks:
            async for batch in chunks:
                for line in splitter.feed(b"".join(batch)):
                    yield line
        for line in splitter.rest():
            yield line

    async def close(self) -> None:
        """Release the connection. Containers keep running."""
        await self._serial.close()
        self._engine.close()

    async def _create(self, spec: RuntimeSpec) -> RuntimeInfo:
        record = self._directories.record_of(spec)
        directory = await asyncio.to_thread(self._directories.create, record)
        try:
            await asyncio.to_thread(os.chown, directory, *owner_ids())
            if spec.device_uuids and self._gpu_access.kernel_cache is not None:
                await asyncio.to_thread(_give_away, self._gpu_access.kernel_cache)
            container = await self._engine.call(lambda client: self._start(client, spec, directory))
        except OSError as error:
            await asyncio.to_thread(self._directories.remove, spec.runtime_id)
            raise BackendError(
                f"cannot give {directory} to the runtime's user: {error}; run the controller as "
                "root, or as the user its containers run as"
            ) from error
        except BackendUnavailable:
            raise  # it may have been created: what is left is found by name
        except BackendError:
            await asyncio.to_thread(self._directories.remove, spec.runtime_id)
            raise
        return container.info

    def _start(self, client: docker.DockerClient, spec: RuntimeSpec, directory: Path) -> Container:
        options = container_options(
            spec, cluster=self._cluster, directory=directory, gpu_access=self._gpu_access
        )
        try:
            client.containers.create(self._image, entrypoint=self._entrypoint, **options)
            # One of the same id, removed behind our back, has left it.
            self._directories.socket(spec.runtime_id).unlink(missing_ok=True)
        except ImageNotFound as error:
            raise BackendError(
                f"the engine has no image {self._image!r}; build it with `make image`"
            ) from error
        except APIError as error:
            if error.status_code != CONFLICT:
                raise
        container = self._find(client, spec.runtime_id)
        if container.state == "created":
            self._start_created(client, container, spec)
        return self._find(client, spec.runtime_id)

    def _start_created(
        self, client: docker.DockerClient, container: Container, spec: RuntimeSpec
    ) -> None:
        try:
            client.api.start(container.id)
        except APIError as error:
            client.api.remove_container(container.id, force=True, v=True)
            reason = str(error.explanation or error)
            if "device driver" in reason:
                reason = (
                    f"the engine cannot hand out GPUs {list(spec.device_uuids)} ({reason});"
                    " install the NVIDIA Container Toolkit, or hand out the device files with "
                    "COLDSPARK_DOCKER_GPU_ACCESS=devices"
                )
            raise BackendError(f"cannot start {spec.runtime_id!r}: {reason}") from error

    def _resize(
        self,
        client: docker.DockerClient,
        runtime_id: str,
        *,
        cpu: float | None,
        memory_bytes: int | None,
    ) -> None:
        container = self._find(client, runtime_id)
        limits = client.api.inspect_container(container.id)["HostConfig"]
        lifted = [
            name
            for name, wanted, present in (
                ("cpu", cpu, limits["NanoCpus"] or limits["CpuQuota"]),
                ("memory", memory_bytes, limits["Memory"]),
            )
            if wanted is None and present
        ]
        if lifted:
            raise BackendError(
                f"the {' and '.join(lifted)} limit of {runtime_id!r} cannot be lifted"
            )
        changes = resized(cpu=cpu, memory_bytes=memory_bytes)
        if not changes:
            return
        try:
            client.api.update_container(container.id, **changes)  # type: ignore[arg-type]
        except APIError as error:
            reason = error.explanation or error
            raise BackendError(f"cannot set the limits of {runtime_id!r}: {reason}") from error

    async def _delete(self, runtime_id: str, grace_s: float) -> None:
        await self._engine.call(lambda client: self._remove(client, runtime_id, grace_s))
        await asyncio.to_thread(self._directories.remove, runtime_id)

    def _remove(self, client: docker.DockerClient, runtime_id: str, grace_s: float) -> None:
        try:
            container = self._find(client, runtime_id)
        except RuntimeNotFound:
            return
        try:
            if grace_s > 0:
                client.api.stop(container.id, timeout=math.ceil(grace_s))
            client.api.remove_container(container.id, force=True, v=True)
        except NotFound:
            return
        except APIError as error:
            if error.status_code != CONFLICT:
                raise
            # Someone else is removing it.
            client.api.wait(container.id, timeout=REMOVED_TIMEOUT_S, condition="removed")

    def _find(self, client: docker.DockerClient, runtime_id: str) -> Container:
        if not RUNTIME_ID.fullmatch(runtime_id):
            raise RuntimeNotFound(f"{runtime_id!r} is no runtime id")
        try:
            attributes = client.api.inspect_container(container_name(self._cluster, runtime_id))
        except NotFound:
            raise RuntimeNotFound(f"no runtime {runtime_id!r}") from None
        if not is_labelled(attributes, cluster=self._cluster, runtime_id=runtime_id):
            raise RuntimeNotFound(
                f"no runtime {runtime_id!r}, but a container of another owner has its name"
            )
        return container_of(attributes, self._directories.endpoint(runtime_id))

    def _containers(self, client: docker.DockerClient) -> Sequence[Container]:
        """Return this cluster's containers, ordered by runtime id."""
        found = []
        for summary in client.api.containers(all=True, filters=cluster_filter(self._cluster)):
            try:
                found.append(self._find(client, summary["Labels"].get(RUNTIME_ID_LABEL, "")))
            except RuntimeNotFound:
                continue  # removed meanwhile, or labelled by hand
        return sorted(found, key=lambda container: container.info.runtime_id)

    async def _tidy(self, existing: set[str]) -> None:
        """Remove, once, the directories of containers that an earlier controller never created."""
        for record in await asyncio.to_thread(self._directories.records):
            runtime_id = record.runtime_id
            if runtime_id not in existing and not self._serial.is_busy(runtime_id):
                await asyncio.to_thread(self._directories.remove, runtime_id)
        self._is_tidy = True

    async def _watch(self, tracker: ExitTracker) -> AsyncIterator[RuntimeInfo]:
        delay_s, is_lost = RECONNECT_MIN_S, False
        while True:
            try:
                async for containers in self._changes():
                    if is_lost:
                        log.info("the Docker engine is back")
                    delay_s, is_lost = RECONNECT_MIN_S, False
                    for container in tracker.update(containers):
                        yield container.info
            except BackendUnavailable as error:
                if not tracker.has_begun:
                    raise
                if not is_lost:
                    log.warning("lost the Docker engine", error=str(error))
                is_lost = True
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, RECONNECT_MAX_S)

    async def _changes(self) -> AsyncIterator[Sequence[Container]]:
        """Yield the containers now and after each event, until the engine closes the stream."""
        filters = cluster_filter(self._cluster) | {"event": ["start", "die", "destroy"]}
        since = int(datetime.now(UTC).timestamp())
        async with self._engine.stream(
            lambda client: client.events(since=since, filters=filters, decode=True)
        ) as events:
            yield await self._engine.call(self._containers)
            async for _ in events:
                yield await self._engine.call(self._containers)


def _give_away(directory: Path) -> None:
    """Make a directory that runtimes may write to."""
    directory.mkdir(parents=True, exist_ok=True)
    os.chown(directory, *owner_ids())
