"""A profile is recorded by the first run or by hand, and the next start uses it."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from functions.spec import FunctionSpec
from tests.e2e.conftest import Node, wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.model, pytest.mark.timeout(180)]


def coldspark(node: Node, *arguments: str) -> Any:
    """Run a command and return the JSON it prints."""
    environment = os.environ | node.environment | {"COLDSPARK_URL": node.url}
    command = [sys.executable, "-m", "controller.cli.app", *arguments, "-o", "json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def profile_use(node: Node) -> Any:
    (replica,) = node.view()["replicas"]
    return replica["profile"]


def test_runs_leave_a_profile_that_the_next_start_uses(
    node_with_own_store: Node, spec: FunctionSpec
) -> None:
    node = node_with_own_store
    node.deploy(spec)
    node.ask()
    assert profile_use(node)["reason"] == "no profile has been recorded yet"
    wait_for(lambda: list(node.home.rglob("profile.json")), "the recording by the first run")
    key = profile_use(node)["key"]
    measured = coldspark(node, "snapshots", "profile", "smollm2", "--rounds=1", "--at-once=1")
    used = {"key": key, "is_used": True, "reason": "", "num_compilations": 0}
    assert profile_use(node) == used  # it was stopped and started
    assert measured["key"] == key
    assert measured["memory"]["weights_bytes"] > 200 << 20
    assert measured["memory"]["num_kv_blocks"] > 0
    starts = measured["cold_starts"]
    assert (starts["stopped"]["count"], starts["parked"]["count"]) == (2, 1)
    assert {"weights_read", "profile", "first_token"} <= set(starts["stopped"]["phases"])
    assert all(0 < times["total_s"] < 60 for times in starts.values())
    (snapshot,) = coldspark(node, "snapshots", "list")["snapshots"]
    assert [profile["key"] for profile in snapshot["profiles"]] == [key]
    assert not coldspark(node, "snapshots", "verify", snapshot["snapshot"])["problems"]
