"""The wire to one runtime, and the last thing it said about itself."""

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Protocol

from runtime.rpc import inference_pb2 as pb
from runtime.rpc.client import RuntimeRpcError, SequenceSink


class SequenceStream(Protocol):
    """A stream of sequences to one runtime; errors are RuntimeRpcError."""

    @property
    def is_broken(self) -> bool:
        """Whether it has ended; it does not come back."""

    def submit(
        self,
        prompt_token_ids: Sequence[int],
        sampling: pb.SamplingParams,
        sink: SequenceSink,
        *,
        priority: int = 0,
        cache_salt: str = "",
    ) -> int:
        """Queue a sequence and return its id; never waits."""

    def cancel(self, sequence_id: int) -> None:
        """Ask for the end of a sequence; its sink hears of it."""

    async def close(self) -> None:
        """End the stream and its sequences."""


class RuntimeConnection(Protocol):
    """What a function needs of a runtime's client; errors are RuntimeRpcError."""

    async def wait_reachable(self, timeout_s: float) -> None:
        """Return when the runtime answers."""

    async def load(self, request: pb.LoadRequest, *, timeout_s: float) -> pb.LoadResponse:
        """Load a snapshot."""

    async def embed(self, request: pb.EmbedRequest, *, timeout_s: float) -> pb.EmbedResponse:
        """Embed texts; cancelling drops those that have not been computed."""

    async def park(self, *, timeout_s: float, mode: pb.ParkMode.ValueType) -> pb.ParkResponse:
        """Give weights and KV back."""

    async def wake(self, device_uuids: Sequence[str], *, timeout_s: float) -> pb.WakeResponse:
        """Reverse a park."""

    async def profile(self, *, with_kernels: bool, timeout_s: float) -> pb.ProfileResponse:
        """Return what the engine has learned for later starts."""

    async def unload(self, *, timeout_s: float) -> None:
        """End the engine; the runtime stays."""

    async def health(self, *, timeout_s: float) -> pb.RuntimeStatus:
        """Return one status."""

    def watch(self) -> AsyncIterator[pb.RuntimeStatus]:
        """Yield a status after every change."""

    async def attach(self) -> SequenceStream:
        """Open a stream for sequences."""

    async def close(self) -> None:
        """Close the connection; the runtime goes on."""


Connect = Callable[[str], RuntimeConnection]


class RuntimeLink:
    """One replica's connection and its stream of sequences."""

    def __init__(self, connection: RuntimeConnection) -> None:
        self.connection = connection
        self.status = pb.RuntimeStatus()
        self.freed_bytes = 0
        self.kept_bytes: int | None = (
            None  # of each device, when parked; None before the first time
        )
        self.is_profiled = False  # whether what its start missed has been recorded, or cannot be
        self._attachment: SequenceStream | None = None

    @property
    def attachment(self) -> SequenceStream:
        """The open stream.

        Raises:
            AssertionError: The replica was never ready.
        """
        assert self._attachment is not None, "a replica that was never ready has no stream"
        return self._attachment

    async def attach(self) -> None:
        """Open the stream of sequences, unless one is open."""
        if self._attachment is None or self._attachment.is_broken:
            self._attachment = await self.connection.attach()

    async def detach(self) -> None:
        """Close the stream of sequences, and keep the connection."""
        attachment, self._attachment = self._attachment, None
        if attachment is not None:
            await attachment.close()

    async def close(self) -> None:
        """Close stream and connection; errors of a runtime that is gone do not matter."""
        try:
            await self.detach()
            await self.connection.close()
        except RuntimeRpcError:
            pass
