"""One call to embed on its way through a function: wait for a lease, run, give back."""

from collections.abc import Sequence
from types import TracebackType
from typing import Protocol, Self

from controller.errors import ApiError, FirstTokenTimeout, InternalError, RuntimeDied
from controller.scaling.embedding import EmbeddingRequest
from controller.scaling.generation import GenerationRecord
from controller.scaling.link import RuntimeConnection
from controller.scaling.replica import Replica
from controller.scaling.serving import MAX_ATTEMPTS, Host, Ticket, expire_in_queue
from runtime.rpc import inference_pb2 as pb
from runtime.rpc.client import RuntimeRpcError, RuntimeTimedOut, RuntimeUnavailable


class EmbeddingHost(Host, Protocol):
    """What a call needs of the function it runs on."""

    def connection(self, replica: Replica) -> RuntimeConnection:
        """Return a leased replica's connection."""


class FunctionEmbedding:
    """One admitted call; see `controller.scaling.embedding.Embedding`."""

    def __init__(self, host: EmbeddingHost, request: EmbeddingRequest) -> None:
        self.record = GenerationRecord(
            request_id=request.request_id,
            function=host.name,
            tier=str(host.tier),
            key_id=request.key_id,
            num_prompt_tokens=sum(map(len, request.texts)),
        )
        self.received_at = request.received_at
        self.admitted_at = 0.0
        self._host = host
        self._request = request
        self._ticket = Ticket(num_bytes=request.num_bytes, may_wake=request.may_wake)

    async def __aenter__(self) -> Self:
        self.admitted_at = self._host.clock.monotonic()
        self.record.tier = str(self._host.tier)
        self._ticket.queued(self.admitted_at)
        self._host.admit(self._ticket)
        self._host.entered(self)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if isinstance(error, ApiError):
            self.record.outcome = error.code or error.type
        self.record.duration_s = self._elapsed_s()
        self._host.abandon(self._ticket)
        replica, self._ticket.replica = self._ticket.replica, None
        if replica is not None:
            self._host.release(replica)
        self._host.left(self)

    async def run(self) -> Sequence[bytes]:
        """Return one vector per text; a replica that is lost is replaced once."""
        for attempt in range(1, MAX_ATTEMPTS + 1):
            replica = await self._lease()
            try:
                embeddings = await self._embed(replica)
            except RuntimeUnavailable as error:
                if attempt == MAX_ATTEMPTS:
                    raise RuntimeDied(
                        f"the replica of {self._host.name!r} went away while it embedded: "
                        f"{error}; retry"
                    ) from error
                self._host.release(replica)
                self._ticket.queued(self._host.clock.monotonic())
                self._host.readmit(self._ticket)
            else:
                self.record.first_token_s = self._elapsed_s()
                self.record.outcome = "stop"
                self._host.first_token(self, replica)
                return embeddings
        raise AssertionError("the last attempt returns or raises")

    @property
    def replica(self) -> Replica | None:
        """The replica it has a lease of; None while it waits for one."""
        return self._ticket.replica

    @property
    def queued_at(self) -> float:
        """Monotonic second it began to wait for the replica it has."""
        return self._ticket.queued_at

    def check_deadlines(self, now: float) -> None:
        """End the call if it has waited too long for a lease; the rest has a time limit."""
        expire_in_queue(self._host, self._ticket, now)

    async def _lease(self) -> Replica:
        if self._ticket.replica is None:
            await self._ticket.decided.wait()
        if self._ticket.failure is not None:
            raise self._ticket.failure
        replica = self._ticket.replica
        assert replica is not None
        self._ticket.leased(self._host.clock.monotonic())
        self.record.queue_s = self._ticket.waited_s
        self.record.replica_id = replica.id
        return replica

    async def _embed(self, replica: Replica) -> Sequence[bytes]:
        request = pb.EmbedRequest(
            texts=[pb.EmbedRequest.Text(token_ids=text) for text in self._request.texts],
            dimensions=self._request.dimensions or 0,
        )
        limit = self._host.spec.timeouts.first_token
        try:
            response = await self._host.connection(replica).embed(request, timeout_s=limit)
        except RuntimeTimedOut as error:
            raise FirstTokenTimeout(
                f"{self._host.name!r} did not embed within timeouts.first_token, {limit:g} s; send "
                "fewer texts, retry, or raise the limit"
            ) from error
        except RuntimeUnavailable:
            raise
        except RuntimeRpcError as error:
            raise InternalError(f"the runtime did not embed: {error}") from error
        return response.embeddings

    def _elapsed_s(self) -> float:
        return self._host.clock.monotonic() - self.admitted_at
