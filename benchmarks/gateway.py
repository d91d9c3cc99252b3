"""How many streamed tokens a second one core of the controller carries.

    python -m benchmarks.gateway [--streams 256] [--steps-per-s 50] [--tokens 256] [--responses]

The whole product without the model: a controller, a runtime whose engine only pretends, and so
many streaming calls of /v1/completions, or of /v1/responses, at once over HTTP, repeated. Prints tokens a second as
received, and what each process spent on a token; the inverse of the controller's is what one core
carries.
"""

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil

from benchmarks.local import REPOSITORY, Controller, running_controller, smollm2
from benchmarks.scripted_engine import STEP_S
from controller.backends.process import RUNTIME_COMMAND, ProcessBackend
from controller.main import serve
from controller.settings import load_settings
from functions.spec import FunctionSpec

GOAL_TOKENS_PER_S = 12_000
NUM_PROMPT_TOKENS = 512
FACTORY = "benchmarks.scripted_engine:ScriptedFactory"
SERVE = "serve"


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """How one is called: its own fields, what its stream ends with, and what counts tokens."""

    path: str
    fields: Callable[[int, int], dict[str, object]]
    end: bytes
    count: bytes


COMPLETIONS = Endpoint(
    path="/v1/completions",
    fields=lambda index, num_tokens: {
        "prompt": [300 + index % 1000] * NUM_PROMPT_TOKENS,
        "max_tokens": num_tokens,
        "stream_options": {"include_usage": True},
    },
    end=b"data: [DONE]",
    count=b'"completion_tokens":',
)
RESPONSES = Endpoint(
    path="/v1/responses",
    fields=lambda index, num_tokens: {
        "input": f"{index}" + " tea" * NUM_PROMPT_TOKENS,
        "max_output_tokens": num_tokens,
    },
    end=b'"usage":{"input_tokens":',
    count=b'"output_tokens":',
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--steps-per-s", type=float, default=50.0)
    parser.add_argument("--tokens", type=int, default=256, help="length of an answer")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--responses", action="store_true", help="call /v1/responses, each kept")
    parser.add_argument("--home", type=Path, help="home directory, to reuse its snapshot")
    parser.add_argument("--profile", action="store_true", help="profile the controller")
    arguments = parser.parse_args()
    home = arguments.home or Path(tempfile.mkdtemp(prefix="coldspark-gateway-"))
    os.environ[STEP_S] = str(1 / arguments.steps_per_s)
    profiler = ["-m", "cProfile", "-o", str(home / "profile")] if arguments.profile else []
    with running_controller(home, command=(*profiler, "-m", "benchmarks.gateway", SERVE)) as up:
        spec = scripted_spec(arguments.streams)
        up.deploy(spec)
        up.operate(spec.name, "warm")
        _measure(up, arguments)


def serve_scripted(factory: str = FACTORY, passed_on: Sequence[str] = (STEP_S,)) -> None:
    """Run a controller whose runtimes pretend, with some of this process's variables."""
    settings = load_settings()
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    given = (f"{name}={os.environ[name]}" for name in passed_on)
    variables = ("env", f"PYTHONPATH={path}", *given)
    command = (*variables, *RUNTIME_COMMAND, "--engine-factory", factory)
    backend = ProcessBackend(settings.runtimes_dir, cluster=settings.cluster, command=command)
    serve(settings, backends=[backend])


def scripted_spec(num_streams: int) -> FunctionSpec:
    """Return the small model's spec for so many requests at once."""
    small = smollm2(idle_timeout=None, target_concurrency=num_streams, max_concurrency=num_streams)
    return small.model_copy(
        update={"engine": small.engine.model_copy(update={"max_num_seqs": num_streams})}
    )


def _measure(controller: Controller, arguments: argparse.Namespace) -> None:
    processes = _processes(controller)
    load = partial(_load, controller.url, RESPONSES if arguments.responses else COMPLETIONS)
    asyncio.run(load(arguments.streams, 8))
    before = {name: _cpu_s(processes[name]) for name in processes}
    own_before, began = time.process_time(), time.perf_counter()
    num_tokens = 0
    for _ in range(arguments.rounds):
        num_tokens += asyncio.run(load(arguments.streams, arguments.tokens))
    seconds = time.perf_counter() - began
    spent = {name: _cpu_s(processes[name]) - before[name] for name in processes}
    figures: dict[str, object] = {
        "streams": arguments.streams,
        "tokens": num_tokens,
        "offered_tokens_per_s": arguments.streams * arguments.steps_per_s,
        "tokens_per_s": round(num_tokens / seconds),
        **{f"{name}_us_per_token": round(1e6 * spent[name] / num_tokens, 1) for name in spent},
        "client_us_per_token": round(1e6 * (time.process_time() - own_before) / num_tokens, 1),
        "controller_tokens_per_core_s": round(num_tokens / spent["controller"]),
        "goal": GOAL_TOKENS_PER_S,
        "cpu": f"{_cpu_model()}, {os.cpu_count()} cores",
    }
    print(json.dumps(figures))


def _processes(controller: Controller) -> dict[str, psutil.Process]:
    top = psutil.Process(controller.pid)
    below = top.children(recursive=True)
    server = next(process for process in below if "runtime.main" in process.cmdline())
    engine = server.children(recursive=True)[-1]
    return {"controller": top, "runtime_server": server, "engine": engine}


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


async def _load(url: str, endpoint: Endpoint, num_streams: int, num_tokens: int) -> int:
    """Run so many calls at once; return the tokens that the usages count."""
    host, port = url.removeprefix("http://").split(":")
    calls = [_call(host, int(port), endpoint, index, num_tokens) for index in range(num_streams)]
    return sum(await asyncio.gather(*calls))


async def _call(host: str, port: int, endpoint: Endpoint, index: int, num_tokens: int) -> int:
    """Stream one answer, parsing nothing but its end: the client must not be the bottleneck."""
    reader, writer = await asyncio.open_connection(host, port)
    common = {"model": "smollm2", "temperature": 0, "ignore_eos": True, "stream": True}
    body = json.dumps({**common, **endpoint.fields(index, num_tokens)}).encode()
    head = (
        f"POST {endpoint.path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    writer.write(head.encode() + body)
    tail = b""
    while piece := await reader.read(1 << 16):
        tail = (tail + piece)[-2048:]
    writer.close()
    if endpoint.end not in tail:
        raise RuntimeError(f"a stream ended early: {tail.decode(errors='replace')}")
    at = tail.rindex(endpoint.count) + len(endpoint.count)
    return int(tail[at:].split(b",")[0])


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, "unknown")


if __name__ == "__main__":
    if sys.argv[1:] == [SERVE]:
        serve_scripted()
    else:
        main()
