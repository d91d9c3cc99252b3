"""What tests of the Responses API ask, and how they read the answers."""

import json
from typing import Any

import httpx
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

PATH = "/v1/responses"
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call>'
TOOL: Any = {
    "type": "function",
    "name": "weather",
    "description": "Tells the weather.",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
SAME: Any = {"model": "tiny"}
HELLO: dict[str, Any] = {"model": "tiny", "input": "hello"}
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


def read_events(text: str) -> list[Any]:
    """Return a stream's events, each checked against the SDK's type of its name."""
    found = []
    for block in text.removesuffix("\n\n").split("\n\n"):
        name, _, data = block.partition("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        EVENT.validate_python(event)
        found.append(event)
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


async def stream(client: httpx.AsyncClient, **fields: Any) -> list[Any]:
    answer = await client.post(PATH, json={**HELLO, "stream": True, **fields})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    return read_events(answer.text)


def runs(events: list[Any]) -> list[str]:
    """Return the types of events, equal ones in a row once."""
    types = [event["type"].removeprefix("response.") for event in events]
    return [one for one, before in zip(types, ["", *types], strict=False) if one != before]


TEXT_EVENTS = [
    "output_item.added",
    "content_part.added",
    "output_text.delta",
    "output_text.done",
    "content_part.done",
    "output_item.done",
]
CALL_EVENTS = [
    "output_item.added",
    "function_call_arguments.delta",
    "function_call_arguments.done",
    "output_item.done",
]
THOUGHT_EVENTS = [one.replace("output_text", "reasoning_text") for one in TEXT_EVENTS]
BEGIN, END = ["created", "in_progress"], ["completed"]


async def post(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    answer = await client.post(PATH, json={**HELLO, **fields})
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    Response.model_validate(body)  # the SDK itself is lenient
    return body


def anonymous(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return items without what is made up for each."""
    return [{**item, "id": "", "call_id": ""} for item in items]
