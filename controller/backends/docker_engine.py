"""A Docker Engine's blocking client, off the event loop, with its failures translated."""

import asyncio
import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Generic, TypeAlias, TypeVar

import docker
from docker.errors import APIError, DockerException
from docker.types import CancellableStream
from docker.utils import parse_host
from requests.exceptions import RequestException

from controller.backends.base import BackendError, BackendUnavailable

T = TypeVar("T")
Opener: TypeAlias = "Callable[[docker.DockerClient], CancellableStream[T]]"

CALL_TIMEOUT_S = 30
MAX_CALLS = 16
MAX_QUEUED_ITEMS = 64
UNIX_SCHEME = "http+unix://"


class DockerEngine:
    """Connects when first needed, and again after a failure.

    Args:
        connect: Opens a client; raises DockerException or OSError when nothing answers.
    """

    def __init__(self, connect: Callable[[], docker.DockerClient] | None = None) -> None:
        self._connect = connect or connect_from_environment
        self._client: docker.DockerClient | None = None
        self._connecting = threading.Lock()
        self._threads = ThreadPoolExecutor(MAX_CALLS, thread_name_prefix="docker")
        self._streams: set[DockerStream[Any]] = set()

    async def call(self, operation: Callable[[docker.DockerClient], T]) -> T:
        """Run blocking calls in a thread; a cancelled caller leaves them running.

        Raises:
            BackendUnavailable: The engine does not answer.
            BackendError: The engine refused, in a way the operation did not expect.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._translated, operation)

    def stream(self, opener: "Opener[T]") -> "DockerStream[T]":
        """Return a stream to be entered as a context and iterated over."""
        return DockerStream(self, opener)

    def close(self) -> None:
        """Let go of the connection; calls in progress end by themselves, streams at once."""
        for stream in list(self._streams):
            stream.close()
        self._threads.shutdown(wait=False)
        if self._client is not None:
            self._client.close()
            self._client = None

    def _translated(self, operation: Callable[[docker.DockerClient], T]) -> T:
        with translated():
            return operation(self._connected())

    def _connected(self) -> docker.DockerClient:
        with self._connecting:
            if self._client is None:
                self._client = self._connect()
            return self._client


class DockerStream(Generic[T]):
    """What the engine sends without end, in lists of all there is at a time.

    Entering opens it and leaving closes it. Entering and iterating raise BackendUnavailable when
    the engine does not answer or breaks off; an orderly end ends the iteration.
    """

    def __init__(self, engine: DockerEngine, opener: "Opener[T]") -> None:
        self._engine = engine
        self._opener = opener
        self._source: CancellableStream[T] | None = None
        self._queue: asyncio.Queue[T | BackendError | None] = asyncio.Queue(MAX_QUEUED_ITEMS)
        self._end: BackendError | None = None
        self._has_ended = False
        self._is_closed = False

    async def __aenter__(self) -> "DockerStream[T]":
        """Open the stream and begin to read it, in a thread of its own."""
        opening = asyncio.ensure_future(self._engine.call(self._opener))
        try:
            self._source = await asyncio.shield(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(_close_unwanted)
            raise
        self._engine._streams.add(self)
        loop = asyncio.get_running_loop()
        threading.Thread(
            target=self._pump, args=(self._source, loop), name="docker stream", daemon=True
        ).start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the stream."""
        self.close()

    def __aiter__(self) -> "DockerStream[T]":
        """Return itself."""
        return self

    async def __anext__(self) -> list[T]:
        """Wait for items; return all there are."""
        batch: list[T] = []
        while not self._has_ended and not (batch and self._queue.empty()):
            item = await self._queue.get()
            if item is None or isinstance(item, BackendError):
                self._has_ended, self._end = True, item
            else:
                batch.append(item)
        if batch:
            return batch
        if self._end is not None:
            raise self._end
        raise StopAsyncIteration

    def close(self) -> None:
        """End the stream; does not wait for its thread."""
        self._is_closed = True
        self._engine._streams.discard(self)
        if self._source is not None:
            _close(self._source)
        while not self._queue.empty():  # room for what the thread is about to put
            self._queue.get_nowait()
        self._queue.put_nowait(None)

    def _pump(self, source: "CancellableStream[T]", loop: asyncio.AbstractEventLoop) -> None:
        end: BackendError | None = None
        try:
            with translated():
                for item in source:
                    self._put(item, loop)
        except BackendError as error:
            end = error
        finally:
            self._put(end, loop)

    def _put(self, item: T | BackendError | None, loop: asyncio.AbstractEventLoop) -> None:
        if not self._is_closed:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                asyncio.run_coroutine_threadsafe(self._queue.put(item), loop).result()


def connect_from_environment() -> docker.DockerClient:
    """Return a client of the engine that DOCKER_HOST and its kin name.

    Raises:
        OSError: Nothing listens there.
        DockerException: What listens does not answer as an engine does.
    """
    host = str(parse_host(os.environ.get("DOCKER_HOST")))
    if host.startswith(UNIX_SCHEME):
        with socket.socket(socket.AF_UNIX) as probe:  # the library leaks the socket if it fails
            probe.connect(host.removeprefix(UNIX_SCHEME))
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
        raise BackendUnavailable(_advice(_root_of(error)), temporary=True) from error


def _root_of(error: BaseException) -> BaseException:
    """Return what the client library wrapped, some three times."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return error


def _advice(error: BaseException) -> str:
    if isinstance(error, PermissionError):
        return "this user may not use the Docker engine; add it to the group 'docker'"
    host = os.environ.get("DOCKER_HOST") or "/var/run/docker.sock"
    return (
        f"no Docker engine answers at {host} ({error}); start it, or name another in DOCKER_HOST,"
        " or deploy with --backend process"
    )


def _close(source: "CancellableStream[T]") -> None:
    with contextlib.suppress(AttributeError, OSError):  # what the library raises at its own end
        source.close()


def _close_unwanted(opening: "asyncio.Future[CancellableStream[T]]") -> None:
    if not opening.cancelled() and opening.exception() is None:
        _close(opening.result())
