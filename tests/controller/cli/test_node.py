import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from controller.cli import doctor, snapshots
from controller.cli.up import read_settings
from controller.settings import Settings
from tests.controller.cli.conftest import Cli
from tests.fakes.http_server import Reply, ScriptedServer, json_reply

ROW = {
    "active_s": "30.5", "idle_s": "300", "starting_s": "1", "loading_s": "2", "draining_s": "0",
    "failed_s": "0", "parked_s": "3000", "unallocated_s": "60", "cost_usd": "0.0417",
    "idle_cost_usd": "0.0375", "active_cost_usd": "0.0038", "always_on_cost_usd": "0.4200",
    "requests": 7, "prompt_tokens": 100, "output_tokens": 40,
}  # fmt: skip


def test_status_shows_version_and_devices(cli: Cli, controller: ScriptedServer) -> None:
    device = {
        "id": "cpu:0", "kind": "cpu", "memory_bytes": 8 << 30, "used_bytes": None,
        "promised_bytes": 3 << 30, "foreign_bytes": 5 << 30,
    }  # fmt: skip
    answer = {
        "version": "0.1.0", "uptime_s": 61.0, "devices": [device], "functions": 2, "replicas": 1,
        "standbys": {"process": {"ready": 1, "starting": 2}},
        "host_memory": {
            "available_bytes": 1 << 30,
            "shortage": "too little",
            "held_bytes": {"parked": 3 << 29, "standby": 0},
        },
        "starts": {"under_way": 2, "waiting": 5, "limit": 2},
        "host_cache": {
            "budget_bytes": 4 << 30,
            "held_bytes": 3 << 30,
            "pinned_bytes": 2 << 30,
            "reason": "mlock: refused",
        },
    }  # fmt: skip
    controller.on("GET /api/v1/status", json_reply(answer))
    text = cli("status").stdout
    assert re.search(r"up for +1m 01s", text)
    assert "2.0 GiB pinned and 1.0 GiB locked of 4.0 GiB; mlock: refused" in text
    assert "8.0 GiB" in text
    assert "3.0 GiB" in text
    assert re.search(r"FOREIGN.*\n.* 5\.0 GiB", text)
    assert "process: 1 ready, 2 starting" in text
    assert "1.0 GiB available, 1.5 GiB parked; nothing is parked deep: too little" in text
    assert "2 of 2 under way, 5 waiting" in text
    assert cli("status", "-o", "json").json == answer


def test_cost_puts_idle_beside_active_and_always_on(cli: Cli, controller: ScriptedServer) -> None:
    report = {
        "since": "2026-01-01T00:00:00Z",
        "until": "2026-01-02T00:00:00Z",
        "currency": "USD",
        "rows": [{"group": "tiny", **ROW}, {"group": None, **ROW}],
        "total": {"group": "total", **ROW},
    }
    controller.on("GET /api/v1/cost?since=7d&by=function", json_reply(report))
    outcome = cli("cost", "--since", "7d")
    header, tiny, nobody, total = outcome.stdout.splitlines()
    assert header.startswith("FUNCTION")
    for expected in ("30.5 s", "5m 00s", "3.0 s", "51m 00s", "140", "0.0417", "0.4200"):
        assert expected in tiny
    assert nobody.startswith("(nobody)")
    assert total.startswith("total")
    assert cli("cost", "--since", "7d", "-o", "json").json == report


def test_created_key_is_printed_once_with_a_warning(cli: Cli, controller: ScriptedServer) -> None:
    controller.on("POST /api/v1/keys", json_reply({"id": "k1", "name": "ci", "key": "sk-1"}))
    outcome = cli("keys", "create", "ci", "--expires-in", "30d")
    assert "sk-1" in outcome.stdout
    assert "cannot be shown again" in outcome.stderr
    assert controller.asked[0].body == {"name": "ci", "expires_in_s": 30 * 86_400.0}


def test_bad_lifetime_of_a_key_is_wrong_usage(cli: Cli, controller: ScriptedServer) -> None:
    outcome = cli("keys", "create", "ci", "--expires-in", "soon")
    assert outcome.exit_code == 2
    assert "--expires-in must be a duration" in outcome.stderr
    assert controller.asked == []


def test_keys_are_listed_and_revoked(cli: Cli, controller: ScriptedServer) -> None:
    key = {"id": "k1", "name": "ci", "created_at": "2026-01-01", "expires_at": None}
    controller.on("GET /api/v1/keys", json_reply({"keys": [key]}))
    controller.on("DELETE /api/v1/keys/k1", Reply(status=204))
    assert "k1" in cli("keys", "list").stdout
    assert cli("keys", "list", "-o", "json").json == {"keys": [key]}
    assert cli("keys", "revoke", "k1").exit_code == 0
    assert cli("keys", "revoke", "k2").exit_code == 3


def test_version_needs_no_controller(cli: Cli) -> None:
    assert cli("version", "-o", "json").json["coldspark"]
    assert cli("version").stdout.startswith("coldspark  ")


def test_snapshot_commands_pass_through_with_the_controllers_store(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[tuple[list[str], str | None, str | None]] = []

    def run(command: list[str], environment: dict[str, str]) -> int:
        store, output = environment["SNAPSHOTS_STORE"], environment.get("SNAPSHOTS_OUTPUT")
        calls.append((command[1:], store, output))
        return 7

    monkeypatch.setattr(snapshots, "_run", run)
    monkeypatch.setenv("COLDSPARK_HOME", str(tmp_path))
    assert cli("snapshots", "verify", "x", "--help", "-o", "json").exit_code == 7
    monkeypatch.setenv("COLDSPARK_OUTPUT", "json")
    monkeypatch.setenv("SNAPSHOTS_STORE", "/elsewhere")
    assert cli("snapshots").exit_code == 7
    assert calls == [
        (
            ["-m", "snapshots", "verify", "x", "--help", "-o", "json"],
            str(tmp_path / "snapshots"),
            None,
        ),
        (["-m", "snapshots"], "/elsewhere", "json"),
    ]


def test_snapshots_are_listed_from_the_controllers_store(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "controller.cli.app", "snapshots", "list", "-o", "json"]
    environment = {**os.environ, "COLDSPARK_HOME": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["snapshots"] == []


@pytest.mark.parametrize(
    ("code", "expected"),
    [("raise SystemExit(3)", 3), ("import os; os.kill(os.getpid(), 15)", 130)],
)
def test_snapshot_commands_end_as_their_process_does(code: str, expected: int) -> None:
    assert snapshots._run([sys.executable, "-c", code], dict(os.environ)) == expected


def test_wrong_settings_exit_2_and_name_the_variable(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLDSPARK_TICK_S", "often")
    outcome = cli("doctor")
    assert outcome.exit_code == 2
    assert "COLDSPARK_TICK_S: " in outcome.stderr
    monkeypatch.setenv("COLDSPARK_TICK_S", "1")
    monkeypatch.setenv("COLDSPARK_TYPO", "1")
    outcome = cli("doctor")
    assert outcome.exit_code == 2
    assert "COLDSPARK_TYPO" in outcome.stderr


def settings_of(home: Path, port: int = 0) -> Settings:
    return read_settings(home=home, port=port)


def test_doctor_reports_every_check_and_fails_only_on_a_failure(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    ok = doctor.Finding(check="one", verdict=doctor.Verdict.OK, detail="fine")
    warn = doctor.Finding(check="two", verdict=doctor.Verdict.WARN, detail="hm", hint="try x")
    fail = doctor.Finding(check="three", verdict=doctor.Verdict.FAIL, detail="no", hint="do y")
    monkeypatch.setattr(doctor, "CHECKS", (lambda _: ok, lambda _: warn))
    outcome = cli("doctor")
    assert outcome.exit_code == 0
    assert "try x" in outcome.stdout
    monkeypatch.setattr(doctor, "CHECKS", (lambda _: ok, lambda _: fail))
    outcome = cli("doctor", "-o", "json")
    assert outcome.exit_code == 1
    assert [finding["verdict"] for finding in outcome.json["findings"]] == ["ok", "fail"]


def test_doctor_finds_socket_paths_that_are_too_long(tmp_path: Path) -> None:
    assert doctor.check_socket_path(settings_of(Path("/c"))).verdict is doctor.Verdict.OK
    finding = doctor.check_socket_path(settings_of(tmp_path / ("x" * 100)))
    assert finding.verdict is doctor.Verdict.FAIL
    assert "shorter by" in finding.hint


def test_doctor_finds_a_home_it_cannot_write() -> None:
    finding = doctor.check_home(settings_of(Path("/proc/coldspark")))
    assert finding.verdict is doctor.Verdict.FAIL


def test_doctor_tells_a_free_port_from_a_controller_and_from_a_stranger(
    tmp_path: Path, controller: ScriptedServer
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        free = taken.getsockname()[1]
    assert doctor.check_port(settings_of(tmp_path, free)).verdict is doctor.Verdict.OK
    port = int(controller.url.rpartition(":")[2])
    assert doctor.check_port(settings_of(tmp_path, port)).verdict is doctor.Verdict.FAIL
    controller.on("GET /api/v1/status", json_reply({"version": "0.1.0", "uptime_s": 1}))
    assert doctor.check_port(settings_of(tmp_path, port)).verdict is doctor.Verdict.OK


def test_doctor_reads_this_machine(tmp_path: Path) -> None:
    for check in (doctor.check_python, doctor.check_memory, doctor.check_disk, doctor.check_home):
        finding = check(settings_of(tmp_path))
        assert finding.detail
        assert json.dumps(finding.verdict)


def test_doctor_says_why_torch_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = tmp_path / "python"
    fake.write_text(
        "#!/bin/sh\necho \"ModuleNotFoundError: No module named 'torch'\" >&2\nexit 1\n"
    )
    fake.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(fake))
    finding = doctor.check_torch(settings_of(tmp_path))
    assert finding.verdict is doctor.Verdict.FAIL
    assert finding.detail == "ModuleNotFoundError: No module named 'torch'"
    assert "pip install" in finding.hint


@pytest.mark.parametrize("content", [b"this is no database" * 100, None])
def test_up_tells_what_is_wrong_with_the_database(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None
) -> None:
    monkeypatch.setattr("controller.main.configure_logging", lambda: None)  # it is for good
    database = tmp_path / "coldspark.db"
    if content is None:
        database.mkdir()
    else:
        database.write_bytes(content)
    outcome = cli("up", "--home", str(tmp_path), "--port", "0")
    assert outcome.exit_code == 1
    assert "coldspark.db" in outcome.stderr
    assert "hint: " in outcome.stderr


def test_port_is_checked_at_an_ipv6_address_too() -> None:
    if not socket.has_ipv6:
        pytest.skip("this machine has no IPv6")
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as taken:
        port = taken.getsockname()[1]
        finding = doctor.check_port(Settings(host="::1", port=port))
    assert finding.verdict is doctor.Verdict.FAIL
    assert f"[::1]:{port}" in finding.detail
