"""A control plane as the dashboard sees it, with a day of plausible history."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

from controller.ledger.intervals import DAY_US, LedgerState
from controller.ledger.report import Deployed, DeviceTime, Figures, GroupBy, Served, build_report

NOW = datetime(2026, 3, 2, 12, 0, tzinfo=UTC)
NOW_US = 1_772_452_800_000_000
DAY = NOW_US // DAY_US
Json = dict[str, Any]


def replica(
    state: str, *, weights: int = 0, kv_cache: int = 0, freed: int = 0, kept: int = 0
) -> Json:
    return {
        "id": f"replica-{state}",
        "state": state,
        "in_flight": 0,
        "devices": ["cpu:0"],
        "idle_s": None,
        "freed_bytes": freed,
        "memory": {
            "weights_bytes": weights,
            "kv_cache_bytes": kv_cache,
            "host_rss_bytes": 0,
            "kept_bytes": kept,
            "kept_reason": "",
        },
        "last_error": None,
    }


def function(name: str, tier: str, **changes: Any) -> Json:
    return {
        "name": name,
        "revision": "0123456789ab",
        "backend": "process",
        "served_names": [name],
        "source": f"org/{name}",
        "snapshot": f"{name}@0123456789ab",
        "snapshot_state": "ready",
        "build": None,
        "tier": tier,
        "in_flight": 0,
        "queued": 0,
        "replicas": [],
        "last_error": None,
        "spec": {},
        **changes,
    }


def cold_start(index: int, name: str, seconds: Sequence[tuple[str, float]], **changes: Any) -> Json:
    started = NOW - timedelta(minutes=7 * index + 1)
    return {
        "id": index,
        "function": name,
        "replica_id": f"{name}-{index}",
        "started_at": started.isoformat(),
        "from_tier": "stopped",
        "reason": "request",
        "outcome": "ready",
        "total_s": sum(duration for _, duration in seconds),
        "phases": [
            {
                "name": phase,
                "seconds": duration,
                "gb_per_s": 41.25 if phase == "weights_read" else 0.0,
            }
            for phase, duration in seconds
        ],
        **changes,
    }


FROM_NOTHING = (
    ("place", 0.002),
    ("container_start", 0.31),
    ("runtime_import", 2.41),
    ("weights_map", 0.04),
    ("weights_read", 0.52),
    ("weights_verify", 0.21),
    ("kv_alloc", 0.06),
    ("attach", 0.003),
    ("first_token", 0.24),
)
FROM_PARKED = (
    ("place", 0.001),
    ("weights_read", 0.33),
    ("weights_verify", 0.14),
    ("kv_alloc", 0.05),
    ("first_token", 0.17),
)


class FakeHouse:
    """Both sources of the dashboard; change the attributes to change the page."""

    def __init__(self) -> None:
        mib = 1 << 20
        self.failure: Exception | None = None
        self.functions = [
            function(
                "smollm2",
                "ready",
                in_flight=3,
                queued=1,
                replicas=[replica("ready", weights=257 * mib, kv_cache=512 * mib)],
            ),
            function("qwen3-8b", "parked", replicas=[replica("parked", freed=18_300 * mib)]),
            function("mistral-small", "stopped"),
            function(
                "llama-70b",
                "stopped",
                snapshot=None,
                snapshot_state="building",
                build={"phase": "convert", "done_bytes": 34 << 30, "total_bytes": 141 << 30},
            ),
            function("gemma", "stopped", last_error="the hub says that org/gemma is gated"),
        ]
        self.starts = [
            cold_start(1, "qwen3-8b", FROM_PARKED, from_tier="parked"),
            cold_start(2, "smollm2", FROM_NOTHING),
            cold_start(3, "smollm2", FROM_PARKED, from_tier="parked"),
            cold_start(
                4, "mistral-small", (("place", 0.01), ("container_start", 1.2)), outcome="failed"
            ),
        ]
        self.hours = {
            "smollm2": (0.4, 2.1),
            "qwen3-8b": (3.2, 1.4),
            "mistral-small": (0.02, 0.6),
        }

    def views(self) -> list[Json]:
        return self.functions

    async def status(self) -> Json:
        return {
            "version": "0.1.0",
            "uptime_s": 93_784.2,
            "devices": [
                {"id": "cpu:0", "kind": "cpu", "memory_bytes": 24 << 30, "used_bytes": 5 << 30}
            ],
            "functions": len(self.functions),
            "standbys": {},
            "replicas": 2,
        }

    async def cold_starts(self, *, function: str | None, limit: int) -> list[Json]:
        self._maybe_fail()
        return [one for one in self.starts if function in (None, one["function"])][:limit]

    async def cost(self, *, since: datetime, until: datetime, by: str) -> Json:
        self._maybe_fail()
        assert until <= NOW
        length_us = round((until - since).total_seconds() * 1e6)
        figures = Figures(
            since_us=NOW_US - length_us,
            until_us=NOW_US,
            device_times=[
                DeviceTime(
                    device="cpu:0",
                    function=name,
                    replica_id=f"{name}-1",
                    state=state,
                    rate_usd_per_hour=Decimal("2.50"),
                    day=DAY,
                    device_time=round(hours * 3600e12),
                )
                for name, (active, idle) in self.hours.items()
                for state, hours in (
                    (LedgerState.ACTIVE, active),
                    (LedgerState.IDLE, idle),
                    (LedgerState.LOADING, 0.05),
                )
            ],
            served=[
                Served(
                    function=name,
                    replica_id=f"{name}-1",
                    day=DAY,
                    num_requests=1204,
                    num_prompt_tokens=310_000,
                    num_output_tokens=96_000,
                )
                for name in self.hours
            ],
            deployed=[
                Deployed(
                    function=name,
                    from_us=NOW_US - length_us,
                    until_us=None,
                    num_devices=1,
                    rate_usd_per_hour=None,
                )
                for name in self.hours
            ],
        )
        report = build_report(figures, by=GroupBy(by), default_rate=Decimal("2.50"))
        return report.to_json()

    def _maybe_fail(self) -> None:
        if self.failure is not None:
            raise self.failure
