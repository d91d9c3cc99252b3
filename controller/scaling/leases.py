"""Requests of one function: who waits for a replica, who has a lease of one, and who is told what.

What a request sees of its function: see `Host` in `controller.scaling.serving`.
"""

import asyncio
from collections.abc import Iterable
from typing import TYPE_CHECKING

import structlog

from controller.clock import Clock
from controller.errors import ActivationFailed, ApiError, ModelNotFound, QueueFull, ShuttingDown
from controller.scaling.lifecycle import Tier
from controller.scaling.link import RuntimeConnection, SequenceStream
from controller.scaling.replica import Replica, Waiter
from controller.scaling.serving import LiveRequest, Ticket
from functions.spec import ColdPolicy, FunctionSpec

if TYPE_CHECKING:
    from controller.scaling.function import Function

log = structlog.get_logger(__name__)


class Leases:
    """Keeps the live requests of one function; the `Host` of each."""

    def __init__(self, function: "Function") -> None:
        self.clock: Clock = function.clock
        self.is_shut = False
        self._function = function
        self._live: set[LiveRequest] = set()
        self._drained: dict[str, asyncio.Event] = {}
        self._warming: asyncio.Task[None] | None = None

    @property
    def name(self) -> str:
        """The function's name."""
        return self._function.name

    @property
    def spec(self) -> FunctionSpec:
        """The current revision."""
        return self._function.spec

    @property
    def tier(self) -> Tier:
        """The warmest tier a new request would find."""
        return self._function.tier

    @property
    def obstacle(self) -> str:
        """What others hold that keeps a replica from its place; empty if nothing does."""
        return self._function.node.memory.obstacle(self._function.deployment.demand)

    @property
    def num_live(self) -> int:
        """Requests that are not over."""
        return len(self._live)

    # Called by requests.

    def admit(self, ticket: Ticket) -> None:
        """Lease or queue at once, or raise why not.

        Raises:
            QueueFull: No place is left.
            ActivationFailed: No replica can be brought up now.
            ModelNotFound: The function has been deleted.
            ShuttingDown: The controller is stopping.
        """
        function = self._function
        if self.is_shut:
            raise self._refusal()
        if not ticket.may_wake and not function.set.has_place:
            raise ActivationFailed(
                f"no replica of {self.name!r} has room now and this request may wake none",
                retry_after_s=1.0,
            )
        if self.tier is not Tier.READY and self.spec.queue.on_cold is ColdPolicy.REJECT:
            self._wake_without_waiting()
            eta = self.eta_s(self.tier, 0.0)
            raise ActivationFailed(
                f"{self.name!r} is {self.tier} and its queue.on_cold is reject; it is being woken",
                retry_after_s=eta,
            )
        now = self.clock.monotonic()
        function.tenancy.called(now)
        try:
            function.set.admit(ticket, now=now)
        except QueueFull as error:
            eta_s = self.eta_s(self.tier, 0.0)  # nobody leaves the queue before a replica is up
            error.retry_after_s = max(error.retry_after_s or 0.0, eta_s or 0.0)
            raise
        self._granted(ticket)

    def readmit(self, ticket: Ticket) -> None:
        """Queue again, at the head, after the leased replica was lost; a shut function refuses."""
        if ticket.replica is not None:
            self._function.lost(ticket.replica, "the connection to the runtime broke")
        self.notify(self._function.set.readmit(ticket))
        if self.is_shut:
            self._refuse_waiters()
        self._function.poke()

    def abandon(self, ticket: Ticket) -> None:
        """Leave the queue."""
        self._function.set.abandon(ticket)
        self._function.poke()

    def release(self, replica: Replica) -> None:
        """Give a lease back."""
        function = self._function
        function.set.release(replica, now=self.clock.monotonic())
        if replica.in_flight == 0:
            if (drained := self._drained.get(replica.id)) is not None:
                drained.set()
            function.profiles.idle(replica)
        function.books.account(replica)
        function.poke()

    def attachment(self, replica: Replica) -> SequenceStream:
        """Return a leased replica's stream."""
        return self._function.links[replica.id].attachment

    def connection(self, replica: Replica) -> RuntimeConnection:
        """Return a leased replica's connection."""
        return self._function.links[replica.id].connection

    def eta_s(self, tier: str, waited_s: float) -> float | None:
        """Return the expected rest of a cold start, from the measured ones."""
        return self._function.books.eta_s(tier, waited_s)

    def entered(self, generation: LiveRequest) -> None:
        """Note that a request was admitted."""
        self._live.add(generation)

    def first_token(self, generation: LiveRequest, replica: Replica) -> None:
        """Note a request's first token; the first after a cold start closes its books."""
        books = self._function.books
        books.served(replica, waiting_since=generation.queued_at)
        generation.record.timeline = books.timeline(
            replica, received_at=generation.received_at, admitted_at=generation.admitted_at
        )

    def left(self, generation: LiveRequest) -> None:
        """Note that a request is over; its record is complete."""
        function = self._function
        self._live.discard(generation)
        replica = function.set.replicas.get(generation.record.replica_id or "")
        if replica is not None and generation.record.first_token_s is None:
            function.books.ready(replica)
        function.books.used(generation.record)
        function.poke()

    # Called by the function.

    def grant(self) -> None:
        """Lease what is free to those who wait."""
        for waiter in self._function.set.grant():
            self._granted(waiter)

    def waiting_since(self, replica: Replica) -> float | None:
        """Return the monotonic second the first request began to wait for a lease or this replica.

        None if there is none; one that has had its first token waits no more.
        """
        waiting = (
            one.queued_at
            for one in self._live
            if one.record.first_token_s is None and one.replica in (None, replica)
        )
        return min(waiting, default=None)

    def notify(self, waiters: Iterable[Waiter]) -> None:
        """Tell waiters that it was decided about them."""
        for waiter in waiters:
            assert isinstance(waiter, Ticket)
            waiter.decided.set()

    def check_deadlines(self) -> None:
        """End requests that have waited too long for something."""
        now = self.clock.monotonic()
        for generation in list(self._live):
            generation.check_deadlines(now)

    def shut(self) -> None:
        """Take no more requests and refuse those that wait; the running ones go on."""
        self.is_shut = True
        self._refuse_waiters()

    def close(self) -> None:
        """Be shut, and wake nothing any more."""
        self.shut()
        if self._warming is not None:
            self._warming.cancel()

    async def drained(self, replica: Replica) -> None:
        """Return when the replica has no lease out or the drain timeout has passed."""
        if replica.in_flight == 0:
            return
        event = self._drained.setdefault(replica.id, asyncio.Event())
        try:
            async with asyncio.timeout(self.spec.timeouts.drain):
                await event.wait()
        except TimeoutError:
            log.warning("drain timeout", function=self.name, replica_id=replica.id)
        finally:
            self._drained.pop(replica.id, None)

    async def warm(self) -> None:
        """Return once a replica is ready; its idle clock starts anew.

        Raises:
            ApiError: It could not be brought up in time.
        """
        if self.is_shut:
            raise self._refusal()
        ticket = Ticket(num_bytes=0)
        self._function.set.admit(ticket, now=self.clock.monotonic())
        self._granted(ticket)
        try:
            async with asyncio.timeout(self.spec.timeouts.startup):
                self._function.books.ready(await _lease_of(ticket))
        except TimeoutError as error:
            limit = self.spec.timeouts.startup
            why = f": {obstacle}" if (obstacle := self.obstacle) else ""
            raise ActivationFailed(
                f"{self.name!r} was not ready within timeouts.startup, {limit:g} s{why}"
            ) from error
        finally:
            self.abandon(ticket)
            if ticket.replica is not None:
                self.release(ticket.replica)

    def _granted(self, waiter: Waiter) -> None:
        if waiter.replica is not None:
            self._function.books.account(waiter.replica)
            self.notify([waiter])
        self._function.poke()

    def _refusal(self) -> ApiError:
        """Return why a shut function takes no request."""
        if self._function.set.is_closing:
            return ModelNotFound(f"{self.name!r} was deleted; GET /v1/models lists what is served")
        return ShuttingDown("the controller is stopping; retry elsewhere", retry_after_s=5.0)

    def _refuse_waiters(self) -> None:
        self.notify(self._function.set.fail_waiters(self._refusal()))

    def _wake_without_waiting(self) -> None:
        """Bring a replica up for the sake of later requests."""
        if self._warming is None or self._warming.done():
            self._warming = asyncio.create_task(self._warm_quietly(), name=f"warm {self.name}")

    async def _warm_quietly(self) -> None:
        try:
            await self.warm()
        except ApiError as error:
            log.warning("warm-up failed", function=self.name, error=error.message)


async def _lease_of(ticket: Ticket) -> Replica:
    await ticket.decided.wait()
    if ticket.failure is not None:
        raise ticket.failure
    assert ticket.replica is not None
    return ticket.replica
