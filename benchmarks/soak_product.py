"""Many mixed requests through the whole product, from clients some of which go away.

    python -m benchmarks.soak_product [--requests 300] [--concurrency 24] [--url URL --model NAME]

Without an address it starts a controller of its own, with the small model on the CPU. Sampling,
penalties, biases, seeds, grammars, log-probabilities, shared prefixes, streams and disconnects are
random. Every few requests comes a canary: greedy, and it must get the tokens that it got when it
ran alone, up to where the two likeliest are so close that rounding may decide. Exits with 1 if a
request is lost, fails or breaks its grammar, a canary is told something else, anything is still
running or held at the end, or a process of ours has gone, or grown in the second half.
"""

import argparse
import asyncio
import json
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.local import running_controller, smollm2
from benchmarks.serving_load import VOCAB

Json = dict[str, Any]

CANCEL_SHARE, CANCEL_WITHIN_S = 0.2, 4.0
CANARY_EVERY = 6
CANARIES = (
    "The capital of France is",
    "Count: one, two, three, four,",
    "Water boils at a temperature of",
    "def add(a, b):",
    "Monday, Tuesday, Wednesday,",
    "The quick brown fox jumps over the lazy dog. " * 12,
)
NEAR_TIE = 0.05
"""Difference of log-probabilities that rounding may turn round."""
MAX_TOKENS = 60
REQUEST_TIMEOUT_S = 600.0
SETTLE_S = 30.0
HOST_GROWTH_BYTES = 64 << 20
FILL = 8, 1000
"""Prompts and their tokens: more than the small model's KV cache, which takes memory when written."""
WORD = "[a-f]{3,12}"
SCHEMA: Json = {
    "type": "object",
    "properties": {"warm": {"type": "boolean"}, "name": {"type": "string", "maxLength": 12}},
    "required": ["warm", "name"],
    "additionalProperties": False,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Canary:
    """A greedy request, and the tokens that it always gets."""

    prompt: str
    token_ids: list[int]


@dataclass(slots=True)
class Soak:
    """What came of the requests, and what must not have happened, in words."""

    ends: Counter[str] = field(default_factory=Counter)
    num_tokens: int = 0
    num_canary_tokens: int = 0
    faults: list[str] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--concurrency", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--url", help="of a controller that runs already, with --model")
    parser.add_argument("--model", default="smollm2")
    arguments = parser.parse_args()
    with _product(arguments.url) as (url, pid):
        soak = asyncio.run(_soak(url, pid, arguments))
    if soak.faults:
        sys.exit(1)


@contextmanager
def _product(url: str | None) -> Iterator[tuple[str, int | None]]:
    """Give the address of a product and the controller's process, if it is ours."""
    if url is not None:
        yield url, None
        return
    with (
        tempfile.TemporaryDirectory(prefix="cs-soak-") as home,
        running_controller(Path(home), num_standbys=0) as controller,
    ):
        controller.deploy(smollm2())
        controller.operate("smollm2", "warm")
        yield controller.url, controller.pid


async def _soak(url: str, pid: int | None, arguments: argparse.Namespace) -> Soak:
    soak, rng = Soak(), random.Random(arguments.seed)
    async with aiohttp.ClientSession(
        url,
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S),
    ) as session:
        client = Client(session, arguments.model, soak)
        held_before = await client.held()
        canaries = [await client.canary(prompt) for prompt in CANARIES]
        await client.fill([_tokens(rng, FILL[1]) for _ in range(FILL[0])])
        warm_up = arguments.requests // 2
        await client.send_all(warm_up, arguments.concurrency, canaries, rng)
        processes_before = _processes(pid)
        began = time.perf_counter()
        rest = max(0, arguments.requests - warm_up)
        await client.send_all(rest, arguments.concurrency, canaries, rng)
        seconds = time.perf_counter() - began
        held_after = await client.settled(held_before)
    processes_after = _processes(pid)
    if held_after != held_before:
        soak.faults.append(f"held at the end: {held_after}, at the beginning: {held_before}")
    if sum(soak.ends.values()) != warm_up + rest:
        soak.faults.append(f"{warm_up + rest - sum(soak.ends.values())} requests were lost")
    if processes_after.keys() != processes_before.keys():
        soak.faults.append(f"processes were {sorted(processes_before)}: {sorted(processes_after)}")
    for process, num_bytes in processes_after.items():
        growth = num_bytes - processes_before.get(process, num_bytes)
        if growth > HOST_GROWTH_BYTES:
            soak.faults.append(f"{process} grew by {growth} bytes")
    figures = {
        "requests": warm_up + rest,
        "ends": soak.ends,
        "tokens": soak.num_tokens,
        "canary_tokens": soak.num_canary_tokens,
        "seconds": round(seconds, 1),
        "held": held_after,
        "host_bytes_before": processes_before,
        "host_bytes_after": processes_after,
        "faults": soak.faults,
    }
    print(json.dumps(figures, indent=2))
    return soak


class Client:
    """Sends requests and judges the answers."""

    def __init__(self, session: aiohttp.ClientSession, model: str, soak: Soak) -> None:
        self._session = session
        self._model = model
        self._soak = soak

    async def held(self) -> dict[str, float]:
        """Return what the product says of requests and KV cache it holds."""
        async with self._session.get("/metrics") as response:
            families = text_string_to_metric_families(await response.text())
        return {
            " ".join((sample.name, *sample.labels.values())): sample.value
            for family in families
            for sample in family.samples
            if family.name.removeprefix("coldspark_")
            in ("engine_requests", "engine_kv_cache_usage_ratio", "requests_in_flight",
                "requests_queued")
        }  # fmt: skip

    async def settled(self, wanted: dict[str, float]) -> dict[str, float]:
        """Return what is held once it is what is wanted, or after a while."""
        deadline = time.monotonic() + SETTLE_S
        while (held := await self.held()) != wanted and time.monotonic() < deadline:  # noqa: ASYNC110  # nothing tells
            await asyncio.sleep(0.3)
        return held

    async def canary(self, prompt: str) -> Canary:
        """Run a canary alone."""
        choice = await self._ask(_canary_body(prompt) | {"logprobs": 2})
        margins = [
            max(likeliest.values()) - sorted(likeliest.values())[-2]
            for likeliest in choice["logprobs"]["top_logprobs"]
        ]
        is_close = [margin < NEAR_TIE for margin in margins] + [True]
        return Canary(prompt=prompt, token_ids=choice["token_ids"][: is_close.index(True)])

    async def fill(self, prompts: Sequence[list[int]]) -> None:
        """Have the prompts' keys and values written."""
        for prompt in prompts:
            await self._ask({"prompt": prompt, "max_tokens": 1})

    async def send_all(
        self, num_requests: int, concurrency: int, canaries: Sequence[Canary], rng: random.Random
    ) -> None:
        """Send requests, so many at a time, until each has come to some end."""
        free = asyncio.Semaphore(concurrency)
        prefixes = [_tokens(rng, size) for size in (64, 200)]
        async with asyncio.TaskGroup() as group:
            for index in range(num_requests):
                await free.acquire()
                if index % CANARY_EVERY == 0:
                    sending = self._send_canary(rng.choice(canaries))
                else:
                    goes_at_s = rng.uniform(0, CANCEL_WITHIN_S)
                    leaves = rng.random() < CANCEL_SHARE
                    body = random_body(prefixes, rng)
                    sending = self._send(body, goes_at_s if leaves else None)
                task = group.create_task(sending)
                task.add_done_callback(lambda _: free.release())

    async def _send_canary(self, canary: Canary) -> None:
        try:
            choice = await self._ask(_canary_body(canary.prompt))
        except (RuntimeError, aiohttp.ClientError, TimeoutError) as error:
            self._fail(f"a canary failed: {error!r}")
            return
        found = choice["token_ids"][: len(canary.token_ids)]
        self._soak.num_canary_tokens += len(found)
        if found != canary.token_ids:
            self._fail(f"a canary got {found}, alone it got {canary.token_ids}")
            return
        self._soak.ends["canary"] += 1

    async def _send(self, body: Json, goes_at_s: float | None) -> None:
        try:
            async with asyncio.timeout(goes_at_s):
                choice = await self._ask(body)
        except TimeoutError as error:
            if goes_at_s is None:
                self._fail(f"no answer: {error!r}")
            else:
                self._soak.ends["client gone"] += 1
            return
        except (RuntimeError, aiohttp.ClientError) as error:
            self._fail(f"{body} failed: {error!r}")
            return
        fault = what_is_wrong(body, choice)
        if fault:
            self._fail(f"{body}: {fault}: {choice}")
            return
        self._soak.ends[choice["finish_reason"]] += 1

    def _fail(self, fault: str) -> None:
        self._soak.ends["fault"] += 1
        self._soak.faults.append(fault)

    async def _ask(self, body: Json) -> Json:
        """Return the whole choice, streamed or not; raise RuntimeError if there is none."""
        body = {**body, "model": self._model, "return_token_ids": True}
        async with self._session.post("/v1/completions", json=body) as response:
            if response.status != 200:
                raise RuntimeError(f"status {response.status}: {await response.text()}")
            if body.get("stream"):
                choice = await _collect(response)
            else:
                [choice] = (await response.json())["choices"]
        self._soak.num_tokens += len(choice["token_ids"])
        return choice


async def _collect(response: aiohttp.ClientResponse) -> Json:
    """Return a stream's choice, put together."""
    whole: Json = {"text": "", "token_ids": [], "finish_reason": None}
    last = b""
    async for line in response.content:
        last = line.strip() or last
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line.removeprefix(b"data: "))
        if "error" in event:
            raise RuntimeError(f"the stream failed: {event['error']}")
        for choice in event["choices"]:
            whole["text"] += choice["text"]
            whole["token_ids"] += choice.get("token_ids") or []
            whole["finish_reason"] = choice["finish_reason"] or whole["finish_reason"]
    if last != b"data: [DONE]":
        raise RuntimeError(f"the stream broke off after {last!r}")
    return whole


def random_body(prefixes: Sequence[list[int]], rng: random.Random) -> Json:
    """Return a request of any kind that clients send."""

    def sometimes(share: float, **fields: object) -> Json:
        return fields if rng.random() < share else {}

    prompt = _tokens(rng, int(rng.expovariate(1 / 60)) + 1)
    if rng.random() < 0.3:
        prompt = rng.choice(prefixes) + prompt
    body: Json = {
        "prompt": prompt[:1000],
        "max_tokens": min(int(rng.expovariate(1 / 25)) + 1, MAX_TOKENS),
        "temperature": rng.choice((0, rng.uniform(0.1, 2.0))),
        **sometimes(0.4, top_p=rng.random(), top_k=rng.choice((0, 1, 20, 1000)), min_p=0.02),
        **sometimes(0.3, repetition_penalty=rng.uniform(0.8, 1.5), frequency_penalty=0.5),
        **sometimes(0.2, presence_penalty=rng.uniform(-2, 2)),
        **sometimes(0.2, logit_bias={str(rng.choice(VOCAB)): rng.uniform(-100, 100)}),
        **sometimes(0.5, seed=rng.randrange(1 << 60)),
        **sometimes(0.2, logprobs=rng.randrange(20)),
        **sometimes(0.3, ignore_eos=True),
    }
    structure = rng.choice(({"json": SCHEMA}, {"regex": WORD}))
    # A bias could keep the text from ever ending.
    if "logit_bias" not in body:
        body |= sometimes(0.3, structured_outputs=structure, max_tokens=MAX_TOKENS)
    return body | rng.choice(({"stream": True}, {}, sometimes(0.3, prompt_logprobs=3)))


def what_is_wrong(body: Json, choice: Json) -> str:
    """Return what an answer must not be, or nothing."""
    num_tokens, ended = len(choice["token_ids"]), choice["finish_reason"]
    if ended not in ("stop", "length") or num_tokens > body["max_tokens"]:
        return "the end is wrong"
    if ended == "length" and num_tokens < body["max_tokens"]:
        return "it is too short"
    logprobs = choice.get("logprobs")
    if logprobs is not None and len(logprobs["token_logprobs"]) != num_tokens:
        return "log-probabilities are missing"
    reported = choice.get("prompt_logprobs")
    if "prompt_logprobs" in body and len(reported or ()) != len(body["prompt"]):
        return "log-probabilities of the prompt are missing"
    structure = body.get("structured_outputs", {})
    if ended == "stop" and "regex" in structure and not re.fullmatch(WORD, choice["text"]):
        return "it is no such word"
    if ended == "stop" and "json" in structure:
        try:
            is_valid = json.loads(choice["text"]).keys() == SCHEMA["properties"].keys()
        except ValueError:
            is_valid = False
        if not is_valid:
            return "it is no such object"
    return ""


def _canary_body(prompt: str) -> Json:
    return {"prompt": prompt, "max_tokens": 24, "temperature": 0, "ignore_eos": True}


def _tokens(rng: random.Random, size: int) -> list[int]:
    return [rng.choice(VOCAB) for _ in range(size)]


def _processes(pid: int | None) -> dict[str, int]:
    """Return the memory of the controller's processes, those that are ours."""
    if pid is None:
        return {}
    controller = psutil.Process(pid)
    return {
        f"{process.name()} {process.pid}": process.memory_info().rss
        for process in (controller, *controller.children(recursive=True))
    }


if __name__ == "__main__":
    main()
