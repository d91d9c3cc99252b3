"""Between what the parts say and what the database keeps: one adapter for all aggregates."""

import asyncio
import secrets
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import structlog
from pydantic import ValidationError
from sqlalchemy import Connection

from controller.clock import Clock, unix_us
from controller.errors import NotFound, StoreUnavailable
from controller.gateway.auth import ApiKey, hash_key
from controller.gateway.key_cache import KeyCache
from controller.ledger.intervals import DAY_US
from controller.ledger.ledger import Ledger
from controller.ledger.report import GroupBy
from controller.scaling.activation import ColdStart
from controller.scaling.entry import StoredFunction
from controller.scaling.journal import Entry, TransitionEntry, UsageEntry
from controller.store.cold_starts import ColdStarts, StoredColdStart, StoredPhase
from controller.store.database import Database
from controller.store.errors import DatabaseUnavailable, NotStored
from controller.store.functions import DeployedFunction, Functions
from controller.store.keys import Keys, StoredKey
from controller.store.transitions import StoredTransition, Transitions
from controller.store.usage import StoredUsage, Usage
from functions.spec import FunctionSpec, revision

log = structlog.get_logger(__name__)

T = TypeVar("T")

KEY_PREFIX = "sk-"
KEY_BYTES = 32
STORE_RETRY_AFTER_S = 2.0
MAX_EARLIER = 5


class Records:
    """The store as the control plane, the gateway, the admin API and the dashboard see it.

    Every method is one transaction. Those that answer a client raise StoreUnavailable while the
    database is away; the others let its error through.

    Args:
        database: Open and migrated.
        ledger: Answers what things cost.
        clock: Dates what is written.
    """

    def __init__(self, database: Database, ledger: Ledger, clock: Clock) -> None:
        self._database = database
        self._ledger = ledger
        self._clock = clock
        self._known_keys = KeyCache(clock)

    # Functions: controller.scaling.plane.FunctionStore.

    async def load(self) -> list[StoredFunction]:
        """Return every deployed function with its current revision and some earlier ones."""

        def work(connection: Connection) -> list[list[DeployedFunction]]:
            table = Functions(connection)
            return [[one, *table.earlier(one, limit=MAX_EARLIER)] for one in table.list()]

        functions = []
        for current, *earlier in await self._database.run(work):
            try:
                stored = _stored_function(current)
            except ValidationError as error:
                # One spec of another version must not keep all the others from being served.
                log.error("stored spec not valid", function=current.name, error=str(error))
                continue
            functions.append(replace(stored, earlier=tuple(_valid(earlier))))
        return functions

    async def put(self, function: StoredFunction) -> None:
        """Make a revision the current one."""

        def work(connection: Connection) -> None:
            Functions(connection).put(
                function.spec.name,
                spec=function.spec.to_json(),
                revision=revision(function.spec),
                backend=function.backend,
                at_us=unix_us(self._clock.now()),
            )

        await self._answer(work)

    async def delete(self, name: str) -> None:
        """Mark a function deleted; its history stays."""
        at_us = unix_us(self._clock.now())
        await self._answer(lambda connection: Functions(connection).delete(name, at_us=at_us))

    # The journal: controller.scaling.journal.JournalWriter.

    async def write(self, entries: list[Entry]) -> None:
        """Store all of them or none."""

        def work(connection: Connection) -> None:
            Transitions(connection).add(
                _stored_transition(entry) for entry in entries if isinstance(entry, TransitionEntry)
            )
            ColdStarts(connection).add(
                _stored_cold_start(entry) for entry in entries if isinstance(entry, ColdStart)
            )
            Usage(connection).add(
                _stored_usage(entry) for entry in entries if isinstance(entry, UsageEntry)
            )

        await self._database.run(work)

    async def prune(self, history_days: int) -> None:
        """Forget requests, cold starts and transitions that are older; the ledger stays."""
        before_us = unix_us(self._clock.now()) - history_days * DAY_US

        def work(connection: Connection) -> None:
            for aggregate in (Transitions, ColdStarts, Usage):
                aggregate(connection).prune(before_us)

        await self._database.run(work)

    # History: the admin API and the dashboard.

    async def cold_starts(self, *, function: str | None, limit: int) -> list[dict[str, Any]]:
        """Return the latest cold starts, newest first."""
        found = await self._answer(
            lambda connection: ColdStarts(connection).latest(function=function, limit=limit)
        )
        return [_cold_start_view(start) for start in found]

    async def cost(self, *, since: datetime, until: datetime, by: str) -> dict[str, Any]:
        """Return a cost report by function, day or device."""
        with _told_to_the_client():
            report = await self._ledger.cost(since=since, until=until, by=GroupBy(by))
        return report.to_json()

    # Keys: controller.gateway.auth.KeyStore and the admin API.

    async def find(self, key_hash: str) -> ApiKey | None:
        """Return the key with this hash, also an expired or revoked one."""
        return await self._known_keys.find(key_hash, self._find)

    async def _find(self, key_hash: str) -> ApiKey | None:
        stored = await self._answer(lambda connection: Keys(connection).find(key_hash))
        if stored is None:
            return None
        return ApiKey(
            id=stored.id,
            name=stored.name,
            key_hash=stored.key_hash,
            expires_at=None if stored.expires_us is None else _moment(stored.expires_us),
            is_revoked=stored.revoked_us is not None,
        )

    async def may_call(self, key_id: str) -> bool:
        """Return whether a key that was good once still is."""
        now_us = unix_us(self._clock.now())
        try:
            key = await self._answer(lambda connection: Keys(connection).get(key_id))
        except NotStored:
            return False
        return _is_usable(key, now_us)

    async def bootstrap_key(self, path: Path) -> bool:
        """Write a first key to a private file unless one can be used; says whether it did."""
        now_us = unix_us(self._clock.now())
        keys = await self._database.run(lambda connection: Keys(connection).list())
        if any(_is_usable(key, now_us) for key in keys):
            return False
        key, secret = self._new_key("bootstrap", expires_in_s=None)
        # In this order: a key that nobody can read would keep the next start from making one.
        await asyncio.to_thread(_write_private, path, secret + "\n")
        await self._database.run(lambda connection: Keys(connection).create(key))
        return True

    async def create_key(self, name: str, *, expires_in_s: float | None) -> dict[str, Any]:
        """Make a key; its secret is in the answer and nowhere else."""
        key, secret = self._new_key(name, expires_in_s=expires_in_s)
        view = _key_view(key) | {"key": secret}
        await self._answer(lambda connection: Keys(connection).create(key))
        return view

    async def keys(self) -> list[dict[str, Any]]:
        """Return all keys without their secrets."""
        stored: Sequence[StoredKey] = await self._answer(lambda connection: Keys(connection).list())
        return [_key_view(key) for key in stored]

    async def revoke_key(self, key_id: str) -> None:
        """Make a key useless from now on.

        Raises:
            NotFound: There is no such key.
        """
        now_us = unix_us(self._clock.now())
        try:
            await self._answer(lambda connection: Keys(connection).revoke(key_id, at_us=now_us))
        except NotStored as error:
            raise NotFound(f"no API key has the id {key_id!r}") from error
        self._known_keys.clear()

    async def _answer(self, work: Callable[[Connection], T]) -> T:
        """Run a transaction that a client waits for."""
        with _told_to_the_client():
            return await self._database.run(work)

    def _new_key(self, name: str, *, expires_in_s: float | None) -> tuple[StoredKey, str]:
        secret = KEY_PREFIX + secrets.token_urlsafe(KEY_BYTES)
        now_us = unix_us(self._clock.now())
        key = StoredKey(
            id=uuid.uuid4().hex[:12],
            name=name,
            key_hash=hash_key(secret),
            created_us=now_us,
            expires_us=None if expires_in_s is None else now_us + int(expires_in_s * 1e6),
        )
        return key, secret


@contextmanager
def _told_to_the_client() -> Iterator[None]:
    try:
        yield
    except DatabaseUnavailable as error:
        raise StoreUnavailable(
            f"{error}; retry shortly", retry_after_s=STORE_RETRY_AFTER_S
        ) from error


def _is_usable(key: StoredKey, now_us: int) -> bool:
    return key.revoked_us is None and (key.expires_us is None or key.expires_us > now_us)


def _write_private(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)
    path.touch(mode=0o600)
    path.write_text(text)


def _valid(functions: Iterable[DeployedFunction]) -> Iterator[StoredFunction]:
    for function in functions:
        with suppress(ValidationError):
            yield _stored_function(function)


def _stored_function(function: DeployedFunction) -> StoredFunction:
    return StoredFunction(
        spec=FunctionSpec.model_validate(function.spec),
        backend=function.backend,
        created_us=function.created_us,
    )


def _stored_transition(entry: TransitionEntry) -> StoredTransition:
    return StoredTransition(
        replica_id=entry.replica_id,
        function=entry.function,
        at_us=entry.at_us,
        from_state=entry.from_state,
        to_state=entry.to_state,
        reason=entry.reason,
        epoch=entry.epoch,
    )


def _stored_cold_start(start: ColdStart) -> StoredColdStart:
    return StoredColdStart(
        function=start.function,
        replica_id=start.replica_id,
        started_us=start.started_us,
        from_tier=start.from_tier,
        reason=start.reason,
        outcome=start.outcome,
        total_s=start.total_s,
        phases=tuple(StoredPhase(**asdict(one)) for one in start.phases),
    )


def _stored_usage(entry: UsageEntry) -> StoredUsage:
    record = entry.record
    return StoredUsage(
        request_id=record.request_id,
        function=record.function,
        replica_id=record.replica_id,
        key_id=record.key_id,
        started_us=entry.started_us,
        tier=record.tier,
        queue_s=record.queue_s,
        first_token_s=record.first_token_s,
        duration_s=record.duration_s,
        num_prompt_tokens=record.num_prompt_tokens,
        num_cached_tokens=record.num_cached_tokens,
        num_output_tokens=record.num_output_tokens,
        outcome=record.outcome,
    )


def _cold_start_view(start: StoredColdStart) -> dict[str, Any]:
    return {
        "id": start.id,
        "function": start.function,
        "replica_id": start.replica_id,
        "started_at": _moment(start.started_us).isoformat(),
        "from_tier": start.from_tier,
        "reason": start.reason,
        "outcome": start.outcome,
        "total_s": start.total_s,
        "phases": [asdict(one) for one in start.phases],
    }


def _key_view(key: StoredKey) -> dict[str, Any]:
    return {
        "id": key.id,
        "name": key.name,
        "created_at": _moment(key.created_us).isoformat(),
        "expires_at": None if key.expires_us is None else _moment(key.expires_us).isoformat(),
        "revoked_at": None if key.revoked_us is None else _moment(key.revoked_us).isoformat(),
    }


def _moment(at_us: int) -> datetime:
    return datetime.fromtimestamp(at_us / 1e6, UTC)
