import json
from pathlib import Path

import pytest

from functions.loader import load_file
from functions.spec import revision
from tests.controller.cli.conftest import Cli, view
from tests.fakes.http_server import ScriptedServer, error_reply, json_reply

TINY = "name: tiny\nmodel: {source: org/tiny}\nscaling: {idle_timeout: 5m}\n"


@pytest.fixture(autouse=True)
def quick_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("controller.cli.deploy.POLL_S", 0.001)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


def building(phase: str, done: int) -> dict[str, object]:
    build = {"phase": phase, "done_bytes": done, "total_bytes": 100}
    return view(snapshot=None, snapshot_state="building", build=build)


def test_deploy_sends_the_spec_and_waits_for_the_snapshot(
    cli: Cli, controller: ScriptedServer, tiny: Path
) -> None:
    controller.on("PUT /api/v1/functions/tiny", json_reply(building("download", 0), status=201))
    controller.on(
        "GET /api/v1/functions/tiny",
        json_reply(building("download", 60)),
        json_reply(building("convert", 50)),
        json_reply(view()),
    )
    outcome = cli("deploy", "-f", str(tiny), "-o", "json")
    assert outcome.exit_code == 0
    assert outcome.json == {"functions": [view()]}
    assert outcome.stderr.splitlines() == [
        "tiny: building: download 0 %",
        "tiny: building: convert 50 %",
    ]
    body = controller.asked[0].body
    assert body["backend"] == "process"
    assert body["spec"] == load_file(tiny).to_json()


def test_deploy_without_waiting_asks_once(cli: Cli, controller: ScriptedServer, tiny: Path) -> None:
    controller.on("PUT /api/v1/functions/tiny", json_reply(building("convert", 0), status=201))
    outcome = cli("deploy", "-f", str(tiny), "--no-wait", "--backend", "docker")
    assert outcome.exit_code == 0
    assert "building: convert 0 %" in outcome.stdout
    assert [asked.body["backend"] for asked in controller.asked] == ["docker"]


def test_failed_build_exits_1_with_its_reason(
    cli: Cli, controller: ScriptedServer, tiny: Path
) -> None:
    failed = view(snapshot=None, snapshot_state="failed", last_error="org/tiny is gated")
    controller.on("PUT /api/v1/functions/tiny", json_reply(building("download", 0)))
    controller.on("GET /api/v1/functions/tiny", json_reply(failed))
    outcome = cli("deploy", "-f", str(tiny))
    assert (outcome.exit_code, outcome.stdout) == (1, "")
    assert "the snapshot of 'tiny' could not be built: org/tiny is gated" in outcome.stderr


def test_nothing_is_sent_while_any_file_is_wrong(
    cli: Cli, controller: ScriptedServer, tiny: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text(
        "name: broken\nmodel: {source: org/x, dtyp: auto}\nqueue: {max_requests: 0}\n"
    )
    outcome = cli("deploy", "-f", str(tiny), "-f", str(broken), "-f", str(tmp_path / "no.yaml"))
    assert outcome.exit_code == 5
    assert controller.asked == []
    assert f"{broken}:2:24: model.dtyp: unknown key; did you mean 'dtype'?" in outcome.stderr
    assert "no.yaml: cannot be read: No such file" in outcome.stderr
    assert "error: 3 problems in 2 of 3 files" in outcome.stderr


def test_same_name_in_two_files_is_refused(
    cli: Cli, controller: ScriptedServer, tiny: Path, tmp_path: Path
) -> None:
    again = tmp_path / "again.yaml"
    again.write_text(TINY)
    outcome = cli("deploy", "-f", str(tiny), "-f", str(again))
    assert outcome.exit_code == 5
    assert "'tiny' is in another of these files too" in outcome.stderr
    assert controller.asked == []


def test_spec_the_controller_refuses_exits_5(
    cli: Cli, controller: ScriptedServer, tiny: Path
) -> None:
    controller.on("PUT /api/v1/functions/tiny", error_reply(422, "this machine has 0 GPUs"))
    assert cli("deploy", "-f", str(tiny)).exit_code == 5


def test_validate_works_offline(cli: Cli, tiny: Path) -> None:
    outcome = cli("validate", "-f", str(tiny), "-o", "json")
    digest = revision(load_file(tiny))
    assert outcome.json == {
        "functions": [{"name": "tiny", "revision": digest, "source": "org/tiny"}]
    }
    assert digest in cli("validate", "-f", str(tiny)).stdout


def test_validate_exits_5_on_a_bad_file(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("naem_: x")
    outcome = cli("validate", "-f", str(path))
    assert (outcome.exit_code, outcome.stdout) == (5, "")


def test_schema_prints_json(cli: Cli) -> None:
    assert json.loads(cli("schema").stdout)["properties"]["name"]["type"] == "string"
