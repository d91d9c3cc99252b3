"""Fields that say what an answer must look like: response_format and structured_outputs."""

import json
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from controller.gateway.grammars import (
    ANY_OBJECT,
    choice_grammar,
    json_grammar,
    regex_grammar,
    text_grammar,
)
from controller.gateway.schemas.base import ApiBody, Neutral, wrong_field

MAX_CHOICES = 10_000


class JsonSchema(ApiBody):
    """A JSON Schema with a name."""

    ignored: ClassVar[frozenset[str]] = frozenset({"description"})

    name: str = Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_-]+$")
    schema_: dict[str, Any] | None = Field(
        default=None,
        alias="schema",
        description="What the answer must be valid under; any object if it is left out. A "
        "keyword that cannot be enforced is refused.",
    )
    strict: bool | None = Field(
        default=None, description="The schema is always enforced, whatever this says."
    )


class ResponseFormat(ApiBody):
    """OpenAI's way to ask for JSON, which comes without whitespace between its tokens."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = Field(
        default=None, description="Required for the type `json_schema`."
    )

    @model_validator(mode="after")
    def _check_schema(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise wrong_field("goes with the type 'json_schema'", field="json_schema")
        return self

    def grammar(self) -> str:
        """Return the grammar of the answer; empty if it is free."""
        if self.type == "text":
            return ""
        schema = self.json_schema.schema_ if self.json_schema else None
        return json_grammar(ANY_OBJECT if schema is None else schema)


class StructuredOutputs(ApiBody):
    """vLLM's way to ask for JSON, a regular expression, one of several texts, or a grammar."""

    unsupported: ClassVar[dict[str, Neutral]] = {
        "structural_tag": (),
        "disable_fallback": (True,),
        "disable_additional_properties": (False,),
    }

    json_: dict[str, Any] | str | bool | None = Field(
        default=None, alias="json", description="A JSON Schema, as an object or as its text."
    )
    regex: str | None = Field(default=None, min_length=1)
    choice: list[str] | None = Field(default=None, min_length=1, max_length=MAX_CHOICES)
    grammar_: str | None = Field(
        default=None, alias="grammar", min_length=1, description="Lark, or GBNF."
    )
    json_object: Literal[True] | None = Field(default=None, description="Any JSON object.")
    disable_any_whitespace: bool | None = Field(
        default=None, description="Whether JSON comes compact, which is the default."
    )
    whitespace_pattern: str | None = Field(
        default=None, description="Regular expression for the whitespace between tokens of JSON."
    )

    @model_validator(mode="after")
    def _check_one(self) -> "StructuredOutputs":
        given = [
            value
            for value in (self.json_, self.regex, self.choice, self.grammar_, self.json_object)
            if value is not None
        ]
        if len(given) != 1:
            raise wrong_field("needs exactly one of json, regex, choice, grammar and json_object")
        return self

    def grammar(self) -> str:
        """Return the grammar of the answer.

        Raises:
            ValueError: The text of a schema or grammar cannot be read.
        """
        if self.regex is not None:
            return regex_grammar(self.regex)
        if self.choice is not None:
            return choice_grammar(self.choice)
        if self.grammar_ is not None:
            return text_grammar(self.grammar_)
        return json_grammar(
            ANY_OBJECT if self.json_object else _parsed(self.json_),
            has_whitespace=self.disable_any_whitespace is False,
            whitespace_pattern=self.whitespace_pattern,
        )


def _parsed(schema: dict[str, Any] | str | bool | None) -> dict[str, Any] | bool:
    if isinstance(schema, str):
        schema = json.loads(schema)
    if not isinstance(schema, dict | bool):
        raise ValueError("a JSON Schema is an object or a boolean")
    return schema
