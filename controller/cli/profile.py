"""`coldspark snapshots profile`: take a function through its tiers and keep what that teaches."""

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Annotated, Any

import typer

from controller.cli.connection import connect, function_path
from controller.cli.errors import CliError, NotFoundProblem
from controller.cli.functions import NameArgument
from controller.cli.output import (
    OutputFormat,
    OutputOption,
    human_bytes,
    human_seconds,
    note,
    print_fields,
    print_json,
    print_table,
)

if TYPE_CHECKING:
    from controller.cli.client import ControllerClient

View = Mapping[str, Any]

TIER_COLUMNS = ("FROM", ">STARTS", ">MEDIAN", "PHASES")
ANSWER_TOKENS = 24
PARK_ATTEMPTS = 5
PARK_PAUSE_S = 0.2
WORDS = (8, 200)  # of prompts; about as many tokens

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def profile(
    context: typer.Context,
    name: NameArgument,
    rounds: Annotated[int, typer.Option(min=1, max=20, help="How often to park and wake.")] = 3,
    at_once: Annotated[
        list[int], typer.Option(min=1, max=256, help="Calls at once; repeatable.")
    ] = [1, 4, 16],  # noqa: B006  # typer's way to show it
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Measure how a function comes up from each tier, and keep what later starts can use.

    It is stopped, started, asked, parked and woken, so give it no other traffic meanwhile. What
    was learned lies beside its snapshot, and the next start on such a machine uses it.
    """
    with connect(context) as controller:
        model = _model(controller, name)
        controller.call("POST", function_path(name, "stop"))
        note(f"starting {name}")
        _ask(controller, model, num_words=WORDS[0])
        for num_calls in at_once:
            note(f"asking it, {num_calls} at once")
            _ask_together(controller, model, num_calls)
        for number in range(1, rounds + 1):
            note(f"parking and waking, {number} of {rounds}")
            _park(controller, name)
            _ask(controller, model, num_words=WORDS[0])
        view = controller.call("POST", function_path(name, "profile"))
        _show(view, output)


def _model(controller: "ControllerClient", name: str) -> View:
    models = controller.call("GET", "/v1/models")["data"]
    for model in models:
        if model["function"] == name:
            return dict(model)
    raise NotFoundProblem(
        f"no function {name!r} is served", hint="`coldspark list` shows what is deployed"
    )


def _ask_together(controller: "ControllerClient", model: View, num_calls: int) -> None:
    """Call as clients usually do: with short prompts and with long ones."""
    with ThreadPoolExecutor(num_calls) as pool:
        for num_words in WORDS:
            calls = [
                pool.submit(_ask, controller, model, num_words=num_words) for _ in range(num_calls)
            ]
            for call in calls:
                call.result()


def _ask(controller: "ControllerClient", model: View, *, num_words: int) -> None:
    limit = model["max_model_len"]
    text = "word " * min(num_words, max(limit // 4, 1))
    if model["task"] == "embed":
        controller.call("POST", "/v1/embeddings", body={"model": model["id"], "input": text})
        return
    body = {
        "model": model["id"],
        "prompt": text,
        "max_tokens": max(min(ANSWER_TOKENS, limit // 4), 1),
        "ignore_eos": True,
    }
    controller.call("POST", "/v1/completions", body=body)


def _park(controller: "ControllerClient", name: str) -> None:
    """Park it; the lease of a call ends a moment after its answer."""
    for _ in range(PARK_ATTEMPTS - 1):
        try:
            controller.call("POST", function_path(name, "park"))
        except CliError:
            time.sleep(PARK_PAUSE_S)
        else:
            return
    controller.call("POST", function_path(name, "park"))


def _show(view: View, output: OutputFormat) -> None:
    if output is OutputFormat.JSON:
        print_json(view)
        return
    memory, kernels = view["memory"], view["kernels"]
    print_fields(
        {
            "snapshot": view["snapshot"],
            "profile": view["key"],
            "device": view["fingerprint"].get("device"),
            "weights": human_bytes(memory["weights_bytes"]),
            "KV cache": f"{human_bytes(memory['kv_cache_bytes'])}, "
            f"{memory['num_kv_blocks']} blocks",
            "context": f"{memory['max_model_len']} tokens",
            "kernels": f"{kernels['num_files']} files, {human_bytes(kernels['size_bytes'])}",
            "steps": ", ".join(map(_step, view["steps"][:6])),
        }
    )
    typer.echo()
    print_table(TIER_COLUMNS, list(_tier_rows(view["cold_starts"])))


def _step(step: View) -> str:
    kind = "decode" if step["num_tiles"] == 0 else "mixed"
    return f"{kind} {step['num_tokens']} ({step['count']}x)"


def _tier_rows(cold_starts: View) -> Iterator[Sequence[object]]:
    for tier, times in cold_starts.items():
        phases = (f"{name} {human_seconds(s)}" for name, s in times["phases"].items() if s >= 0.001)
        yield (tier, times["count"], human_seconds(times["total_s"]), " · ".join(phases))
