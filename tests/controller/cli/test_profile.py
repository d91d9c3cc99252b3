import json
from typing import Any

import pytest

from controller.cli import profile
from tests.controller.cli.conftest import Cli
from tests.fakes.http_server import ScriptedServer, error_reply, json_reply

PROFILE = {
    "snapshot": "tiny@0123456789ab",
    "key": "0123456789abcdef",
    "fingerprint": {"device": "NVIDIA H200"},
    "memory": {
        "weights_bytes": 3 << 30, "kv_cache_bytes": 1 << 30, "num_kv_blocks": 64,
        "max_model_len": 4096,
    },
    "steps": [
        {"num_tokens": 4, "num_tiles": 0, "count": 90},
        {"num_tokens": 64, "num_tiles": 17, "count": 2},
    ],
    "kernels": {"num_files": 30, "size_bytes": 1 << 20},
    "cold_starts": {
        "parked": {"count": 2, "total_s": 0.5, "phases": {"weights_read": 0.4, "attach": 0.0001}},
    },
}  # fmt: skip


@pytest.fixture
def tiny(controller: ScriptedServer) -> ScriptedServer:
    models = [{"id": "tiny-chat", "function": "tiny", "task": "generate", "max_model_len": 40}]
    controller.on("GET /v1/models", json_reply({"data": models}))
    for operation in ("stop", "park"):
        controller.on(f"POST /api/v1/functions/tiny/{operation}", json_reply({}))
    controller.on("POST /v1/completions", json_reply({}))
    controller.on("POST /api/v1/functions/tiny/profile", json_reply(PROFILE))
    return controller


def operations(controller: ScriptedServer) -> list[str]:
    return [asked.target.rsplit("/", 1)[-1] for asked in controller.asked]


def test_a_function_is_taken_through_its_tiers(cli: Cli, tiny: ScriptedServer) -> None:
    outcome = cli("snapshots", "profile", "tiny", "--rounds", "2", "--at-once", "3")
    assert outcome.exit_code == 0, outcome.stderr
    started, asked = ["models", "stop", "completions"], 6 * ["completions"]
    assert operations(tiny) == [*started, *asked, *2 * ["park", "completions"], "profile"]
    for call in tiny.asked:
        if call.target == "/v1/completions":
            assert call.body["model"] == "tiny-chat"
            assert call.body["max_tokens"] + len(call.body["prompt"].split()) <= 40 // 2
    words = " ".join(outcome.stdout.split())
    assert "NVIDIA H200" in words
    assert "64 blocks" in words
    assert "decode 4 (90x), mixed 64 (2x)" in words
    assert "30 files, 1.0 MiB" in words
    assert "parked 2 500 ms weights_read 400 ms" in words
    assert "attach" not in words


def test_the_profile_can_be_had_as_json(cli: Cli, tiny: ScriptedServer) -> None:
    outcome = cli("snapshots", "profile", "tiny", "--rounds=1", "--at-once=1", "-o", "json")
    assert json.loads(outcome.stdout) == PROFILE


def test_a_lease_that_ends_late_delays_parking(
    cli: Cli, tiny: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profile, "PARK_PAUSE_S", 0.01)
    busy: Any = error_reply(409, "tiny has 1 requests")
    target = "POST /api/v1/functions/tiny/park"
    tiny.on(target, busy, json_reply({}))
    assert cli("snapshots", "profile", "tiny", "--rounds=1", "--at-once=1").exit_code == 0
    tiny.on(target, busy)
    outcome = cli("snapshots", "profile", "tiny", "--rounds=1", "--at-once=1")
    assert outcome.exit_code == 1
    assert "tiny has 1 requests" in outcome.stderr


def test_what_is_not_served_cannot_be_profiled(cli: Cli, tiny: ScriptedServer) -> None:
    outcome = cli("snapshots", "profile", "other")
    assert "no function 'other' is served" in outcome.stderr
    assert outcome.exit_code != 0
    assert "Usage" in cli("snapshots", "profile", "--help").stdout
