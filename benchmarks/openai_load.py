"""Send a workload to any OpenAI-compatible server, over HTTP and streaming, and time every token."""

import asyncio
import json
import time
from collections.abc import Mapping, Sequence

import aiohttp

from benchmarks.serving_load import (
    Figures,
    Timeline,
    Workload,
    make_arrivals,
    make_requests,
    summarize,
)

TIMEOUT_S = 600.0
DATA = b"data: "


def run_openai(
    url: str, model: str, workload: Workload, fields: Mapping[str, object] | None = None
) -> Figures:
    """Run a workload against `url`/v1/completions, with more fields in each body.

    Raises:
        RuntimeError: A call failed, or an answer is short.
    """
    return asyncio.run(_run(url, {"model": model, **(fields or {})}, workload))


async def _run(url: str, fields: Mapping[str, object], workload: Workload) -> Figures:
    requests, arrivals = make_requests(workload), make_arrivals(workload)
    free = asyncio.Semaphore(workload.concurrency)
    async with aiohttp.ClientSession(
        url,
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=TIMEOUT_S),
    ) as session:
        began = time.perf_counter()

        async def send(arrival: float, prompt: Sequence[int], num_output_tokens: int) -> Timeline:
            await asyncio.sleep(max(0.0, began + arrival - time.perf_counter()))
            async with free:
                return await _stream(session, fields, prompt, num_output_tokens)

        async with asyncio.TaskGroup() as group:
            calls = [
                group.create_task(send(arrival, *request))
                for arrival, request in zip(arrivals, requests, strict=True)
            ]
        seconds = time.perf_counter() - began
    return summarize(workload, requests, [call.result() for call in calls], seconds)


async def _stream(
    session: aiohttp.ClientSession,
    fields: Mapping[str, object],
    prompt: Sequence[int],
    num_output_tokens: int,
) -> Timeline:
    body = {
        **fields,
        "prompt": prompt,
        "max_tokens": num_output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    timeline = Timeline(time.perf_counter(), [])
    async with session.post("/v1/completions", json=body) as response:
        if response.status != 200:
            raise RuntimeError(f"status {response.status}: {await response.text()}")
        async for line in response.content:
            if not line.startswith(DATA) or line.startswith(b"data: [DONE]"):
                continue
            event = json.loads(line.removeprefix(DATA))
            if "error" in event:
                raise RuntimeError(f"the stream failed: {event['error']}")
            if event["choices"]:
                timeline.event_times.append(time.perf_counter())
            if event.get("usage"):
                timeline.num_output_tokens = event["usage"]["completion_tokens"]
    if timeline.num_output_tokens != num_output_tokens:
        raise RuntimeError(f"{timeline.num_output_tokens} tokens came, not {num_output_tokens}")
    return timeline
