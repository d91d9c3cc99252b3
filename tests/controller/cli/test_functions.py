import pytest

from tests.controller.cli.conftest import Cli, replica, view
from tests.fakes.http_server import Reply, ScriptedServer, error_reply, json_reply


def test_list_shows_one_line_a_function(cli: Cli, controller: ScriptedServer) -> None:
    views = [view(), view(name="other", tier="ready", replicas=[replica()], in_flight=3)]
    controller.on("GET /api/v1/functions", json_reply({"functions": views}))
    outcome = cli("list")
    assert outcome.exit_code == 0
    header, first, second = outcome.stdout.splitlines()
    assert header.split()[:3] == ["NAME", "TIER", "REPLICAS"]
    assert first.split()[:3] == ["tiny", "stopped", "0"]
    assert second.split()[:4] == ["other", "ready", "1", "3"]
    assert outcome.stderr == ""


def test_list_as_json_is_what_the_controller_said(cli: Cli, controller: ScriptedServer) -> None:
    controller.on("GET /api/v1/functions", json_reply({"functions": [view()]}))
    assert cli("list", "-o", "json").json == {"functions": [view()]}


def test_output_format_can_come_from_the_environment(
    cli: Cli, controller: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLDSPARK_OUTPUT", "json")
    controller.on("GET /api/v1/functions", json_reply({"functions": []}))
    assert cli("list").json == {"functions": []}


def test_empty_list_leaves_stdout_empty_and_says_how_to_deploy(
    cli: Cli, controller: ScriptedServer
) -> None:
    controller.on("GET /api/v1/functions", json_reply({"functions": []}))
    outcome = cli("list")
    assert (outcome.exit_code, outcome.stdout) == (0, "")
    assert "coldspark deploy -f" in outcome.stderr


def test_long_cells_are_not_cut_in_a_pipe(cli: Cli, controller: ScriptedServer) -> None:
    source = "/models/" + "x" * 300
    controller.on("GET /api/v1/functions", json_reply({"functions": [view(source=source)]}))
    assert source in cli("list").stdout


def test_list_shows_how_far_a_build_is(cli: Cli, controller: ScriptedServer) -> None:
    build = {"phase": "convert", "done_bytes": 45, "total_bytes": 100}
    building = view(snapshot=None, snapshot_state="building", build=build)
    controller.on("GET /api/v1/functions", json_reply({"functions": [building]}))
    assert "building: convert 45 %" in cli("list").stdout


def test_describe_shows_replicas_memory_cold_starts_and_spec(
    cli: Cli, controller: ScriptedServer
) -> None:
    start = {
        "started_at": "2026-01-01T00:00:00Z",
        "from_tier": "parked",
        "outcome": "ready",
        "total_s": 0.61,
        "phases": [
            {"name": "queue", "seconds": 0.01, "gb_per_s": 0.0},
            {"name": "weights_read", "seconds": 0.6, "gb_per_s": 41.25},
        ],
    }
    controller.on("GET /api/v1/functions/tiny", json_reply(view(replicas=[replica()])))
    controller.on(
        "GET /api/v1/cold-starts?function=tiny&limit=5", json_reply({"cold_starts": [start]})
    )
    text = cli("describe", "tiny").stdout
    for expected in (
        "tiny, tiny-chat", "tiny-0a1b2c3d", "12.5 s", "256.0 MiB", "600.0 MiB",
        "queue 10 ms · weights_read 600 ms at 41.2 GB/s", "  name: tiny\n", "    source: org/tiny\n",
    ):  # fmt: skip
        assert expected in text
    assert cli("describe", "tiny", "-o", "json").json["cold_starts"] == [start]


def test_function_that_is_not_there_exits_3(cli: Cli, controller: ScriptedServer) -> None:
    message = "no function is called 'tinny'; did you mean tiny?"
    controller.on("GET /api/v1/functions/tinny", error_reply(404, message))
    outcome = cli("describe", "tinny")
    assert (outcome.exit_code, outcome.stdout) == (3, "")
    assert outcome.stderr.splitlines() == [
        f"error: {message}",
        "hint: `coldspark list` shows what is deployed",
    ]


@pytest.mark.parametrize("operation", ["warm", "park", "stop"])
def test_operations_print_the_tier_and_the_memory_still_held(
    cli: Cli, controller: ScriptedServer, operation: str
) -> None:
    after = view(tier="ready", replicas=[replica()])
    controller.on(f"POST /api/v1/functions/tiny/{operation}", json_reply(after))
    outcome = cli(operation, "tiny")
    assert outcome.exit_code == 0
    assert outcome.stdout.split() == ["name", "tiny", "tier", "ready", "holds", "384.0", "MiB"]
    assert cli(operation, "tiny", "-o", "json").json == after


def test_a_parked_replica_shows_what_it_keeps_and_why(cli: Cli, controller: ScriptedServer) -> None:
    parked = replica(state="parked")
    parked["memory"] |= {
        "weights_bytes": 0, "kv_cache_bytes": 0, "kept_bytes": 3 << 20, "kept_reason": "context",
    }  # fmt: skip
    shown = view(tier="parked", replicas=[parked])
    controller.on("GET /api/v1/functions/tiny", json_reply(shown))
    controller.on("GET /api/v1/cold-starts?function=tiny&limit=5", json_reply({"cold_starts": []}))
    controller.on("POST /api/v1/functions/tiny/park", json_reply(shown))
    text = cli("describe", "tiny").stdout
    assert "KEPT" in text
    assert "3.0 MiB" in text
    assert "context" in text
    assert cli("park", "tiny").stdout.split()[-3:] == ["holds", "3.0", "MiB"]


def test_stop_says_what_is_left_while_a_backend_is_away(
    cli: Cli, controller: ScriptedServer
) -> None:
    left = view(replicas=[replica(state="draining")])
    controller.on("POST /api/v1/functions/tiny/stop", json_reply(left, status=202))
    outcome = cli("stop", "tiny")
    assert outcome.exit_code == 0
    assert outcome.stderr.endswith("as soon as its backend answers: tiny-0a1b2c3d\n")
    assert cli("stop", "tiny", "-o", "json").json == left


def test_delete_says_so_on_stderr_only(cli: Cli, controller: ScriptedServer) -> None:
    controller.on("DELETE /api/v1/functions/tiny", Reply(status=204))
    outcome = cli("delete", "tiny")
    assert (outcome.exit_code, outcome.stdout, outcome.stderr) == (0, "", "deleted tiny\n")
    assert cli("delete", "tiny", "-o", "json").json == {"deleted": "tiny", "left": []}


def test_delete_says_what_is_left_while_a_backend_is_away(
    cli: Cli, controller: ScriptedServer
) -> None:
    left = view(replicas=[replica(state="draining")])
    controller.on("DELETE /api/v1/functions/tiny", json_reply(left, status=202))
    outcome = cli("delete", "tiny")
    assert outcome.exit_code == 0
    assert outcome.stderr.endswith("as soon as its backend answers: tiny-0a1b2c3d\n")
    assert cli("delete", "tiny", "-o", "json").json["left"] == ["tiny-0a1b2c3d"]


def test_name_cannot_leave_its_place_in_the_path(cli: Cli, controller: ScriptedServer) -> None:
    assert cli("delete", "../../keys/1?x=#").exit_code == 3
    assert controller.asked[0].target == "/api/v1/functions/..%2F..%2Fkeys%2F1%3Fx%3D%23"


def test_logs_print_lines_without_what_drives_a_terminal(
    cli: Cli, controller: ScriptedServer
) -> None:
    target = "GET /api/v1/functions/tiny/logs?tail=2&follow=false"
    controller.on(target, Reply(body=b"one\n\x1b[31mtwo\x07\n"))
    assert cli("logs", "tiny", "--tail", "2").stdout == "one\n[31mtwo\n"
    assert cli("logs", "tiny", "--tail", "2", "-o", "json").json == {
        "lines": ["one", "\x1b[31mtwo\x07"]
    }


def test_followed_logs_are_one_json_document_a_line(cli: Cli, controller: ScriptedServer) -> None:
    target = "GET /api/v1/functions/tiny/logs?tail=100&follow=true"
    controller.on(target, Reply(body=b"one\ntwo\n"))
    outcome = cli("logs", "tiny", "-f", "-o", "json")
    assert outcome.stdout == '{"line": "one"}\n{"line": "two"}\n'
