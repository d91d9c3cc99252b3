"""An answer is the same streamed and whole, with any parameters, on the real tokenizer."""

import asyncio
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from controller.scaling.generation import GenerationRequest, TokenChunk
from runtime.rpc import inference_pb2 as pb
from tests.controller.gateway.conftest import AppMaker, client_of
from tests.controller.gateway.test_tools import CALL, THINKING_TEMPLATE, TOOL, Speaker
from tests.fakes.asgi import events
from tests.fakes.function import Step
from tests.fakes.tokenizers import write_snapshot

pytestmark = pytest.mark.model

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
PARTS = [
    CALL,
    "Hm, ",
    "</think>",
    "東京 🔥",
    "\n\n",
    "<tool_call>",
    '{"name": ',
    "naïve",
    " 1.5e-3",
]
STOPS = ["Hm", "\n", "ï", "1.5", "京 ", "zzz", "tool"]


class RealSpeaker(Speaker):
    """Says `text` in the real tokenizer's tokens, so many in each step as `sizes` say in turn."""

    sizes: Sequence[int] = (1,)

    def play(self, request: GenerationRequest) -> Iterable[Step]:
        """Say it; each token is as likely as its place tells."""
        ids = self.tokenizer.encode(self.text).ids
        limit = request.sampling.max_tokens
        ids, reason = ([*ids, 2], "stop") if len(ids) < limit else (ids[:limit], "length")
        sizes, at = cycle(self.sizes), 0
        while at < len(ids):
            size = next(sizes)
            some = ids[at : at + size]
            at += size
            told = [logprobs(-place, some[0], request) for place in range(len(some))]
            is_told = request.sampling.HasField("num_logprobs")
            yield TokenChunk(
                some,
                logprobs=told if is_told else [],
                finish_reason=reason if at >= len(ids) else None,
            )


def logprobs(logprob: float, other: int, request: GenerationRequest) -> pb.TokenLogprobs:
    num_top = request.sampling.num_logprobs
    return pb.TokenLogprobs(
        logprob=logprob, top_token_ids=[other] * num_top, top_logprobs=[-0.5] * num_top
    )


@pytest.fixture(scope="module")
def speaker(smollm2_snapshot: Path, tmp_path_factory: pytest.TempPathFactory) -> RealSpeaker:
    tokenizer = Tokenizer.from_file(str(smollm2_snapshot / "tokenizer.json"))
    directory = tmp_path_factory.mktemp("store") / "it@0"
    snapshot = write_snapshot(
        directory, tokenizer, eos_token="<|im_end|>", chat_template=THINKING_TEMPLATE
    )
    return RealSpeaker(snapshot, tokenizer)


COMMON = {
    "n": st.integers(1, 3),
    "stop": st.lists(st.sampled_from(STOPS), max_size=2),
    "include_stop_str_in_output": st.booleans(),
    "min_tokens": st.integers(0, 3),
    "max_tokens": st.sampled_from([3, 12, 200]),
    "return_token_ids": st.booleans(),
    "skip_special_tokens": st.booleans(),
    "seed": st.integers(0, 9),
}
CHAT_FIELDS = COMMON | {
    "logprobs": st.just(True),
    "tools": st.just([TOOL]),
    "parallel_tool_calls": st.booleans(),
    "include_reasoning": st.booleans(),
}
TEXT_FIELDS = COMMON | {
    "prompt": st.sampled_from(["a", ["a", "b"], [400, 401]]),
    "echo": st.booleans(),
    "logprobs": st.integers(0, 2),
}
BODIES: dict[str, tuple[dict[str, Any], dict[str, st.SearchStrategy[Any]]]] = {
    CHAT: ({"messages": [{"role": "user", "content": "hello"}]}, CHAT_FIELDS),
    TEXT: ({"prompt": "hello"}, TEXT_FIELDS),
}


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.timeout(60)
async def test_stream_tells_what_the_whole_tells(
    make_app: AppMaker, speaker: RealSpeaker, path: str
) -> None:
    loop = asyncio.get_running_loop()
    base, fields = BODIES[path]
    async with client_of(make_app(speaker)) as client:

        async def ask(
            body: dict[str, Any], options: dict[str, Any]
        ) -> tuple[dict[str, Any], list[Any]]:
            whole = await client.post(path, json=body)
            streaming = {"stream": True, "stream_options": options}
            streamed = await client.post(path, json=body | streaming)
            assert whole.is_success, whole.text
            return whole.json(), events(streamed.text)

        @settings(max_examples=100)
        @given(
            parts=st.lists(st.sampled_from(PARTS), max_size=6),
            sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4),
            body=st.fixed_dictionaries({}, optional=fields),
            continues_usage=st.booleans(),
        )
        def check(
            parts: list[str], sizes: list[int], body: dict[str, Any], continues_usage: bool
        ) -> None:
            speaker.text, speaker.sizes = "".join(parts), sizes
            body = {"model": "tiny"} | base | body
            options = {"include_usage": True, "continuous_usage_stats": continues_usage}
            asked = asyncio.run_coroutine_threadsafe(ask(body, options), loop)
            whole, (*chunks, last, done) = asked.result(30)
            assert (done, last["choices"], last["usage"]) == ("[DONE]", [], whole["usage"])
            mine = defaultdict(list)
            for chunk in chunks:
                (choice,) = chunk["choices"]
                mine[choice["index"]].append(choice)
            joined = {index: joined_choice(parts) for index, parts in mine.items()}
            assert joined == {choice["index"]: whole_choice(choice) for choice in whole["choices"]}
            if path == CHAT:
                told = [c["prompt_token_ids"] for c in chunks if "prompt_token_ids" in c]
                assert told == ([whole["prompt_token_ids"]] if whole["prompt_token_ids"] else [])

        await asyncio.to_thread(check)


def joined_choice(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Put the chunks of a choice together, as a client does."""
    *others, last = parts
    assert all(part["finish_reason"] is None for part in others)
    deltas = [part.get("delta", part) for part in parts]
    calls: dict[int, list[str]] = {}
    for call in (call for delta in deltas for call in delta.get("tool_calls", ())):
        if "id" in call:
            calls[call["index"]] = [call["function"]["name"], ""]
        calls[call["index"]][1] += call["function"]["arguments"]
    return {
        "text": "".join(delta.get("content") or delta.get("text") or "" for delta in deltas),
        "reasoning": "".join(delta.get("reasoning_content") or "" for delta in deltas),
        "calls": list(calls.values()),
        "ends": (last["finish_reason"], last["stop_reason"]),
        "token_ids": [one for part in parts for one in part.get("token_ids", ())],
        "prompt": next((p["prompt_token_ids"] for p in parts if "prompt_token_ids" in p), None),
        "logprobs": joined_logprobs([part["logprobs"] for part in parts if part["logprobs"]]),
    }


def joined_logprobs(parts: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    names = [name for name in (parts[0] if parts else ()) if name != "refusal"]
    return {name: [one for part in parts for one in part[name]] for name in names}


def whole_choice(choice: dict[str, Any]) -> dict[str, Any]:
    message = choice.get("message", choice)
    return {
        "text": message.get("content") or message.get("text") or "",
        "reasoning": message.get("reasoning_content") or "",
        "calls": [
            [call["function"]["name"], call["function"]["arguments"]]
            for call in message.get("tool_calls", ())
        ],
        "ends": (choice["finish_reason"], choice["stop_reason"]),
        "token_ids": choice["token_ids"] or [],
        "prompt": choice.get("prompt_token_ids"),
        "logprobs": joined_logprobs([choice["logprobs"]] if choice["logprobs"] else []),
    }
