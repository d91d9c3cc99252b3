"""What the ledger's figures take from other tables than its own."""

from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import Connection

from controller.ledger.report import Deployed
from controller.store.database import Database
from controller.store.functions import Functions
from controller.store.ledger import LedgerStore
from controller.store.usage import Usage
from tests.controller.store.test_history import USAGE


def put(connection: Connection, spec: dict[str, Any], revision: str, at_us: int) -> None:
    Functions(connection).put("smol", spec=spec, revision=revision, backend="process", at_us=at_us)


@pytest.mark.parametrize(
    ("spec", "num_devices", "rate"),
    [
        ({"resources": {"gpus": 2}, "cost": {"gpu_hour_usd": "2.50"}}, 2, Decimal("2.50")),
        ({"resources": {"gpus": 0}, "cost": {"gpu_hour_usd": None}}, 1, None),
        ({"cost": {"gpu_hour_usd": 0.1}}, 1, Decimal("0.1")),
        ({}, 1, None),
    ],
)
async def test_deployment_tells_devices_and_rate_of_its_spec(
    database: Database, spec: dict[str, Any], num_devices: int, rate: Decimal | None
) -> None:
    await database.run(put, spec, "a", 10)
    figures = await LedgerStore(database).figures(0, 100)
    assert list(figures.deployed) == [
        Deployed(
            function="smol",
            from_us=10,
            until_us=None,
            num_devices=num_devices,
            rate_usd_per_hour=rate,
        )
    ]


async def test_only_deployments_inside_the_window_count(database: Database) -> None:
    await database.run(put, {}, "a", 10)
    await database.run(put, {}, "b", 20)
    await database.run(lambda connection: Functions(connection).delete("smol", at_us=30))
    store = LedgerStore(database)

    async def spans(since_us: int, until_us: int) -> list[tuple[int, int | None]]:
        figures = await store.figures(since_us, until_us)
        return [(one.from_us, one.until_us) for one in figures.deployed]

    assert await spans(0, 100) == [(10, 20), (20, 30)]
    assert await spans(20, 25) == [(20, 30)]
    assert await spans(30, 100) == []
    assert await spans(0, 10) == []


async def test_requests_are_counted(database: Database) -> None:
    await database.run(lambda connection: Usage(connection).add([USAGE, USAGE]))
    (served,) = (await LedgerStore(database).figures(0, 100)).served
    assert (served.num_requests, served.num_output_tokens) == (2, 10)
