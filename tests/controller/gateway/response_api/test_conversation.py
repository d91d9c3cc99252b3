"""Items to messages."""

from typing import Any

import pytest

from controller.gateway.response_api.conversation import messages_of
from controller.gateway.schemas.response_input import STORED_ITEMS

USER: dict[str, Any] = {"role": "user", "content": "hello"}
SAID: dict[str, Any] = {
    "type": "message",
    "role": "assistant",
    "content": [{"type": "output_text", "text": "Hm.", "annotations": []}],
}
THOUGHT: dict[str, Any] = {
    "type": "reasoning",
    "id": "rs_1",
    "summary": [],
    "content": [{"type": "reasoning_text", "text": "A city."}],
}


def called(call_id: str) -> dict[str, Any]:
    return {"type": "function_call", "call_id": call_id, "name": "f", "arguments": "{}"}


def returned(call_id: str) -> dict[str, Any]:
    output = [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]
    return {"type": "function_call_output", "call_id": call_id, "output": output}


def call(call_id: str) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        ([USER], [{"role": "user", "content": "hello"}]),
        (
            [USER, THOUGHT, SAID, called("c1"), called("c2"), returned("c1"), returned("c2")],
            [
                {"role": "user", "content": "hello"},
                {
                    "role": "assistant",
                    "reasoning_content": "A city.",
                    "content": "Hm.",
                    "tool_calls": [call("c1"), call("c2")],
                },
                {"role": "tool", "content": "a\nb", "tool_call_id": "c1"},
                {"role": "tool", "content": "a\nb", "tool_call_id": "c2"},
            ],
        ),
        (
            [called("c1"), SAID, SAID],
            [{"role": "assistant", "content": "Hm.\nHm.", "tool_calls": [call("c1")]}],
        ),
        (
            [called("c1"), returned("c1"), called("c2")],
            [
                {"role": "assistant", "content": None, "tool_calls": [call("c1")]},
                {"role": "tool", "content": "a\nb", "tool_call_id": "c1"},
                {"role": "assistant", "content": None, "tool_calls": [call("c2")]},
            ],
        ),
        (
            [{"role": "developer", "content": "a"}, USER, {"role": "system", "content": "b"}],
            [
                {"role": "system", "content": "a"},
                {"role": "user", "content": "hello"},
                {"role": "system", "content": "b"},
            ],
        ),
    ],
)
def test_items_become_messages(items: list[Any], expected: list[Any]) -> None:
    assert messages_of(None, STORED_ITEMS.validate_python(items)) == expected


def test_what_the_system_says_first_is_one_message() -> None:
    items = STORED_ITEMS.validate_python([{"role": "developer", "content": "Be kind."}, USER])
    assert messages_of("Be brief.", items) == [
        {"role": "system", "content": "Be brief.\n\nBe kind."},
        {"role": "user", "content": "hello"},
    ]


@pytest.mark.parametrize("item", [USER, SAID, THOUGHT, called("c"), returned("c")])
def test_listed_item_reads_as_the_one_that_came(item: dict[str, Any]) -> None:
    (first,) = STORED_ITEMS.validate_python([item])
    listed = first.to_json()
    (second,) = STORED_ITEMS.validate_python([listed])
    assert second.to_json() == listed
    assert messages_of(None, [second])[0]["role"] == messages_of(None, [first])[0]["role"]
    assert messages_of(None, [second]) == messages_of(None, [first])
