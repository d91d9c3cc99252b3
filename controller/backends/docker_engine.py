"""A Docker Engine's blocking client, off the event loop, with its failures translated."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeAlias, TypeVar

import docker
from docker.errors import APIError, DockerException
from docker.types import CancellableStream
from requests.exceptions import RequestException

from controller.backends.base import BackendError, BackendUnavailable

T = TypeVar("T")

Opener: TypeAlias = "Callable[[docker.DockerClient], CancellableStream[T]]"

CALL_TIMEOUT_S = 30
MAX_CALLS = 16
MAX_QUEUED_CHUNKS = 64


class DockerEngine:
    """Connects when first needed, and again after a failure.

    Args:
        connect: Opens a client; raises DockerException when nothing answers.
    """

    def __init__(self, connect: Callable[[], docker.DockerClient] | None = None) -> None:
        self._connect = connect or connect_from_environment
        self._client: docker.DockerClient | None = None
        self._connecting = threading.Lock()
        self._threads = ThreadPoolExecutor(MAX_CALLS, thread_name_prefix="docker")

    async def call(self, operation: Callable[[docker.DockerClient], T]) -> T:
        """Run blocking calls in a thread; a cancelled caller leaves them running.

        Raises:
            BackendUnavailable: The engine does not answer.
            BackendError: The engine refused, in a way the operation did not expect.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._translated, operation)

    @asynccontextmanager
    async def stream(self, opener: "Opener[T]") -> AsyncIterator[AsyncIterator[list[T]]]:
        """Open a stream and give its items, all there are at a time, until it ends.

        Leaving the context closes the stream.

        Raises:
            BackendUnavailable: The engine does not answer, or has gone away since.
        """
        source = await self._open(opener)
        queue: asyncio.Queue[T | BackendError | None] = asyncio.Queue(MAX_QUEUED_CHUNKS)
        pump = _Pump(source, queue)
        pump.start()
        try:
            yield _batches(queue)
        finally:
            pump.stop()

    def close(self) -> None:
        """Let go of the connection; calls in progress end by themselves."""
        self._threads.shutdown(wait=False)
        if self._client is not None:
            self._client.close()
            self._client = None

    async def _open(self, opener: "Opener[T]") -> "CancellableStream[T]":
        opening = asyncio.ensure_future(self.call(opener))
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(_close_unwanted)
            raise

    def _translated(self, operation: Callable[[docker.DockerClient], T]) -> T:
        with translated():
            return operation(self._connected())

    def _connected(self) -> docker.DockerClient:
        with self._connecting:
            if self._client is None:
                self._client = self._connect()
            return self._client


class _Pump(threading.Thread):
    """Moves what a blocking stream gives to a queue of an event loop."""

    def __init__(self, source: "CancellableStream[Any]", queue: "asyncio.Queue[Any]") -> None:
        super().__init__(name="docker stream", daemon=True)
        self._source = source
        self._queue = queue
        self._loop = asyncio.get_running_loop()
        self._is_stopped = False

    def stop(self) -> None:
        """Close the stream; does not wait for the thread."""
        self._is_stopped = True
        _close(self._source)
        while not self._queue.empty():
            self._queue.get_nowait()

    def run(self) -> None:
        """Read until the stream ends, breaks or is stopped."""
        last: BackendError | None = None
        try:
            with translated():
                for item in self._source:
                    self._put(item)
        except BackendError as error:
            last = error
        finally:
            self._put(last)

    def _put(self, item: object) -> None:
        if self._is_stopped:
            return
        try:
            asyncio.run_coroutine_threadsafe(self._queue.put(item), self._loop).result()
        except RuntimeError:
            self._is_stopped = True  # the loop is closed


async def _batches(queue: "asyncio.Queue[T | BackendError | None]") -> AsyncIterator[list[T]]:
    while True:
        items = [await queue.get()]
        while not queue.empty():
            items.append(queue.get_nowait())
        last = items[-1]
        if batch := [
            item for item in items if not (item is None or isinstance(item, BackendError))
        ]:
            yield batch
        if isinstance(last, BackendError):
            raise last
        if last is None:
            return


def _close(source: "CancellableStream[Any]") -> None:
    with contextlib.suppress(AttributeError, OSError):  # what the library raises at its own end
        source.close()


def _close_unwanted(opening: "asyncio.Future[CancellableStream[Any]]") -> None:
    if not opening.cancelled() and opening.exception() is None:
        _close(opening.result())


def connect_from_environment() -> docker.DockerClient:
    """Return a client of the engine that DOCKER_HOST and its kin name."""
    return docker.from_env(timeout=CALL_TIMEOUT_S)


@contextmanager
def translated() -> Iterator[None]:
    """Turn what the client library raises into the backend's errors."""
    try:
        yield
    except APIError as error:
        is_temporary = error.status_code is not None and error.status_code >= 500
        message = f"the Docker engine refused: {error.explanation or error}"
        raise BackendError(message, temporary=is_temporary) from error
    except (DockerException, RequestException, OSError) as error:
        raise BackendUnavailable(_advice(error), temporary=True) from error


def _advice(error: Exception) -> str:
    text = str(error)
    if "Permission denied" in text:
        return "this user may not use the Docker engine; add it to the group 'docker'"
    return (
        f"no Docker engine answers ({text}); start it, or name it in DOCKER_HOST,"
        " or deploy with --backend process"
    )
