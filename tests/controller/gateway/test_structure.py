"""Structured outputs as the gateway takes them; the engine follows what it is handed."""

import json
from typing import Any

import httpx
import pytest
from llguidance import LLMatcher, LLTokenizer

from tests.fakes.function import FakeFunction

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]},
    TEXT: {"model": "tiny", "prompt": "hello"},
}
BYTES = LLTokenizer("byte")
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def matches(grammar: str, text: str) -> bool:
    matcher = LLMatcher(BYTES, grammar, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    tokens = BYTES.tokenize_str(text)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


async def grammar_of(
    client: httpx.AsyncClient, function: FakeFunction, path: str, **fields: Any
) -> str:
    response = await client.post(path, json={**BODIES[path], **fields})
    assert response.status_code == 200, response.text
    return function.generations[-1].request.sampling.grammar


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize(
    ("fields", "good", "bad"),
    [
        (
            {"response_format": {"type": "json_object"}},
            ["{}", '{"a":[1,null,"x"]}'],
            ["[]", '{ "a": 1}', "", "{"],
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "person", "schema": PERSON, "strict": True},
                }
            },
            ['{"name":"Ada","age":36}'],
            ["{}", '{"name":"Ada","age":"36"}', '{"name": "Ada", "age": 36}'],
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "any"}}},
            ['{"x":1}'],
            ["1"],
        ),
        ({"structured_outputs": {"json": PERSON}}, ['{"name":"","age":0}'], ["{}"]),
        ({"structured_outputs": {"json": json.dumps(PERSON)}}, ['{"name":"","age":0}'], ["{}"]),
        ({"structured_outputs": {"json": True}}, ["7", '"a"', "null"], ["", "nil"]),
        ({"structured_outputs": {"json_object": True}}, ["{}"], ["7"]),
        ({"structured_outputs": {"regex": r"\d{3}-[a-c]+"}}, ["123-abc"], ["123-", "x123-a"]),
        (
            {"structured_outputs": {"choice": ["yes", "no \U0001f525", '"\\\n', "a|b"]}},
            ["yes", "no \U0001f525", '"\\\n', "a|b"],
            ["a", "b", ""],
        ),
        ({"structured_outputs": {"grammar": 'start: "a" b+\nb: "b"'}}, ["abb"], ["a"]),
        ({"structured_outputs": {"grammar": 'root ::= "a" b+\nb ::= "b"'}}, ["abb"], ["a"]),
        (
            {"structured_outputs": {"json": PERSON, "disable_any_whitespace": False}},
            ['{\n  "name": "Ada",\n  "age": 3\n}', '{"name":"","age":0}'],
            ["{}"],
        ),
        (
            {"structured_outputs": {"json": PERSON, "whitespace_pattern": "[ ]?"}},
            ['{"name": "Ada", "age": 3}'],
            ['{"name":  "Ada","age":0}'],
        ),
    ],
)
async def test_the_engine_is_handed_a_grammar(
    client: httpx.AsyncClient,
    function: FakeFunction,
    path: str,
    fields: dict[str, Any],
    good: list[str],
    bad: list[str],
) -> None:
    grammar = await grammar_of(client, function, path, **fields)
    assert [text for text in good if not matches(grammar, text)] == []
    assert [text for text in bad if matches(grammar, text)] == []


@pytest.mark.parametrize("fields", [{}, {"response_format": {"type": "text"}}])
async def test_free_answers_have_no_grammar(
    client: httpx.AsyncClient, function: FakeFunction, fields: dict[str, Any]
) -> None:
    for path in (CHAT, TEXT):
        assert await grammar_of(client, function, path, **fields) == ""


def schema_format(schema: object) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


@pytest.mark.parametrize(
    ("field", "value", "hint"),
    [
        ("response_format", {"type": "xml"}, "'text', 'json_object' or 'json_schema'"),
        ("response_format", {"type": "json_schema"}, "goes with"),
        ("response_format", {"type": "text", "json_schema": {"name": "x"}}, "goes with"),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "a b"}}, "pattern"),
        ("response_format", schema_format({"type": "nothing"}), "nothing"),
        ("response_format", schema_format({"$ref": "#/$defs/none"}), "does not exist"),
        ("response_format", schema_format({"$ref": "http://127.0.0.1/x"}), "does not fetch"),
        ("response_format", schema_format({"type": "string", "pattern": "("}), "regex"),
        ("response_format", schema_format({"not": {"type": "string"}}), "not"),
        ("response_format", schema_format({"enum": []}), "Unsatisfiable"),
        ("structured_outputs", {}, "exactly one"),
        ("structured_outputs", {"regex": "a", "choice": ["a"]}, "exactly one"),
        ("structured_outputs", {"regex": "("}, "regex"),
        ("structured_outputs", {"regex": "(" * 5000}, "regex"),
        ("structured_outputs", {"json": "{"}, "cannot be read"),
        ("structured_outputs", {"json": "7"}, "object or a boolean"),
        ("structured_outputs", {"json": False}, "Unsatisfiable"),
        ("structured_outputs", {"choice": []}, "at least 1"),
        ("structured_outputs", {"grammar": "start: nowhere"}, "nowhere"),
        ("structured_outputs", {"grammar": "root ::= " + "(" * 5000}, "cannot be read"),
        ("structured_outputs", {"grammar": "start: " + '"a" ' * 300_000}, "longer than"),
        ("structured_outputs", {"structural_tag": "{}"}, "not supported"),
        ("structured_outputs", {"chioce": ["a"]}, "did you mean 'choice'?"),
    ],
)
async def test_what_cannot_be_followed_is_refused_before_anything_runs(
    client: httpx.AsyncClient, function: FakeFunction, field: str, value: object, hint: str
) -> None:
    for path, body in BODIES.items():
        response = await client.post(path, json={**body, field: value})
        error = response.json()["error"]
        assert response.status_code == 400, response.text
        assert hint in error["message"]
        assert error["param"].startswith(field)
    assert function.generations == []


async def test_response_format_and_structured_outputs_exclude_each_other(
    client: httpx.AsyncClient,
) -> None:
    both = {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}
    response = await client.post(CHAT, json={**BODIES[CHAT], **both})
    assert response.json()["error"]["param"] == "structured_outputs"
