"""The gRPC face of a runtime: messages in, messages out, faults to statuses. No scheduling.

Free of torch. Attach passes messages as bytes in both directions; only the engine and the
controller parse them.
"""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import structlog
from google.protobuf.message import Message

from runtime.engine_stream import EngineStream
from runtime.errors import GRPC_STATUS, RuntimeFault
from runtime.ipc import MAX_PAYLOAD_BYTES
from runtime.linux import adopt_orphans
from runtime.logs import configure_logs
from runtime.named import find_named
from runtime.rpc import inference_pb2 as pb
from runtime.spawn import ZygoteOptions, ZygoteProcess
from runtime.status_board import StatusBoard
from runtime.supervisor import Supervisor
from runtime.suspension import Suspension
from runtime.version import VERSION

SERVICE = pb.DESCRIPTOR.services_by_name["RuntimeService"]
SERVER_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_PAYLOAD_BYTES),
    ("grpc.max_send_message_length", MAX_PAYLOAD_BYTES),
    ("grpc.so_reuseport", 0),
)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
CLOSE_GRACE_S = 0.5  # for clients to read the last message of their streams

log = structlog.get_logger()

Handler = Callable[[Any, grpc.aio.ServicerContext[Any, Any]], Awaitable[Any]]


class RuntimeServicer:
    """One method per RPC; the wire's documentation is in inference.proto."""

    def __init__(self, supervisor: Supervisor, board: StatusBoard) -> None:
        self._supervisor = supervisor
        self._board = board

    async def load(self, request: pb.LoadRequest, _context: object) -> pb.LoadResponse:
        """Answer Load."""
        return await self._supervisor.load(request)

    async def embed(self, request: pb.EmbedRequest, _context: object) -> pb.EmbedResponse:
        """Answer Embed."""
        return await self._supervisor.embed(request)

    async def park(self, request: pb.ParkRequest, _context: object) -> pb.ParkResponse:
        """Answer Park."""
        return await self._supervisor.park(request)

    async def wake(self, request: pb.WakeRequest, _context: object) -> pb.WakeResponse:
        """Answer Wake."""
        return await self._supervisor.wake(request)

    async def drain(self, request: pb.DrainRequest, _context: object) -> pb.DrainResponse:
        """Answer Drain."""
        return await self._supervisor.drain(request)

    async def profile(self, request: pb.ProfileRequest, _context: object) -> pb.ProfileResponse:
        """Answer Profile."""
        return await self._supervisor.profile(request)

    async def unload(self, _request: pb.UnloadRequest, _context: object) -> pb.UnloadResponse:
        """Answer Unload."""
        await self._supervisor.unload()
        return pb.UnloadResponse()

    async def health(self, _request: pb.HealthRequest, _context: object) -> pb.RuntimeStatus:
        """Answer Health."""
        return self._board.read()

    async def watch(
        self,
        _request: pb.WatchRequest,
        context: grpc.aio.ServicerContext[pb.WatchRequest, pb.RuntimeStatus],
    ) -> None:
        """Answer Watch until the client leaves."""
        async with aclosing(self._board.follow()) as statuses:
            async for status in statuses:
                await context.write(status)

    async def attach(
        self,
        requests: AsyncIterator[bytes],
        context: grpc.aio.ServicerContext[bytes, bytes],
    ) -> None:
        """Answer Attach until the client closes its side or the engine ends the stream."""
        with self._supervisor.open_stream() as stream:
            await context.write(b"")  # an empty StepOutput: the stream is open
            inward = asyncio.create_task(_forward(requests, stream), name="attach inward")
            outward = asyncio.create_task(_deliver(context, stream), name="attach outward")
            try:
                ends: set[asyncio.Future[Any]] = {inward, outward, stream.failed}
                await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            finally:
                inward.cancel()
                outward.cancel()
                results = await asyncio.gather(inward, outward, return_exceptions=True)
            if stream.failed.done():
                raise stream.failed.result()
            for error in results:
                if isinstance(error, Exception):
                    raise error


def service_handler(servicer: RuntimeServicer) -> "grpc.GenericRpcHandler[Any, Any]":
    """Return the handlers of all RPCs; Attach has no serializers and so passes bytes."""
    handlers = {
        "Load": _unary(servicer.load, pb.LoadRequest),
        "Embed": _unary(servicer.embed, pb.EmbedRequest),
        "Park": _unary(servicer.park, pb.ParkRequest),
        "Wake": _unary(servicer.wake, pb.WakeRequest),
        "Drain": _unary(servicer.drain, pb.DrainRequest),
        "Profile": _unary(servicer.profile, pb.ProfileRequest),
        "Unload": _unary(servicer.unload, pb.UnloadRequest),
        "Health": _unary(servicer.health, pb.HealthRequest),
        "Watch": grpc.unary_stream_rpc_method_handler(
            _translated(servicer.watch),
            request_deserializer=pb.WatchRequest.FromString,
            response_serializer=pb.RuntimeStatus.SerializeToString,
        ),
        "Attach": grpc.stream_stream_rpc_method_handler(_translated(servicer.attach)),
    }
    return grpc.method_handlers_generic_handler(SERVICE.full_name, handlers)


async def serve(
    socket_path: Path, options: ZygoteOptions, zygote: ZygoteProcess, *, checkpoints: str
) -> None:
    """Run a runtime until SIGTERM or SIGINT, then end everything below it.

    Args:
        socket_path: Where to listen; its directory exists.
        options: How to start another zygote, should the first die.
        zygote: The first one, just spawned.
        checkpoints: `module:callable` that opens what takes engines off their GPUs.
    """
    configure_logs(options.log_level, runtime_id=options.runtime_id)
    adopt_orphans()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in STOP_SIGNALS:
        loop.add_signal_handler(number, stop.set)
    board = StatusBoard(runtime_id=options.runtime_id, build=VERSION)
    suspension = Suspension(find_named(checkpoints))
    if os.environ.get("CUDA_VISIBLE_DEVICES"):
        suspension.prepare()
    supervisor = Supervisor(options, board, suspension)
    supervisor.start(zygote)
    server = await start_server(RuntimeServicer(supervisor, board), socket_path)
    log.info("serving", socket=str(socket_path))
    await stop.wait()
    log.info("stopping")
    for number in STOP_SIGNALS:  # a second one must not cut short what takes a moment
        loop.remove_signal_handler(number)
        signal.signal(number, signal.SIG_IGN)
    board.close()
    await asyncio.gather(server.stop(CLOSE_GRACE_S), supervisor.stop())


async def start_server(servicer: RuntimeServicer, socket_path: Path) -> grpc.aio.Server:
    """Serve on a Unix socket that only this user can open.

    Raises:
        OSError: The socket cannot be created.
    """
    server = grpc.aio.server(options=SERVER_OPTIONS)
    server.add_generic_rpc_handlers((service_handler(servicer),))
    _listen(server, socket_path)
    await server.start()
    return server


def _listen(server: grpc.aio.Server, socket_path: Path) -> None:
    try:
        server.add_insecure_port(f"unix:{socket_path}")
    except RuntimeError as error:
        raise OSError(f"cannot listen on {socket_path}: {error}") from error
    socket_path.chmod(0o600)


async def _forward(requests: AsyncIterator[bytes], stream: EngineStream) -> None:
    async for request in requests:
        await stream.forward(request)


async def _deliver(context: grpc.aio.ServicerContext[bytes, bytes], stream: EngineStream) -> None:
    while True:
        await context.write(await stream.next_output())


def _unary(handler: Handler, request_type: type[Message]) -> "grpc.RpcMethodHandler[Any, Any]":
    return grpc.unary_unary_rpc_method_handler(
        _translated(handler),
        request_deserializer=request_type.FromString,
        response_serializer=lambda response: response.SerializeToString(),
    )


def _translated(handler: Handler) -> Handler:
    """Return the handler with faults turned into statuses, once and for all RPCs."""

    async def answer(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            return await handler(request, context)
        except RuntimeFault as fault:
            status = grpc.StatusCode[GRPC_STATUS[type(fault)]]
            await context.abort(status, str(fault))
        except Exception:
            log.exception("rpc_failed", rpc=handler.__name__)
            await context.abort(grpc.StatusCode.INTERNAL, "a defect; the runtime's log has more")

    return answer
