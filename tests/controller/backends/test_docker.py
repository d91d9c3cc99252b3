"""What only the docker backend promises; the rest is in tests/contracts."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import docker
import pytest
from docker.errors import NotFound
from requests.exceptions import RequestException

from controller.backends.base import (
    BackendError,
    BackendUnavailable,
    RuntimeBackend,
    RuntimePhase,
)
from controller.backends.container import container_name, owner_ids
from controller.backends.docker import DockerBackend
from controller.backends.docker_engine import DockerEngine
from tests.contracts.harnesses import STAND_IN, DockerHarness, names_in, spec, tell
from tests.controller.backends.test_container import NOW, container
from tests.docker_engine import base_image

SOON_S = 30.0


@pytest.fixture
def runtimes_dir(tmp_path: Path) -> Path:
    return tmp_path / "runtimes"


@pytest.fixture
async def harness(runtimes_dir: Path) -> AsyncIterator[DockerHarness]:
    opened = DockerHarness(runtimes_dir, image=base_image())
    yield opened
    await opened.close()


@pytest.fixture
def client() -> Iterator[docker.DockerClient]:
    base_image()
    opened = docker.from_env()
    yield opened
    opened.close()


@pytest.mark.docker
async def test_a_container_is_shut_in(harness: DockerHarness, tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.mkdir()
    (store / "weights").write_text("w")
    info = await harness.backend.create(spec(snapshot_store=store))
    source = [
        "import os, json",
        "def refused(path):",
        "    try: open(path, 'w').close()",
        "    except OSError as error: return error.strerror",
        "status = dict(line.split(':\\t', 1) for line in open('/proc/self/status'))",
        "answer = json.dumps({",
        "    'user': [os.getuid(), os.getgid()],",
        "    'capabilities': int(status['CapBnd'], 16),",
        "    'no_new_privileges': status['NoNewPrivs'].strip(),",
        "    'root': refused('/file'),",
        "    'store': refused('/snapshots/file'),",
        "    'weights': open('/snapshots/weights').read(),",
        "    'scratch': refused('/tmp/file'),",
        "    'interfaces': os.listdir('/sys/class/net'),",
        "    'socket': os.listdir('/run/coldspark'),",
        "})",
    ]
    said = json.loads(await tell(info, "\n".join(source)))
    assert said == {
        "user": list(owner_ids()),
        "capabilities": 0,
        "no_new_privileges": "1",
        "root": "Read-only file system",
        "store": "Read-only file system",
        "weights": "w",
        "scratch": None,
        "interfaces": ["lo"],
        "socket": said["socket"],
    }
    assert 0 not in said["user"]
    assert "runtime.sock" in said["socket"]


@pytest.mark.docker
async def test_the_engine_enforces_the_limits(
    harness: DockerHarness, client: docker.DockerClient
) -> None:
    await harness.backend.create(replace(spec(), cpu=0.5, memory_bytes=256 << 20))
    attributes = client.api.inspect_container(container_name("test", "r-1"))
    config = attributes["HostConfig"]
    assert config["Memory"] == config["MemorySwap"] == 256 << 20
    assert config["NanoCpus"] == 500_000_000
    assert config["PidsLimit"] == 4096
    assert config["Init"]
    assert config["RestartPolicy"]["Name"] == "no"
    assert config["LogConfig"]["Config"] == {"max-size": "8m", "max-file": "2"}


@pytest.mark.docker
async def test_limits_are_set_on_a_running_container_and_cannot_be_lifted(
    harness: DockerHarness, client: docker.DockerClient
) -> None:
    await harness.backend.create(spec())
    await harness.backend.resize("r-1", cpu=0.5, memory_bytes=256 << 20)
    config = client.api.inspect_container(container_name("test", "r-1"))["HostConfig"]
    assert config["Memory"] == config["MemorySwap"] == 256 << 20
    assert config["CpuQuota"] / config["CpuPeriod"] == 0.5
    with pytest.raises(BackendError, match="the cpu and memory limit of 'r-1' cannot be lifted"):
        await harness.backend.resize("r-1", cpu=None, memory_bytes=None)


@pytest.mark.docker
async def test_directories_are_private_and_removed(
    harness: DockerHarness, runtimes_dir: Path
) -> None:
    await harness.backend.create(spec())
    status = (runtimes_dir / "r-1").stat()
    assert status.st_mode & 0o777 == 0o700
    assert (status.st_uid, status.st_gid) == owner_ids()
    await harness.backend.delete("r-1", grace_s=0.0)
    assert names_in(runtimes_dir) == []


@pytest.mark.docker
async def test_a_missing_image_says_how_to_build_it(
    harness: DockerHarness, runtimes_dir: Path
) -> None:
    backend = DockerBackend(runtimes_dir, cluster="test", image="coldspark-nonexistent:none")
    with pytest.raises(BackendError, match="`make image`") as raised:
        await backend.create(spec())
    assert not raised.value.temporary
    assert names_in(runtimes_dir) == []
    await backend.close()


@pytest.mark.docker
async def test_gpus_without_a_driver_say_what_to_install(
    harness: DockerHarness, runtimes_dir: Path, client: docker.DockerClient
) -> None:
    if "nvidia" in client.info()["Runtimes"]:
        pytest.skip("this engine has the NVIDIA Container Toolkit")
    with pytest.raises(BackendError, match="NVIDIA Container Toolkit"):
        await harness.backend.create(replace(spec(), device_uuids=("GPU-1",)))
    assert await harness.backend.list() == []
    assert names_in(runtimes_dir) == []


@pytest.mark.docker
async def test_a_container_created_but_not_started_is_started(
    harness: DockerHarness, runtimes_dir: Path, client: docker.DockerClient
) -> None:
    await harness.backend.create(spec())
    await harness.backend.delete("r-1", grace_s=0.0)

    def interrupted(container: str) -> None:
        raise ConnectionResetError("the engine went away")

    engine = DockerEngine(lambda: client)
    backend = DockerBackend(
        runtimes_dir,
        cluster="test",
        image=base_image(),
        entrypoint=("python3", "-I", "-S", "-c", STAND_IN),
        engine=engine,
    )
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(client.api, "start", interrupted)
        with pytest.raises(BackendUnavailable):
            await backend.create(spec())
    info = await harness.backend.create(spec())
    assert await harness.incarnation(info)


@pytest.mark.docker
async def test_a_container_of_another_owner_is_left_alone(
    harness: DockerHarness, client: docker.DockerClient
) -> None:
    name = container_name("test", "r-1")
    other = client.containers.create(base_image(), command=["true"], name=name)
    try:
        with pytest.raises(BackendError, match="another owner has its name"):
            await harness.backend.create(spec())
        await harness.backend.delete("r-1")
        other.reload()
        assert await harness.backend.list() == []
    finally:
        other.remove()


@pytest.mark.docker
async def test_a_container_removed_behind_our_back_has_exited_and_can_be_made_again(
    harness: DockerHarness, client: docker.DockerClient
) -> None:
    exits = harness.backend.watch()
    first = asyncio.ensure_future(anext(exits))
    info = await harness.backend.create(spec())
    incarnation = await harness.incarnation(info)
    client.api.remove_container(container_name("test", "r-1"), force=True)
    async with asyncio.timeout(SOON_S):
        assert (await first).runtime_id == "r-1"
    again = await harness.backend.create(spec())
    assert await harness.incarnation(again) != incarnation


@pytest.mark.docker
async def test_what_was_intended_and_never_created_is_tidied_away(
    harness: DockerHarness, runtimes_dir: Path, client: docker.DockerClient
) -> None:
    info = await harness.backend.create(spec())
    await harness.backend.create(spec("r-2"))
    await harness.backend.close()
    with suppress(NotFound):
        client.api.remove_container(container_name("test", "r-2"), force=True)
    harness.backend = harness.reopen()
    assert await harness.backend.list() == [info]
    assert names_in(runtimes_dir) == ["r-1"]


async def test_an_engine_out_of_reach_is_told_apart_from_one_that_is_away(
    runtimes_dir: Path,
) -> None:
    def refuse() -> docker.DockerClient:
        try:
            raise PermissionError(13, "Permission denied")
        except PermissionError as error:
            raise RequestException("Connection aborted") from error

    engine = DockerEngine(refuse)
    backend = DockerBackend(runtimes_dir, cluster="test", image="i", engine=engine)
    with pytest.raises(BackendUnavailable, match="add it to the group 'docker'"):
        await backend.list()
    await backend.close()


@pytest.mark.parametrize(
    "call",
    [
        lambda backend: backend.create(spec()),
        lambda backend: backend.delete("r-1"),
        lambda backend: backend.inspect("r-1"),
        lambda backend: backend.list(),
        lambda backend: anext(backend.watch()),
        lambda backend: anext(backend.logs("r-1")),
    ],
    ids=["create", "delete", "inspect", "list", "watch", "logs"],
)
async def test_without_an_engine_every_call_says_what_to_do(
    call: Callable[[RuntimeBackend], Awaitable[object]],
    runtimes_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{runtimes_dir}/nonexistent.sock")
    backend = DockerBackend(runtimes_dir, cluster="test", image="coldspark-runtime")
    with pytest.raises(
        BackendUnavailable, match="start it, or name another in DOCKER_HOST"
    ) as raised:
        await call(backend)
    assert raised.value.temporary
    await backend.close()


class FlakyEngine(DockerEngine):
    """An engine that goes away and comes back, holding one container."""

    def __init__(self) -> None:
        super().__init__(lambda: pytest.fail("there is nothing to connect to"))
        self.containers = [container("r-1")]
        self.num_refused = 0
        self._is_away = False

    async def call(self, operation: Callable[[docker.DockerClient], Any]) -> Any:
        return self.containers

    @asynccontextmanager
    async def _opened(self) -> AsyncIterator[AsyncIterator[list[Any]]]:
        if self._is_away and self.num_refused < 2:
            self.num_refused += 1
            raise BackendUnavailable("away", temporary=True)
        yield self._events()

    def stream(self, opener: object) -> Any:
        return self._opened()

    async def _events(self) -> AsyncIterator[list[Any]]:
        if not self._is_away:
            self._is_away = True
            self.containers = [container("r-1", ended_at=NOW)]
            return  # as when the engine stops; nobody ever tells of the exit
        await asyncio.Event().wait()
        yield []


async def test_a_watch_goes_on_after_the_engine_restarts(runtimes_dir: Path) -> None:
    engine = FlakyEngine()
    backend = DockerBackend(runtimes_dir, cluster="test", image="i", engine=engine)
    async with asyncio.timeout(SOON_S):
        told = await anext(backend.watch())
    assert (told.runtime_id, told.phase) == ("r-1", RuntimePhase.EXITED)
    assert engine.num_refused == 2
    await backend.close()
