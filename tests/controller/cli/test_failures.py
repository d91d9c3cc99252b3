import socket
import subprocess
import sys

import pytest

import snapshots.exit_codes
from controller.cli.app import app
from controller.cli.errors import EXIT_CODES, ExitCode
from tests.controller.cli.conftest import Cli
from tests.fakes.http_server import Reply, ScriptedServer, error_reply, json_reply


@pytest.mark.parametrize(
    ("status", "exit_code"),
    [(400, 1), (401, 6), (403, 6), (404, 3), (409, 1), (422, 5), (429, 7), (500, 1), (503, 7), (504, 7)],
)  # fmt: skip
def test_refusals_have_their_exit_code_and_keep_the_message(
    cli: Cli, controller: ScriptedServer, status: int, exit_code: int
) -> None:
    controller.on("GET /api/v1/status", error_reply(status, "this is why"))
    outcome = cli("status")
    assert (outcome.exit_code, outcome.stdout) == (exit_code, "")
    assert outcome.stderr.startswith("error: this is why\n")


def test_temporary_refusal_says_when_to_try_again(cli: Cli, controller: ScriptedServer) -> None:
    controller.on("GET /api/v1/status", error_reply(503, "no device is free", retry_after="4"))
    assert "hint: try again in 4 s\n" in cli("status").stderr


def test_nobody_listening_exits_4_and_names_the_remedy(cli: Cli) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    outcome = cli("--url", f"http://127.0.0.1:{port}", "list")
    assert (outcome.exit_code, outcome.stdout) == (4, "")
    assert outcome.stderr.splitlines() == [
        f"error: no controller answers at http://127.0.0.1:{port}",
        "hint: start one with `coldspark up`, or set --url or COLDSPARK_URL",
    ]


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://", "http://a:b", "\x00", ""])
def test_address_that_is_none_is_wrong_usage(cli: Cli, url: str) -> None:
    outcome = cli("--url", url, "list")
    assert outcome.exit_code == 2
    assert outcome.stderr.startswith("error: ")
    assert "hint: " in outcome.stderr


def test_another_kind_of_server_is_recognised(cli: Cli, controller: ScriptedServer) -> None:
    controller.on("GET /api/v1/status", Reply(body=b"<html>hello</html>"))
    outcome = cli("status")
    assert outcome.exit_code == 1
    assert "is not a Coldspark controller" in outcome.stderr


@pytest.mark.parametrize("answer", [[], {}, {"functions": 3}, {"functions": [{}]}])
def test_answer_of_another_shape_is_an_error_not_a_traceback(
    cli: Cli, controller: ScriptedServer, answer: object
) -> None:
    controller.on("GET /api/v1/functions", json_reply(answer))
    outcome = cli("list")
    assert outcome.exit_code == 1
    assert "of another version" in outcome.stderr


def test_answer_that_breaks_off_is_told(cli: Cli, controller: ScriptedServer) -> None:
    controller.on("GET /api/v1/status", Reply(body=b"{", is_cut=True))
    outcome = cli("status")
    assert outcome.exit_code == 1
    assert "broke off" in outcome.stderr


def test_api_key_is_sent_as_a_bearer_token(
    cli: Cli, controller: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    controller.on("GET /api/v1/functions", json_reply({"functions": []}))
    cli("list")
    cli("--api-key", "sk-one", "list")
    monkeypatch.setenv("COLDSPARK_API_KEY", "sk-two")
    cli("list")
    sent = [asked.headers.get("authorization") for asked in controller.asked]
    assert sent == [None, "Bearer sk-one", "Bearer sk-two"]


def test_key_that_no_header_can_carry_is_wrong_usage(cli: Cli, controller: ScriptedServer) -> None:
    assert cli("--api-key", "sk-\n1", "list").exit_code == 2
    assert cli("--api-key", "sk-\u00fc", "list").exit_code == 2
    assert controller.asked == []


def test_proxy_variables_do_not_capture_the_calls(
    cli: Cli, controller: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    controller.on("GET /api/v1/functions", json_reply({"functions": []}))
    assert cli("list").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lst"], "Did you mean 'list'"),
        (["list", "--bogus"], "No such option"),
        (["list", "-o", "yaml"], "yaml"),
        (["describe"], "Missing argument"),
        (["deploy"], "Missing option"),
        (["cost", "--by", "week"], "week"),
        (["logs", "tiny", "--tail", "-1"], "greater than or equal to 0"),
    ],
)
def test_wrong_usage_exits_2_with_a_hint(cli: Cli, arguments: list[str], message: str) -> None:
    outcome = cli(*arguments)
    assert (outcome.exit_code, outcome.stdout) == (2, "")
    assert outcome.stderr.startswith("error: ")
    assert message in outcome.stderr
    assert "--help` lists what it takes" in outcome.stderr


@pytest.mark.parametrize("arguments", [[], ["keys"]])
def test_group_without_a_command_shows_its_help(cli: Cli, arguments: list[str]) -> None:
    outcome = cli(*arguments)
    assert outcome.exit_code == 2
    assert (outcome.stdout + outcome.stderr).count("Usage: coldspark") == 1


def test_help_lists_every_exit_code(cli: Cli) -> None:
    outcome = cli("--help")
    text = " ".join(outcome.stdout.split())
    assert outcome.exit_code == 0
    for code, meaning in (snapshots.exit_codes.EXIT_CODES | EXIT_CODES).items():
        assert f"{code:d} {meaning}" in text


def test_every_exit_code_has_a_meaning() -> None:
    assert set(EXIT_CODES) == set(ExitCode)


def test_every_command_has_a_help_text() -> None:
    for command in app.registered_commands:
        assert command.callback is not None
        assert command.callback.__doc__


def test_interrupt_exits_130(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("controller.cli.client.ControllerClient.call", interrupt)
    assert cli("list").exit_code == 130


def test_real_process_has_the_same_exit_codes() -> None:
    command = [sys.executable, "-c", "from controller.cli.app import main; main()"]
    version = subprocess.run([*command, "version", "-o", "json"], capture_output=True, text=True)
    assert (version.returncode, version.stderr) == (0, "")
    unreachable = subprocess.run(
        [*command, "--url", "http://127.0.0.1:9", "list"], capture_output=True, text=True
    )
    assert (unreachable.returncode, unreachable.stdout) == (4, "")
    assert "Traceback" not in unreachable.stderr


def test_closed_pipe_ends_quietly() -> None:
    code = "from controller.cli.app import main; main()"
    child = subprocess.Popen(
        [sys.executable, "-c", code, "schema"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert child.stdout is not None
    child.stdout.close()
    _, errors = child.communicate()
    assert child.returncode == 1
    assert errors == b""


def test_commands_import_nothing_heavy() -> None:
    code = (
        "import sys, controller.cli.app, controller.cli.client\n"
        "heavy = {'torch', 'transformers', 'numpy', 'pydantic', 'fastapi', 'docker', 'grpc'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_defect_of_ours_is_no_fault_of_the_controller(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise KeyError("a defect")

    monkeypatch.setattr("functions.schema.json_schema_text", fail)
    with pytest.raises(KeyError, match="a defect"):
        cli("schema")


def test_a_page_of_another_site_is_told_without_advice_on_keys(
    cli: Cli, controller: ScriptedServer
) -> None:
    controller.on("GET /api/v1/status", error_reply(403, "use localhost"))
    outcome = cli("status")
    assert (outcome.exit_code, "COLDSPARK_API_KEY" in outcome.stderr) == (6, False)
