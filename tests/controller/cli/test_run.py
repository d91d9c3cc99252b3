import io
import json

import pytest

from tests.controller.cli.conftest import Cli, view
from tests.fakes.http_server import Reply, ScriptedServer, error_reply, json_reply

USAGE = {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}
NAMED = view(name="named", served_names=["org/model", "other"])
CHAT, RAW = "POST /v1/chat/completions", "POST /v1/completions"


@pytest.fixture(autouse=True)
def deployed(controller: ScriptedServer) -> None:
    controller.on("GET /api/v1/functions", json_reply({"functions": [view(), NAMED]}))


def sse(*events: object, done: bool = True, is_cut: bool = False) -> Reply:
    lines = [event if isinstance(event, str) else f"data: {json.dumps(event)}" for event in events]
    lines += ["data: [DONE]"] if done else []
    body = "".join(f"{line}\n\n" for line in lines).encode()
    headers = {"content-type": "text/event-stream", "x-coldspark-tier": "parked"}
    return Reply(body=body, headers=headers, is_cut=is_cut)


def chat(content: str, finish_reason: str | None = None) -> dict[str, object]:
    return {"choices": [{"delta": {"content": content}, "finish_reason": finish_reason}]}


def test_answer_streams_to_stdout_and_the_rest_to_stderr(
    cli: Cli, controller: ScriptedServer
) -> None:
    usage = {"choices": [], "usage": USAGE}
    controller.on(CHAT, sse(": waking, 0.4 s left", chat("Good "), chat("day", "stop"), usage))
    outcome = cli("run", "tiny", "Hi")
    assert (outcome.exit_code, outcome.stdout) == (0, "Good day\n")
    waking, summary = outcome.stderr.splitlines()
    assert waking == "waking, 0.4 s left"
    assert summary.startswith("from parked, first token after ")
    assert ", 2 tokens in " in summary
    body = controller.asked[-1].body
    assert body["model"] == "tiny"
    assert body["messages"] == [{"role": "user", "content": "Hi"}]
    assert body["stream"] is True
    assert not {"max_tokens", "temperature"} & set(body)


def test_options_reach_the_api(cli: Cli, controller: ScriptedServer) -> None:
    controller.on(CHAT, sse(chat("x", "length")))
    outcome = cli("run", "tiny", "Hi", "--max-tokens", "3", "--temperature", "0")
    body = controller.asked[-1].body
    assert (body["max_tokens"], body["temperature"]) == (3, 0)
    assert "cut at the token limit" in outcome.stderr


def test_raw_prompt_goes_to_text_completions(cli: Cli, controller: ScriptedServer) -> None:
    controller.on(RAW, sse({"choices": [{"text": " world", "finish_reason": "stop"}]}))
    assert cli("run", "tiny", "hello", "--raw").stdout == " world\n"
    assert controller.asked[-1].body["prompt"] == "hello"
    assert "messages" not in controller.asked[-1].body


@pytest.mark.parametrize("arguments", [["-"], []])
def test_prompt_can_come_from_stdin(
    cli: Cli, controller: ScriptedServer, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("from a pipe\n"))
    controller.on(CHAT, sse(chat("ok", "stop")))
    assert cli("run", "tiny", *arguments).exit_code == 0
    assert controller.asked[-1].body["messages"][0]["content"] == "from a pipe\n"


def test_empty_prompt_is_wrong_usage(cli: Cli, controller: ScriptedServer) -> None:
    assert cli("run", "tiny", "  ").exit_code == 2
    assert controller.asked == []


def test_json_holds_text_tier_times_and_usage(cli: Cli, controller: ScriptedServer) -> None:
    controller.on(CHAT, sse(chat("Hi"), chat("", "stop"), {"choices": [], "usage": USAGE}))
    answer = cli("run", "tiny", "Hi", "-o", "json").json
    assert answer["text"] == "Hi"
    assert answer["tier"] == "parked"
    assert answer["usage"] == USAGE
    assert answer["finish_reason"] == "stop"
    assert 0 <= answer["first_token_s"] <= answer["duration_s"]


def test_unknown_model_exits_3(cli: Cli, controller: ScriptedServer) -> None:
    controller.on(CHAT, error_reply(404, "no function serves the model 'tinny'"))
    outcome = cli("run", "tinny", "Hi")
    assert (outcome.exit_code, outcome.stdout) == (3, "")
    assert "no function serves the model 'tinny'" in outcome.stderr


def test_error_in_the_stream_fails_after_the_text_that_came(
    cli: Cli, controller: ScriptedServer
) -> None:
    error = {"error": {"message": "the runtime died", "type": "server_error"}}
    controller.on(CHAT, sse(chat("Good "), error, done=False))
    outcome = cli("run", "tiny", "Hi")
    assert (outcome.exit_code, outcome.stdout) == (1, "Good ")
    assert "error: the runtime died\n" in outcome.stderr


@pytest.mark.parametrize("is_cut", [False, True])
def test_stream_without_its_end_is_a_failure(
    cli: Cli, controller: ScriptedServer, is_cut: bool
) -> None:
    controller.on(CHAT, sse(chat("Good "), done=False, is_cut=is_cut))
    outcome = cli("run", "tiny", "Hi")
    assert outcome.exit_code == 1
    assert "error: " in outcome.stderr


@pytest.mark.parametrize(
    ("name", "model"), [("named", "org/model"), ("other", "other"), ("tiny", "tiny")]
)
def test_function_is_asked_under_a_name_it_serves(
    cli: Cli, controller: ScriptedServer, name: str, model: str
) -> None:
    controller.on(CHAT, sse(chat("ok", "stop")))
    assert cli("run", name, "Hi").exit_code == 0
    assert controller.asked[-1].body["model"] == model
