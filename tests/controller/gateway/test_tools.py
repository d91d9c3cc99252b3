"""Tools and reasoning in chat completions, as the official SDK sees them."""

import json
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from llguidance import LLMatcher
from pydantic import BaseModel
from tokenizers import Tokenizer

from controller.gateway.grammars import json_grammar
from controller.scaling.generation import GenerationRequest, TokenChunk
from functions.spec import FunctionSpec
from tests.controller.gateway.conftest import AppMaker, client_of
from tests.fakes.asgi import events
from tests.fakes.function import FakeFunction, Step
from tests.fakes.tokenizers import CHATML, write_snapshot

PATH = "/v1/chat/completions"
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call>'
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
TOOLS_TEMPLATE = (
    "{% for tool in tools or [] %}[{{ tool.function.name }}]{% endfor %}"
    "{% for message in messages %}({{ message.role }}:{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function.name }}="
    "{{ call.function.arguments.city }}{% endfor %}{{ message.tool_call_id }}){% endfor %}"
)
THINKING_TEMPLATE = CHATML.replace("assistant\\n", "assistant\\n<think>\\n") + "{# </think> #}"
HELLO: Any = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}
WITH_TOOL: Any = {**HELLO, "tools": [TOOL]}


class Speaker(FakeFunction):
    """Says `text`, a token a step."""

    def __init__(self, snapshot: Path, tokenizer: Tokenizer, text: str = CALL) -> None:
        super().__init__(snapshot, self.play, max_model_len=4096)
        self.text = text
        self.tokenizer = tokenizer

    def play(self, request: GenerationRequest) -> Iterable[Step]:
        """Say it."""
        for token_id in self.tokenizer.encode(self.text).ids:
            yield TokenChunk([token_id])
        yield TokenChunk([2], finish_reason="stop")

    @property
    def prompt(self) -> str:
        """The last call's prompt."""
        ids = self.generations[-1].request.prompt_token_ids
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=False)
        return text

    @property
    def grammar(self) -> str:
        """What the last call's answer has to match."""
        return self.generations[-1].request.sampling.grammar


@pytest.fixture
def speaker(snapshot: Path, byte_level: Tokenizer) -> Speaker:
    return Speaker(snapshot, byte_level)


@pytest.fixture
async def http(make_app: AppMaker, speaker: Speaker) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(make_app(speaker)) as client:
        yield client


@pytest.fixture
def sdk(http: httpx.AsyncClient) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(
        api_key="unused",
        base_url="http://localhost/v1",
        http_client=http,  # type: ignore[arg-type]  # it takes any httpx
        max_retries=0,
    )


async def test_whole_call(sdk: openai.AsyncOpenAI) -> None:
    completion = await sdk.chat.completions.create(**WITH_TOOL)
    (choice,) = completion.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    assert choice.message.tool_calls is not None
    (call,) = choice.message.tool_calls
    assert call.type == "function"
    assert (call.function.name, call.function.arguments) == ("weather", '{"city": "Zürich"}')


async def test_streamed_call_equals_the_whole(sdk: openai.AsyncOpenAI, speaker: Speaker) -> None:
    speaker.text = f"Let me see.\n{CALL}\n{CALL}"
    async with sdk.chat.completions.stream(**WITH_TOOL) as stream:
        names = [event.type async for event in stream]
        streamed = await stream.get_final_completion()
    assert names.count("tool_calls.function.arguments.delta") > 8
    whole = await sdk.chat.completions.create(**WITH_TOOL)
    for completion in (streamed, whole):
        (choice,) = completion.choices
        assert choice.message.content == "Let me see."
        assert choice.finish_reason == "tool_calls"
        arguments = [call.to_dict()["function"] for call in choice.message.tool_calls or ()]
        assert [one["arguments"] for one in arguments] == ['{"city": "Zürich"}'] * 2  # type: ignore[index]


async def test_typed_arguments_are_parsed(sdk: openai.AsyncOpenAI) -> None:
    class weather(BaseModel):  # the tool's name
        city: str

    completion = await sdk.chat.completions.parse(
        **HELLO, tools=[openai.pydantic_function_tool(weather)]
    )
    assert completion.choices[0].message.tool_calls is not None
    (call,) = completion.choices[0].message.tool_calls
    assert call.function.parsed_arguments == weather(city="Zürich")


async def test_a_conversation_with_calls_goes_on(http: httpx.AsyncClient, speaker: Speaker) -> None:
    first = (await http.post(PATH, json=WITH_TOOL)).json()["choices"][0]["message"]
    speaker.text = "Warm."
    result = {"role": "tool", "tool_call_id": first["tool_calls"][0]["id"], "content": "25 °C"}
    answer = await http.post(
        PATH, json={**WITH_TOOL, "messages": [*HELLO["messages"], first, result]}
    )
    assert answer.json()["choices"][0]["message"] == {
        "role": "assistant",
        "content": "Warm.",
        "refusal": None,
    }
    assert '"name": "weather", "description": "Tells the weather."' in speaker.prompt
    assert f"<|im_start|>assistant\n{CALL}<|im_end|>" in speaker.prompt
    assert "<|im_start|>user\n<tool_response>\n25 °C\n</tool_response>" in speaker.prompt


async def test_template_that_knows_tools_gets_them(
    tmp_path: Path, byte_level: Tokenizer, make_app: AppMaker
) -> None:
    snapshot = write_snapshot(
        tmp_path / "it@0", byte_level, eos_token="<|im_end|>", chat_template=TOOLS_TEMPLATE
    )
    speaker = Speaker(snapshot, byte_level)
    call = {
        "id": "c1",
        "type": "function",
        "function": {"name": "weather", "arguments": '{"city": "Bern"}'},
    }
    messages = [
        *HELLO["messages"],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "25"},
    ]
    async with client_of(make_app(speaker)) as http:
        await http.post(PATH, json={**WITH_TOOL, "messages": messages})
        expected = "[weather](user:hello)(assistant:None<tool_call>weather=Bern)(tool:25c1)"
        assert speaker.prompt == expected
        tokens = (await http.post("/tokenize", json={**WITH_TOOL, "messages": messages})).json()
        assert tokens["tokens"] == list(speaker.generations[-1].request.prompt_token_ids)
        call["function"] = {"name": "weather", "arguments": "{oops"}
        refused = await http.post(PATH, json={**WITH_TOOL, "messages": messages})
    assert refused.status_code == 400
    assert "are not JSON" in refused.json()["error"]["message"]


async def test_no_tool_may_be_called(http: httpx.AsyncClient, speaker: Speaker) -> None:
    for body in (HELLO, {**WITH_TOOL, "tool_choice": "none"}):
        choice = (await http.post(PATH, json=body)).json()["choices"][0]
        assert choice["message"]["content"] == CALL
        assert choice["finish_reason"] == "stop"
        assert "Tells the weather" not in speaker.prompt


async def test_first_call_ends_an_answer_without_parallel_calls(
    http: httpx.AsyncClient, speaker: Speaker
) -> None:
    speaker.text = CALL + CALL
    body = {**WITH_TOOL, "parallel_tool_calls": False}
    whole = (await http.post(PATH, json=body)).json()
    assert len(whole["choices"][0]["message"]["tool_calls"]) == 1
    assert whole["choices"][0]["finish_reason"] == "tool_calls"
    assert whole["usage"]["completion_tokens"] < len(speaker.tokenizer.encode(speaker.text).ids)
    assert not speaker.num_running


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "weather"}}]
)
async def test_required_calls_are_enforced(
    http: httpx.AsyncClient, speaker: Speaker, choice: object
) -> None:
    body = {**WITH_TOOL, "tool_choice": choice}
    answer = await http.post(PATH, json=body)
    assert answer.json()["choices"][0]["finish_reason"] == "tool_calls"
    assert "calls:" in speaker.grammar
    assert not LLMatcher.validate_grammar(speaker.grammar)
    await http.post(PATH, json=WITH_TOOL)
    assert speaker.grammar == ""


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"tool_choice": "required", "tools": None}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "fly"}}}, "tool_choice"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": [TOOL, TOOL]}, "tools"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools"),
        ({"tool_choice": "required", "response_format": {"type": "json_object"}}, "tool_choice"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x", "tool_call_id": "1"}]}, "messages"),
        (
            {
                "tool_choice": "required",
                "tools": [
                    {"type": "function", "function": {"name": "f", "parameters": {"type": 7}}}
                ],
            },
            "tools",
        ),
    ],
)
async def test_what_does_not_go_together_is_refused(
    http: httpx.AsyncClient, changes: dict[str, object], field: str
) -> None:
    answer = await http.post(PATH, json={**WITH_TOOL, **changes})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"].startswith(field)


@pytest.fixture
def thinker(tmp_path: Path, byte_level: Tokenizer) -> Speaker:
    snapshot = write_snapshot(
        tmp_path / "it@0", byte_level, eos_token="<|im_end|>", chat_template=THINKING_TEMPLATE
    )
    return Speaker(snapshot, byte_level, f"Hm, a city.\n</think>\n\nI see.\n{CALL}")


async def test_thoughts_come_apart(make_app: AppMaker, thinker: Speaker) -> None:
    async with client_of(make_app(thinker)) as http:
        whole = (await http.post(PATH, json=WITH_TOOL)).json()
        stream = await http.post(PATH, json={**WITH_TOOL, "stream": True})
    message = whole["choices"][0]["message"]
    assert message["reasoning_content"] == "Hm, a city."
    assert message["content"] == "I see."
    assert json.loads(message["tool_calls"][0]["function"]["arguments"]) == {"city": "Zürich"}
    num_thought = whole["usage"]["completion_tokens_details"]["reasoning_tokens"]
    assert 5 < num_thought < whole["usage"]["completion_tokens"] - 20
    deltas = [chunk["choices"][0]["delta"] for chunk in events(stream.text)[:-1]]
    for field in ("reasoning_content", "reasoning", "content"):
        assert "".join(delta.get(field) or "" for delta in deltas) == message[field]
    assert message["reasoning"] == message["reasoning_content"]


async def test_thoughts_can_be_kept_back(make_app: AppMaker, thinker: Speaker) -> None:
    asked = WITH_TOOL | {"include_reasoning": False, "return_token_ids": True}
    async with client_of(make_app(thinker)) as http:
        whole = (await http.post(PATH, json=asked)).json()
        stream = await http.post(PATH, json={**asked, "stream": True})
    message = whole["choices"][0]["message"]
    assert "reasoning" not in json.dumps(message)
    assert message["content"] == "I see."
    assert whole["usage"]["completion_tokens_details"]["reasoning_tokens"] > 5
    choices = [chunk["choices"][0] for chunk in events(stream.text)[:-1]]
    assert "Hm" not in stream.text
    assert "".join(choice["delta"].get("content") or "" for choice in choices) == "I see."
    told = [token_id for choice in choices for token_id in choice["token_ids"]]
    assert told == whole["choices"][0]["token_ids"], "nothing is lost beside them"


@pytest.mark.parametrize(
    ("sent", "read"),
    [
        ({"reasoning": "Hm."}, "Hm."),
        ({"reasoning_content": "Hm."}, "Hm."),
        ({"reasoning_content": "Hm.", "reasoning": "Ah."}, "Hm."),
        ({"reasoning_content": None, "reasoning": None}, ""),
    ],
)
async def test_thoughts_that_are_sent_back_reach_the_template(
    make_app: AppMaker, tmp_path: Path, byte_level: Tokenizer, sent: dict[str, Any], read: str
) -> None:
    template = "{% for m in messages %}[{{ m.reasoning_content }}]{{ m.content }}{% endfor %}"
    snapshot = write_snapshot(
        tmp_path / "it@0", byte_level, eos_token="<|im_end|>", chat_template=template
    )
    speaker = Speaker(snapshot, byte_level)
    messages = [{"role": "assistant", "content": "Hi.", **sent}, {"role": "user", "content": "?"}]
    async with client_of(make_app(speaker)) as http:
        assert (await http.post(PATH, json=HELLO | {"messages": messages})).is_success
    assert speaker.prompt == f"[{read}]Hi.[]?"


async def test_thoughts_can_be_left_in_the_text(make_app: AppMaker, thinker: Speaker) -> None:
    spec = thinker.spec.to_json()
    spec["model"]["reasoning_parser"] = "none"
    thinker.spec = FunctionSpec.model_validate(spec)
    async with client_of(make_app(thinker)) as http:
        message = (await http.post(PATH, json=HELLO)).json()["choices"][0]["message"]
    assert message["content"] == thinker.text


async def test_a_form_is_asked_of_what_follows_the_thought(
    make_app: AppMaker, thinker: Speaker
) -> None:
    async with client_of(make_app(thinker)) as http:
        await http.post(PATH, json={**HELLO, "response_format": {"type": "json_object"}})
    (thought, answer) = json.loads(thinker.grammar)["grammars"]
    assert "</think>" in thought["lark_grammar"]
    (alone,) = json.loads(json_grammar({"type": "object"}))["grammars"]
    assert answer == {**alone, "name": "answer"}
    assert not LLMatcher.validate_grammar(thinker.grammar)
