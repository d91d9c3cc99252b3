"""Grammars of required calls, followed as the engine follows them."""

import json
from typing import Any

import llguidance
import llguidance.hf
import pytest
from tokenizers import AddedToken, Tokenizer

from controller.gateway.dialect import Dialect
from controller.gateway.tool_calls.shape import ToolFunction
from functions.spec import ModelSpec
from tests.controller.gateway.tool_calls.reading import read
from tests.controller.gateway.tool_calls.test_parsers import arguments_in
from tests.fakes.tokenizers import byte_level_tokenizer

FUNCTIONS = [
    ToolFunction(
        name="weather",
        parameters={
            "type": "object",
            "properties": {"days": {"type": "integer"}, "city": {"$ref": "#/$defs/city"}},
            "required": ["city"],
            "additionalProperties": False,
            "$defs": {"city": {"type": "string"}},
        },
    ),
    ToolFunction(name="noop", parameters={"type": "object", "additionalProperties": False}),
]
TEMPLATES = {
    "hermes": "",
    "llama3_json": "",
    "mistral": "",
    "mistral[ARGS]": "[ARGS]",
    "pythonic": "",
    "deepseek": "",
    "deepseek```": "```",
}


class Model:
    """A tokenizer, with some special tokens, that follows grammars."""

    def __init__(self, *special: str) -> None:
        self.tokenizer: Tokenizer = byte_level_tokenizer()
        self.tokenizer.add_special_tokens([AddedToken(one, special=True) for one in special])
        self._tokens = llguidance.LLTokenizer(self.tokenizer.to_str(), eos_token=2)

    def accepts(self, grammar: str, text: str) -> bool:
        """Return whether a text is an answer that matches a grammar, as a whole."""
        matcher = llguidance.LLMatcher(self._tokens, grammar)
        assert not matcher.is_error(), matcher.get_error()
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        return all(matcher.try_consume_tokens([one]) for one in ids) and matcher.is_accepting()


def dialect_of(model: Model, name: str, template: str, reasoning: str = "none") -> Dialect:
    spec: Any = {"source": "/x", "tool_call_parser": name, "reasoning_parser": reasoning}
    return Dialect(template, model.tokenizer, ModelSpec.model_validate(spec))


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("has_special_markers", [False, True])
def test_required_calls_are_what_the_parser_reads(name: str, has_special_markers: bool) -> None:
    format_name = name.split("[")[0].rstrip("`")
    markers = dialect_of(Model(), format_name, "").format.parser.markers
    model = Model(*(markers if has_special_markers else ()))
    dialect = dialect_of(model, format_name, TEMPLATES[name])
    shape = dialect.format.shape(TEMPLATES[name])
    grammar = dialect.calls_grammar(FUNCTIONS, is_parallel=True, is_open=False)

    def written(*calls: tuple[str, dict[str, Any]]) -> str:
        return shape.write(
            [
                (name, arguments_in(shape, arguments) if shape.has_keywords else compact(arguments))
                for name, arguments in calls
            ]
        )

    both = written(("weather", {"city": "Bern"}), ("noop", {}))
    assert model.accepts(grammar, both)
    calls = read(dialect.format.parser({"weather", "noop"}), both).calls
    assert [name for name, _ in calls] == ["weather", "noop"]
    full = {"city": "Bern", "days": 2} if shape.has_keywords else {"days": 2, "city": "Bern"}
    one = written(("weather", full))
    assert model.accepts(grammar, one)
    for wrong in ("", "hello", written(("weather", {})), written(("fly", {})), both[:-1]):
        assert not model.accepts(grammar, wrong), wrong
    alone = dialect.calls_grammar(FUNCTIONS[:1], is_parallel=False, is_open=False)
    assert model.accepts(alone, one)
    assert not model.accepts(alone, both)


@pytest.mark.parametrize("special", [(), ("<think>", "</think>")])
def test_a_thought_may_come_before_what_is_required(special: tuple[str, ...]) -> None:
    model = Model(*special)
    dialect = dialect_of(model, "hermes", "", reasoning="think")
    call = '<tool_call>\n{"name": "noop", "arguments": {}}\n</tool_call>'
    open_ = dialect.calls_grammar(FUNCTIONS, is_parallel=True, is_open=True)
    closed = dialect.calls_grammar(FUNCTIONS, is_parallel=True, is_open=False)
    assert model.accepts(open_, f"Hm.\n</think>\n\n{call}")
    assert not model.accepts(open_, call)
    assert model.accepts(closed, f"<think>Hm.\n</think>\n\n{call}")
    assert model.accepts(closed, call)
    assert not model.accepts(closed, f"Hm. {call}")
    answer = dialect.after_thought('start: "yes" | "no"', is_open=True)
    assert model.accepts(answer, "Hm.</think>\nyes")
    assert not model.accepts(answer, "Hm.</think>\nmaybe")


def compact(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ '<tool_call>' }}", "hermes"),
        ("[TOOL_CALLS]", "mistral"),
        (
            "{{ '<\N{FULLWIDTH VERTICAL LINE}tool▁calls▁begin\N{FULLWIDTH VERTICAL LINE}>' }}",
            "deepseek",
        ),
        ('{"name": function name, "parameters": dictionary of argument name', "llama3_json"),
        ("[func_name1(params_name1=params_value1)]", "pythonic"),
        ("{{ messages }}", "hermes"),
    ],
)
def test_format_goes_by_the_template(template: str, expected: str) -> None:
    model = Model()
    dialect = dialect_of(model, "auto", template)
    assert dialect.format == dialect_of(model, expected, "").format
