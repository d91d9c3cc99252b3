"""`coldspark run`: one prompt to one function, streamed, through the OpenAI API."""

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from controller.cli.connection import connect
from controller.cli.errors import CliError, UsageProblem
from controller.cli.functions import NameArgument
from controller.cli.output import (
    OutputFormat,
    OutputOption,
    clean,
    human_seconds,
    note,
    print_json,
)

if TYPE_CHECKING:
    import httpx

    from controller.cli.client import ControllerClient


@dataclass(slots=True, kw_only=True)
class Answer:
    """What came back, filled in as it streams; times are seconds since the call."""

    tier: str | None
    first_token_s: float | None = None
    duration_s: float = 0.0
    finish_reason: str | None = None
    usage: dict[str, Any] | None = None
    pieces: list[str] = field(default_factory=list)


def run(
    context: typer.Context,
    name: NameArgument,
    prompt: Annotated[str, typer.Argument(help="The prompt; - reads it from stdin.")] = "-",
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Most tokens to answer.")] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0, max=2, help="0 always takes the likeliest token.")
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Complete the text as it is, without a chat template.")
    ] = False,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Ask a function and stream its answer; tier and time to first token go to stderr."""
    body = _body(_prompt(prompt), raw=raw)
    options = {"max_tokens": max_tokens, "temperature": temperature}
    body.update({key: value for key, value in options.items() if value is not None})
    path = "/v1/completions" if raw else "/v1/chat/completions"
    with connect(context) as controller:
        body["model"] = _model(controller, name)
        started = time.monotonic()
        with controller.stream("POST", path, body=body) as response:
            answer = Answer(tier=response.headers.get("x-coldspark-tier"))
            for text in _pieces(response, answer, started):
                answer.pieces.append(text)
                if output is OutputFormat.TABLE:
                    sys.stdout.write(clean(text) if sys.stdout.isatty() else text)
                    sys.stdout.flush()
    answer.duration_s = time.monotonic() - started
    _finish(answer, output)


def _prompt(argument: str) -> str:
    text = sys.stdin.read() if argument == "-" else argument
    if not text.strip():
        raise UsageProblem("the prompt is empty", hint='try: coldspark run NAME "Hello"')
    return text


def _model(controller: "ControllerClient", name: str) -> str:
    """Return a model name that reaches a function; what is no function may be one itself."""
    functions = controller.call("GET", "/api/v1/functions")["functions"]
    served = {function["name"]: function["served_names"] for function in functions}
    return str(served[name][0]) if name in served else name


def _body(prompt: str, *, raw: bool) -> dict[str, Any]:
    asked: dict[str, Any] = {"prompt": prompt}
    if not raw:
        asked = {"messages": [{"role": "user", "content": prompt}]}
    return {"stream": True, "stream_options": {"include_usage": True}, **asked}


def _pieces(response: "httpx.Response", answer: Answer, started: float) -> Iterator[str]:
    """Yield text as it arrives; raises CliError when the stream tells of, or is, a failure."""
    from controller.cli.client import error_of  # loaded by now; httpx takes 0.1 s

    for event in _events(response):
        if "error" in event:
            raise error_of(event, status=500)
        answer.usage = event.get("usage") or answer.usage
        for choice in event.get("choices", ()):
            answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
            text = choice.get("text") or choice.get("delta", {}).get("content") or ""
            if text:
                if answer.first_token_s is None:
                    answer.first_token_s = time.monotonic() - started
                yield text


def _events(response: "httpx.Response") -> Iterator[dict[str, Any]]:
    """Yield the JSON of server-sent events up to [DONE]; comments are shown to the user."""
    for line in response.iter_lines():
        if line.startswith(":"):
            note(line.lstrip(": "))
        elif line.startswith("data:"):
            data = line.removeprefix("data:").strip()
            if data == "[DONE]":
                return
            yield json.loads(data)
    raise CliError("the answer ended early", hint="`coldspark logs NAME` may say why")


def _finish(answer: Answer, output: OutputFormat) -> None:
    if output is OutputFormat.JSON:
        print_json(
            {
                "text": "".join(answer.pieces),
                "tier": answer.tier,
                "first_token_s": answer.first_token_s,
                "duration_s": answer.duration_s,
                "finish_reason": answer.finish_reason,
                "usage": answer.usage,
            }
        )
        return
    sys.stdout.write("\n")
    sys.stdout.flush()
    tokens = (answer.usage or {}).get("completion_tokens")
    note(
        f"from {answer.tier or 'unknown'}, first token after {human_seconds(answer.first_token_s)}, "
        f"{tokens if tokens is not None else '?'} tokens in {human_seconds(answer.duration_s)}"
        + (", cut at the token limit" if answer.finish_reason == "length" else "")
    )
