"""Clients that leave at any moment, with real processes and the real model.

Whatever they had asked for is over, holds nothing, costs nobody else anything, and is in the books
with what was computed of it. That it is over before the engine's next step, its own tests show.
"""

import asyncio
import itertools
import random
import sqlite3
from collections import defaultdict
from collections.abc import Mapping
from contextlib import closing
from typing import Any, TypeAlias

import httpx
import pytest

from functions.spec import FunctionSpec
from tests.e2e.conftest import Node, wait_for, with_scaling
from tests.e2e.test_life import PARIS

pytestmark = [pytest.mark.e2e, pytest.mark.model, pytest.mark.timeout(240)]

LONG = {"model": "smollm2", "max_tokens": 1500, "ignore_eos": True}
CHAT = {"messages": [{"role": "user", "content": "Tell me of rivers. " * 20}]}
RESPONSE = {"model": "smollm2", "input": "Count as far as you can.", "max_output_tokens": 1500}
FORMS: Mapping[str, tuple[str, int, dict[str, Any]]] = {
    "stream": ("/v1/chat/completions", 1, LONG | CHAT | {"stream": True}),
    "whole": ("/v1/chat/completions", 1, LONG | CHAT),
    "answers": ("/v1/completions", 2, LONG | {"prompt": "Once", "n": 2, "stream": True}),
    "prompts": ("/v1/completions", 2, LONG | {"prompt": ["Once", "Twice"]}),
    "streamed_response": ("/v1/responses", 1, RESPONSE | {"stream": True}),
    "response": ("/v1/responses", 1, RESPONSE),
}
"""Path, number of sequences, body."""
ROUNDS = 4

Record: TypeAlias = tuple[str, str | None, int]


def records(node: Node) -> dict[str, list[Record]]:
    """Return (outcome, replica, output tokens) of each sequence, by call."""
    found: defaultdict[str, list[Record]] = defaultdict(list)
    with closing(sqlite3.connect(node.home / "coldspark.db")) as database:
        for request_id, *record in database.execute(
            "SELECT request_id, outcome, replica_id, num_output_tokens FROM usage"
        ):
            call, _, _ = request_id.partition("-")  # and which sequence of it
            found[call].append((record[0], record[1], record[2]))
    return found


async def leave(client: httpx.AsyncClient, request_id: str, form: str, after_s: float) -> None:
    """Send a request and close the connection after a while, wherever it is by then."""
    path, _, body = FORMS[form]
    try:
        async with asyncio.timeout(after_s):
            await client.post(path, json=body, headers={"X-Request-ID": request_id})
    except TimeoutError:
        pass


async def test_clients_leave_at_random(node: Node, spec: FunctionSpec) -> None:
    node.deploy(with_scaling(spec, max_replicas=1, target_concurrency=6))
    rng = random.Random(6)
    calls: dict[str, str] = {}
    stayed = asyncio.create_task(asyncio.to_thread(node.ask))
    async with httpx.AsyncClient(base_url=node.url, timeout=120.0) as client:
        for phase, latest_s in ("waking", 4.0), ("ready", 8.0):
            async with asyncio.TaskGroup() as group:
                for form, number in itertools.product(FORMS, range(ROUNDS)):
                    # A request that is not even read is in no books: a busy machine takes a while.
                    request_id, after_s = f"{phase}.{form}.{number}", rng.uniform(1.0, latest_s)
                    group.create_task(leave(client, request_id, form, after_s))
                    calls[request_id] = form
            assert await stayed == PARIS
            stayed = asyncio.create_task(asyncio.to_thread(node.ask))
    assert await stayed == PARIS

    wanted = {call: FORMS[form][1] for call, form in calls.items()}
    wait_for(
        lambda: wanted.items() <= {c: len(r) for c, r in records(node).items()}.items(), "books"
    )
    left = [record for call, found in records(node).items() if call in calls for record in found]
    assert {outcome for outcome, _, _ in left} <= {"disconnected", "stop"}
    assert any(replica is None for _, replica, _ in left), "some waited for a replica"
    assert any(tokens for _, _, tokens in left), "some were being answered"
    wait_for(lambda: node.figures()["coldspark_requests_in_flight"] == 0, "the end of all calls")
    wait_for(lambda: node.figures()["coldspark_engine_requests"] == 0, "the end of all sequences")
    node.operate("park")  # which is refused while a sequence holds a block
    assert node.view()["tier"] == "parked"
    assert node.ask() == PARIS
