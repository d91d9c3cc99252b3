"""Where a request's time goes from the client to the engine and back, under Poisson arrivals.

    python -m benchmarks.first_token [--rate 20] [--step-ms 8] [--tokens 256] [--requests 600]

The whole product without the model, as in `benchmarks.gateway`. Processes note on one clock when a
request passes them; printed are the milliseconds of each hop. What the engine makes a request
wait for its step is a hop of its own, and not in the sum: that is what serving adds. The last hop
ends with the write to the socket, since the client may share a core with the rest.
"""

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from starlette.types import Message, Receive, Scope, Send

from benchmarks.gateway import COMPLETIONS, scripted_spec, serve_scripted
from benchmarks.local import running_controller
from benchmarks.scripted_engine import STEP_S, ScriptedEngine, ScriptedFactory, ScriptedRunner
from benchmarks.serving_load import Workload, make_arrivals, scaled
from controller.gateway.middleware import RequestContext
from controller.scaling.serving import TokenBuffer
from runtime.config import EngineConfig
from runtime.engine.sequence import SequenceKey, SequenceRequest, StepResult
from runtime.rpc import inference_pb2 as pb
from runtime.rpc.client import Attachment, SequenceSink

SERVE = "serve"
STAMPS = "FIRST_TOKEN_STAMPS"  # variable with the file that all processes append to
FACTORY = "benchmarks.first_token:StampedFactory"
FIRST_ID = 300  # a prompt's tokens tell which request it is
PLACES = ("sent", "received", "submitted", "queued", "stepped", "delivered", "written")
HOPS = tuple(f"{earlier} → {later}" for earlier, later in pairwise(PLACES))
WAIT = "queued → stepped"
CONNECT_S = 0.3  # before the request is due: clients keep their connections


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rate", type=float, default=20.0, help="requests a second")
    parser.add_argument("--step-ms", type=float, default=8.0)
    parser.add_argument("--tokens", type=int, default=256, help="length of an answer")
    parser.add_argument("--requests", type=int, default=600)
    parser.add_argument("--home", type=Path, help="home directory, to reuse its snapshot")
    arguments = parser.parse_args()
    home = arguments.home or Path(tempfile.mkdtemp(prefix="coldspark-first-token-"))
    stamps = home / "stamps"
    os.environ |= {STEP_S: str(arguments.step_ms / 1000), STAMPS: str(stamps)}
    with running_controller(home, command=("-m", "benchmarks.first_token", SERVE)) as up:
        spec = scripted_spec(256)
        up.deploy(spec)
        up.operate(spec.name, "warm")
        workload = Workload(
            name="",
            num_requests=arguments.requests,
            concurrency=256,
            num_input_tokens=0,
            num_output_tokens=arguments.tokens,
            rate=arguments.rate,
        )
        asyncio.run(_load(up.url, scaled(workload, 0.1)))  # for caches
        stamps.write_text("")
        asyncio.run(_load(up.url, workload))
        _print(stamps.read_text())


async def _load(url: str, workload: Workload) -> None:
    host, port = url.removeprefix("http://").split(":")
    began = time.monotonic() + 2 * CONNECT_S
    async with asyncio.TaskGroup() as group:
        for index, arrival in enumerate(make_arrivals(workload)):
            call = _call(host, int(port), index, began + arrival, workload.num_output_tokens)
            group.create_task(call)


async def _call(host: str, port: int, index: int, due: float, num_tokens: int) -> None:
    """Stream one answer, parsing nothing but its end."""
    fields = COMPLETIONS.fields(index, num_tokens) | {
        "model": "smollm2", "temperature": 0, "ignore_eos": True, "stream": True,
    }  # fmt: skip
    body = json.dumps(fields).encode()
    head = (
        f"POST {COMPLETIONS.path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"X-Request-Id: {index}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    await asyncio.sleep(due - CONNECT_S - time.monotonic())
    reader, writer = await asyncio.open_connection(host, port)
    await asyncio.sleep(due - time.monotonic())
    stamp(index, "sent")
    writer.write(head.encode() + body)
    tail = b""
    while piece := await reader.read(1 << 16):
        tail = (tail + piece)[-2048:]
    writer.close()
    if COMPLETIONS.end not in tail:
        raise RuntimeError(f"a stream ended early: {tail.decode(errors='replace')}")


def stamp(index: int, place: str) -> None:
    """Note that a request is at a place now."""
    now = time.monotonic()
    os.write(_stamps(), f"{index} {place} {now:.6f}\n".encode())


def _stamps() -> int:
    if not _opened:
        _opened.append(os.open(os.environ[STAMPS], os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600))
    return _opened[0]


_opened: list[int] = []


def _print(stamps: str) -> None:
    times: defaultdict[int, dict[str, float]] = defaultdict(dict)
    for line in stamps.splitlines():
        index, place, at = line.split()
        times[int(index)].setdefault(place, float(at))
    hops: dict[str, list[float]] = {hop: [] for hop in HOPS}
    sums = []
    for request in times.values():
        gaps = [request[later] - request[earlier] for earlier, later in pairwise(PLACES)]
        for hop, gap in zip(HOPS, gaps, strict=True):
            hops[hop].append(1000 * gap)
        sums.append(sum(1000 * gap for hop, gap in zip(HOPS, gaps, strict=True) if hop != WAIT))
    for name, values in (*hops.items(), ("added by serving", sums)):
        ordered = sorted(values)
        p90, p99 = (ordered[int(len(ordered) * share)] for share in (0.9, 0.99))
        print(
            f"{name:24} mean {statistics.fmean(values):6.2f}  p50 {statistics.median(values):6.2f}"
            f"  p90 {p90:6.2f}  p99 {p99:6.2f}"
        )


class StampedEngine(ScriptedEngine):
    """Notes when requests come and when they have their first token."""

    def submit(self, request: SequenceRequest) -> None:
        """Start a sequence."""
        stamp(request.prompt_token_ids[0] - FIRST_ID, "queued")
        super().submit(request)

    def step(self) -> StepResult:
        """Give every sequence its next token."""
        result = super().step()
        for key in result.started:
            stamp(self._index(key), "stepped")
        return result

    def _index(self, key: SequenceKey) -> int:
        return self._requests[key].prompt_token_ids[0] - FIRST_ID


class StampedFactory(ScriptedFactory):
    """Builds engines that note."""

    def build_engine(
        self, snapshot: Path, config: EngineConfig, runner: ScriptedRunner
    ) -> StampedEngine:
        """Return the engine."""
        return StampedEngine(float(os.environ[STEP_S]))


def serve_stamped() -> None:
    """Run a controller that notes."""
    indices: dict[int, int] = {}
    receive_call, submit, on_started = (
        RequestContext.__call__, Attachment.submit, TokenBuffer.on_started,
    )  # fmt: skip

    async def received(self: RequestContext, scope: Scope, receive: Receive, send: Send) -> None:
        index = dict(scope["headers"]).get(b"x-request-id")
        if index is None:
            await receive_call(self, scope, receive, send)
            return
        stamp(int(index), "received")
        is_written = False

        async def send_stamped(message: Message) -> None:
            nonlocal is_written
            await send(message)
            if not is_written and message["type"] == "http.response.body":
                is_written = True
                stamp(int(index), "written")

        await receive_call(self, scope, receive, send_stamped)

    def submitted(
        self: Attachment,
        prompt: Sequence[int],
        sampling: pb.SamplingParams,
        sink: SequenceSink,
        **more: Any,
    ) -> int:
        stamp(prompt[0] - FIRST_ID, "submitted")
        sequence_id = submit(self, prompt, sampling, sink, **more)
        indices[sequence_id] = prompt[0] - FIRST_ID
        return sequence_id

    def delivered(self: TokenBuffer, started: pb.Started) -> None:
        stamp(indices.pop(started.sequence_id), "delivered")
        on_started(self, started)

    for owner, name, noting in (
        (RequestContext, "__call__", received),
        (Attachment, "submit", submitted),
        (TokenBuffer, "on_started", delivered),
    ):
        setattr(owner, name, noting)
    serve_scripted(FACTORY, (STEP_S, STAMPS))


if __name__ == "__main__":
    if sys.argv[1:] == [SERVE]:
        serve_stamped()
    else:
        main()
