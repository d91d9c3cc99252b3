"""Every table. Columns ending in `_us` are microseconds since the Unix epoch.

The schema changes only by a migration; a test proves that the migrations lead to what is here.
"""

from decimal import Decimal
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    ColumnElement,
    Dialect,
    Float,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    Label,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
    literal_column,
)

from controller.ledger.intervals import DAY_US, HOUR_US

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)

RowId = BigInteger().with_variant(Integer, "sqlite")  # only INTEGER counts up by itself there


class ExactDecimal(TypeDecorator[Decimal]):
    """A decimal as text: no database rounds it."""

    impl = String
    cache_ok = True

    def process_bind_param(self, value: Decimal | None, dialect: Dialect) -> str | None:
        """Write it without an exponent."""
        return None if value is None else f"{value:f}"

    def process_result_value(self, value: Any | None, dialect: Dialect) -> Decimal | None:
        """Read it back as it was."""
        return None if value is None else Decimal(value)


functions = Table(
    "functions",
    metadata,
    Column("name", String(63), primary_key=True),
    Column("created_us", BigInteger, nullable=False),  # of the first deployment ever
)

revisions = Table(
    "revisions",
    metadata,
    Column("function", ForeignKey("functions.name"), primary_key=True),
    Column("revision", String(64), primary_key=True),
    Column("spec", JSON, nullable=False),
    Column("created_us", BigInteger, nullable=False),
)

deployments = Table(  # which revision was current when; at most one open row a function
    "deployments",
    metadata,
    Column("id", RowId, primary_key=True),
    Column("function", String(63), nullable=False),
    Column("revision", String(64), nullable=False),
    Column("backend", String(32), nullable=False),
    Column("from_us", BigInteger, nullable=False),
    Column("until_us", BigInteger),
    ForeignKeyConstraint(["function", "revision"], ["revisions.function", "revisions.revision"]),
)
Index(
    "uq_deployments_current",
    deployments.c.function,
    unique=True,
    sqlite_where=deployments.c.until_us.is_(None),
    postgresql_where=deployments.c.until_us.is_(None),
)

transitions = Table(
    "transitions",
    metadata,
    Column("id", RowId, primary_key=True),
    Column("replica_id", String(128), nullable=False, index=True),
    Column("function", String(63), nullable=False),
    Column("at_us", BigInteger, nullable=False, index=True),
    Column("from_state", String(16)),
    Column("to_state", String(16), nullable=False),
    Column("reason", Text, nullable=False),
    Column("epoch", BigInteger, nullable=False),
)

cold_starts = Table(
    "cold_starts",
    metadata,
    Column("id", RowId, primary_key=True),
    Column("function", String(63), nullable=False),
    Column("replica_id", String(128), nullable=False),
    Column("started_us", BigInteger, nullable=False, index=True),
    Column("from_tier", String(16), nullable=False),
    Column("reason", Text, nullable=False),
    Column("outcome", String(16), nullable=False),
    Column("total_s", Float, nullable=False),
    Column("phases", JSON, nullable=False),  # [{"name": …, "seconds": …, "gb_per_s": …}] in order
    Index(None, "function", "started_us"),
)

usage = Table(
    "usage",
    metadata,
    Column("id", RowId, primary_key=True),
    Column("request_id", String(128), nullable=False, index=True),
    Column("function", String(63), nullable=False),
    Column("replica_id", String(128)),  # null when the request never got one
    Column("key_id", String(64)),
    Column("started_us", BigInteger, nullable=False, index=True),
    Column("tier", String(16), nullable=False),
    Column("queue_s", Float),
    Column("first_token_s", Float),
    Column("duration_s", Float, nullable=False),
    Column("num_prompt_tokens", BigInteger, nullable=False),
    Column("num_cached_tokens", BigInteger, nullable=False),
    Column("num_output_tokens", BigInteger, nullable=False),
    Column("outcome", String(64), nullable=False),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("name", String(100), nullable=False),
    Column("key_hash", String(64), nullable=False, unique=True),
    Column("created_us", BigInteger, nullable=False),
    Column("expires_us", BigInteger),
    Column("revoked_us", BigInteger),
)

files = Table(
    "files",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("key_id", String(64)),
    Column("filename", Text, nullable=False),
    Column("purpose", String(32), nullable=False),
    Column("num_bytes", BigInteger, nullable=False),
    Column("created_us", BigInteger, nullable=False),
    Column("expires_us", BigInteger, index=True),
    Index(None, "key_id", "created_us"),
)

batches = Table(
    "batches",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("key_id", String(64)),
    Column("endpoint", String(64), nullable=False),
    Column("input_file_id", String(64), nullable=False),
    Column("completion_window", String(32), nullable=False),
    Column("metadata_", JSON),
    Column("status", String(16), nullable=False, index=True),
    Column("model", Text),  # known once the input has been read
    Column("errors", JSON, nullable=False),  # why the input was refused
    Column("num_total", Integer, nullable=False),
    Column("num_completed", Integer, nullable=False),
    Column("num_failed", Integer, nullable=False),
    Column("output_file_id", String(64)),
    Column("error_file_id", String(64)),
    Column("created_us", BigInteger, nullable=False),
    Column("expires_us", BigInteger, nullable=False),
    Column("moments", JSON, nullable=False),  # when each later status began, by its name
    Index(None, "key_id", "created_us"),
)

async_requests = Table(
    "async_requests",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("key_id", String(64)),
    Column("endpoint", String(64), nullable=False),
    Column("model", Text, nullable=False),
    Column("body", LargeBinary, nullable=False),
    Column("metadata_", JSON),
    Column("status", String(16), nullable=False, index=True),
    Column("created_us", BigInteger, nullable=False),
    Column("expires_us", BigInteger, nullable=False),
    Column("ended_us", BigInteger, index=True),
    Column("answer_status", Integer),
    Column("answer", LargeBinary),
    Column("webhook_url", Text),
    Column("webhook_status", String(16), index=True),
    Column("webhook_attempts", Integer, nullable=False),
    Column("webhook_next_us", BigInteger),
    Column("webhook_error", Text),
    Index(None, "key_id", "created_us"),
)

responses = Table(
    "responses",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("key_id", String(64)),
    Column("created_us", BigInteger, nullable=False, index=True),
    Column("body", LargeBinary, nullable=False),
    Column("conversation", LargeBinary, nullable=False),
    Column("num_bytes", BigInteger, nullable=False),
)

intervals = Table(
    "intervals",
    metadata,
    Column("id", RowId, primary_key=True),
    Column("device", String(128), nullable=False),
    Column("function", String(63)),
    Column("replica_id", String(128)),
    Column("state", String(16), nullable=False),
    Column("start_us", BigInteger, nullable=False),
    Column("end_us", BigInteger, index=True),  # null while it goes on
    Column("share_ppm", Integer, nullable=False),
    Column("rate_usd_per_hour", ExactDecimal(40), nullable=False),
    Index(None, "device", "start_us"),
)

ledger_heartbeat = Table(  # one row
    "ledger_heartbeat",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("at_us", BigInteger, nullable=False),
    Column("compacted_us", BigInteger, nullable=False),
)


def day_of(moment_us: ColumnElement[int]) -> Label[int]:
    """Return the whole days since the epoch, to group by."""
    return _floor(moment_us, DAY_US).label("day")


def hour_of(moment_us: ColumnElement[int]) -> Label[int]:
    """Return the whole hours since the epoch, to group by."""
    return _floor(moment_us, HOUR_US).label("hour")


def _floor(moment_us: ColumnElement[int], length_us: int) -> ColumnElement[int]:
    # No bind parameter: a grouped expression must be the same text everywhere in the query.
    return moment_us // literal_column(str(length_us), BigInteger)
