"""Batches with real processes and the real model: cold, killed in the middle, resumed."""

import json
import time
from pathlib import Path
from typing import Literal

import openai
import pytest
from openai.types import Batch

from functions.spec import FunctionSpec
from tests.e2e.conftest import Node, wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.model, pytest.mark.timeout(240)]

NUM_REQUESTS = 24
CHAT: Literal["/v1/chat/completions"] = "/v1/chat/completions"


def requests_file(path: Path) -> Path:
    with path.open("w") as file:
        for number in range(NUM_REQUESTS):
            body = {
                "model": "smollm2",
                "messages": [{"role": "user", "content": f"Count to {number + 2}."}],
                "max_tokens": 24,
                "temperature": 0,
            }
            line = {"custom_id": f"n{number}", "method": "POST", "url": CHAT, "body": body}
            file.write(json.dumps(line) + "\n")
    return path


def test_cold_batch_survives_the_controllers_death(
    node: Node, spec: FunctionSpec, tmp_path: Path
) -> None:
    node.deploy(spec)
    with node.client() as client:
        file = client.files.create(file=requests_file(tmp_path / "in.jsonl"), purpose="batch")
        made = client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
        started = time.monotonic()
        wait_for(lambda: _at(client, made.id).status == "in_progress", "the check")
        while time.monotonic() - started < 2:
            assert node.view()["tier"] == "stopped", "a batch with time left wakes nothing"
            time.sleep(0.2)
    node.ask()  # somebody else does
    with node.client() as client:
        wait_for(lambda: _num_done(client, made.id) >= 2, "some answers", timeout_s=90)
    node.kill()
    node.start()
    with node.client() as client:
        before = _num_done(client, made.id)
        assert before < NUM_REQUESTS, "killed in the middle"
        batch = wait_for(lambda: _ended(client, made.id), "the batch", timeout_s=120)
        text = client.files.content(str(batch.output_file_id)).text
        ids = [json.loads(line)["custom_id"] for line in text.splitlines()]
        assert sorted(ids) == sorted(f"n{number}" for number in range(NUM_REQUESTS))
        assert (batch.status, batch.error_file_id) == ("completed", None)
        body = json.loads(text.splitlines()[0])["response"]["body"]
        assert body["choices"][0]["message"]["content"]
        assert client.files.delete(str(batch.output_file_id)).deleted


@pytest.mark.slow
def test_deadline_wakes_the_function(node: Node, spec: FunctionSpec, tmp_path: Path) -> None:
    node.deploy(spec)
    with node.client() as client:
        file = client.files.create(file=requests_file(tmp_path / "in.jsonl"), purpose="batch")
        # To be begun before the wake, 24 requests of 5 s, 16 at once, twice over, and a tenth of
        # the window are left: after about half a minute.
        made = client.batches.create(
            input_file_id=file.id,
            endpoint=CHAT,
            completion_window="60s",  # type: ignore[arg-type]  # the SDK knows OpenAI's only
        )
        assert node.view()["tier"] == "stopped"
        batch = wait_for(lambda: _ended(client, made.id), "the batch", timeout_s=150)
    assert batch.status == "completed"
    assert batch.request_counts is not None
    assert batch.request_counts.completed == NUM_REQUESTS


def _at(client: openai.OpenAI, batch_id: str) -> Batch:
    return client.batches.retrieve(batch_id)


def _num_done(client: openai.OpenAI, batch_id: str) -> int:
    counts = _at(client, batch_id).request_counts
    return 0 if counts is None else counts.completed


def _ended(client: openai.OpenAI, batch_id: str) -> Batch | None:
    batch = _at(client, batch_id)
    return batch if batch.status in ("completed", "failed", "expired", "cancelled") else None
