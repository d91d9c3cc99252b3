import json
import re
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controller.gateway.tool_calls.base import ToolCallParser
from controller.gateway.tool_calls.formats import FORMATS
from controller.gateway.tool_calls.mistral import NAMED_SHAPE, MistralParser
from controller.gateway.tool_calls.shape import CallShape
from tests.controller.gateway.tool_calls.reading import Message, read

NAMES = frozenset({"weather", "noop", "function"})
SHAPES = {name: (one.parser, one.shape("```")) for name, one in FORMATS.items()}
SHAPES["deepseek_plain"] = (FORMATS["deepseek"].parser, FORMATS["deepseek"].shape(""))
SHAPES["mistral_named"] = (MistralParser, NAMED_SHAPE)
EVERY_SHAPE = pytest.mark.parametrize(("parser", "shape"), SHAPES.values(), ids=SHAPES)
ARGUMENTS = {"city": 'Zü"rich\\\n{[<tool_call>', "days": [1, {"a": None}], "metric": True}
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
KEYS = st.from_regex(r"\A[a-z]{1,8}\Z").filter(lambda key: key not in {"in", "is", "as", "if"})


def arguments_in(shape: CallShape, arguments: Mapping[str, object]) -> str:
    """Return arguments as a model that writes this shape writes them."""
    if not shape.has_keywords:
        return json.dumps(arguments, ensure_ascii=False)
    return ", ".join(f"{key}={json.dumps(value)}" for key, value in arguments.items())


def cut(text: str, places: list[int]) -> list[str]:
    """Cut a text at some places, counted around its length."""
    ends = sorted({place % (len(text) + 1) for place in places} | {len(text)})
    return [text[start:end] for start, end in zip([0, *ends], ends, strict=False)]


@EVERY_SHAPE
def test_reads_what_the_format_writes(parser: type[ToolCallParser], shape: CallShape) -> None:
    text = shape.write([("weather", arguments_in(shape, ARGUMENTS)), ("noop", "" if shape.has_keywords else "{}")])  # fmt: skip
    message = read(parser(NAMES), text)
    assert message.content == ""
    assert [(name, json.loads(arguments)) for name, arguments in message.calls] == [
        ("weather", ARGUMENTS),
        ("noop", {}),
    ]


@EVERY_SHAPE
@settings(max_examples=50)
@given(st.data())
def test_is_the_same_however_it_is_cut(
    parser: type[ToolCallParser], shape: CallShape, data: st.DataObject
) -> None:
    arguments = data.draw(st.lists(st.dictionaries(KEYS, ANYTHING, max_size=3), max_size=3))
    text = shape.write([("weather", arguments_in(shape, one)) for one in arguments])
    if data.draw(st.booleans()):  # spoil it
        at = data.draw(st.integers(0, len(text)))
        spoilt = data.draw(st.sampled_from(["", '"', "}", "]", "\\", " ", shape.before_name, "x("]))
        text = text[:at] + spoilt + text[at + data.draw(st.integers(0, 3)) :]
    text = data.draw(st.sampled_from(["", " ", "Well.\n\n"])) + text
    text += data.draw(st.sampled_from(["", "\n", " Done. "]))
    whole = read(parser(NAMES), text)
    assert read(parser(NAMES), *text) == whole
    assert read(parser(NAMES), *cut(text, data.draw(st.lists(st.integers(0, 999))))) == whole


@EVERY_SHAPE
@settings(max_examples=25)
@given(st.text())
def test_text_without_calls_is_content_as_it_is(
    parser: type[ToolCallParser], shape: CallShape, text: str
) -> None:
    assert read(parser(NAMES), text) == Message(text, [])
    assert read(parser(NAMES), *text) == Message(text, [])


@EVERY_SHAPE
def test_arguments_are_streamed(parser: type[ToolCallParser], shape: CallShape) -> None:
    if shape.has_keywords:
        pytest.skip("arguments are known with the whole call")
    reader = parser(NAMES)
    text = shape.write([("weather", '{"city": "Zürich"}')])
    told = [len(reader.feed(char).calls) for char in text]
    assert sum(told) >= len('{"city": "Zürich"}')


@EVERY_SHAPE
def test_call_of_an_unknown_tool_is_text(parser: type[ToolCallParser], shape: CallShape) -> None:
    text = shape.write([("launch", arguments_in(shape, {"now": True}))])
    message = read(parser(NAMES), text)
    assert message.calls == []
    assert "launch" in message.content
    assert "now" in message.content


@EVERY_SHAPE
@settings(max_examples=50)
@given(st.integers(0, 400))
def test_nothing_of_a_cut_off_call_is_lost(
    parser: type[ToolCallParser], shape: CallShape, at: int
) -> None:
    arguments = arguments_in(shape, ARGUMENTS)
    text = shape.write([("weather", arguments)])[:at]
    message = read(parser(NAMES), text)
    written = text.partition(shape.before_arguments)[2][: len(arguments)]
    if message.calls and shape.has_keywords:
        assert json.loads(message.calls[0][1]) == ARGUMENTS
    elif message.calls:
        assert message.calls[0][1] == written
    else:
        assert written in message.content


@EVERY_SHAPE
def test_only_as_many_calls_as_wanted(parser: type[ToolCallParser], shape: CallShape) -> None:
    call = ("weather", arguments_in(shape, {"city": "Bern"}))
    reader = parser(NAMES, max_calls=1)
    text = shape.write([call, call])
    first = next(at for at in range(len(text)) if parser_is_complete(parser, text[:at]))
    assert text[:first].count("Bern") == 1
    assert len(read(reader, text, "and so on").calls) == 1
    assert reader.is_complete


def parser_is_complete(parser: type[ToolCallParser], text: str) -> bool:
    reader = parser(NAMES, max_calls=1)
    reader.feed(text)
    return reader.is_complete


def hermes(*pieces: str) -> Message:
    return read(FORMATS["hermes"].parser(NAMES), *pieces)


def test_content_around_calls() -> None:
    call = '<tool_call>\n{"name": "noop", "arguments": {}}\n</tool_call>'
    assert hermes(f"Let me see.\n\n{call}\n{call}\nDone.") == Message(
        "Let me see.Done.", [("noop", "{}"), ("noop", "{}")]
    )


@pytest.mark.parametrize(
    ("object_", "arguments"),
    [
        ('{"arguments": {"a": 1}, "name": "weather"}', '{"a": 1}'),
        ('{"name": "weather", "arguments": "{\\"a\\": 1}"}', '{"a": 1}'),
        ('{"name": "weather", "arguments": null}', "{}"),
        ('{"name": "weather"}', "{}"),
        ('{"id": [1], "name": "weather", "arguments": {"a":30}, "x": {}}', '{"a":30}'),
        ('{"name": "weather", "arguments": {"a": 1e5}}}', '{"a": 1e5}'),
    ],
)
def test_ways_to_write_a_call(object_: str, arguments: str) -> None:
    message = hermes(f"<tool_call>{object_}</tool_call>")
    assert message.calls == [("weather", arguments)]


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>",
        "<tool_call>{}</tool_call>",
        "<tool_call>weather</tool_call>",
        '<tool_call>{"name": weather, "arguments": {"a": 1}}</tool_call>',
        '<tool_call>{"name": "weather", "arguments": [1, 2]}</tool_call>',
        '<tool_call>{"name": "weather", "arguments": "none"}</tool_call>',
        '<tool_call>{"name": "we\\qather", "arguments": {}}</tool_call>',
        '<tool_call>{"arguments": {"a": [1}, "name": "weather"}</tool_call>',
        'if a <tool_call or b < "tool"',
    ],
)
def test_malformed_call_is_text(text: str) -> None:
    assert hermes(text) == Message(text, [])


def test_a_good_call_after_a_malformed_one_is_found() -> None:
    good = '<tool_call>{"name": "noop", "arguments": {}}</tool_call>'
    message = hermes('<tool_call>{"name": ' + good)
    assert message == Message('<tool_call>{"name":', [("noop", "{}")])


def test_llama_answers_in_json_that_are_no_calls_are_text() -> None:
    for text in ('{"name": "Bob", "age": 3}', '[{"name": "weather"}]', ' {"weather": 1} '):
        assert read(FORMATS["llama3_json"].parser(NAMES), text) == Message(text, [])


def test_llama_calls_after_a_tag() -> None:
    text = 'Sure.<|python_tag|>{"name": "noop", "parameters": {}}; {"name": "noop"}'
    message = read(FORMATS["llama3_json"].parser(NAMES), text)
    assert message == Message("Sure.", [("noop", "{}")] * 2)


def test_mistral_call_ids_fit_its_templates() -> None:
    said = MistralParser(NAMES).feed("[TOOL_CALLS]noop[CALL_ID]abc[ARGS]{}")
    assert said.calls[0].call_id is not None
    assert re.fullmatch("[a-zA-Z0-9]{9}", said.calls[0].call_id)


@pytest.mark.parametrize(
    ("source", "arguments"),
    [
        ("weather(city='Zürich', days=-2.5)", {"city": "Zürich", "days": -2.5}),
        (
            "weather(a=[1, (2, 3)], b={'x': None, 'y': true})",
            {"a": [1, [2, 3]], "b": {"x": None, "y": True}},
        ),
        (r"weather(city='it\'s \d')", {"city": r"it's \d"}),
    ],
)
def test_pythonic_literals(source: str, arguments: dict[str, object]) -> None:
    message = read(FORMATS["pythonic"].parser(NAMES), f"[{source}]")
    assert [(name, json.loads(text)) for name, text in message.calls] == [("weather", arguments)]


@pytest.mark.parametrize(
    "text",
    [
        "[weather(city)]",
        "[weather(1)]",
        "[weather(**{})]",
        "[weather(city=open('x'))]",
        "[weather(x=1e999)]",
        "[weather(x=1+2)]",
        f"[weather(x={'9' * 5000})]",
        f"[weather(x={'[' * 1000}{']' * 1000})]",
        "[weather(x=b'')]",
        "[1, 2, 3]",
    ],
)
def test_pythonic_text_that_is_no_call(text: str) -> None:
    assert read(FORMATS["pythonic"].parser(NAMES), text) == Message(text, [])
