"""Random JSON Schemas through everything: HTTP, gateway, engine, the small real model.

`SCHEMAS=1000 pytest -s tests/e2e/test_structured_outputs.py` runs as many as it says.
"""

import asyncio
import json
import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from functions.spec import FunctionSpec
from tests.e2e.conftest import Node

NUM_SCHEMAS = int(os.environ.get("SCHEMAS", "30"))
MAX_TOKENS = 48
CONCURRENCY = 16
pytestmark = [pytest.mark.e2e, pytest.mark.model, pytest.mark.timeout(300 + 3 * NUM_SCHEMAS)]
NAMES = ["name", "größe", "a b", "$id\n"]


SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-1000, 1000), st.text(max_size=8))
BOUNDS = st.tuples(st.integers(0, 3), st.integers(3, 12))
LEAVES = st.one_of(
    BOUNDS.map(lambda b: {"type": "string", "minLength": b[0], "maxLength": b[1]}),
    st.sampled_from(["^[a-c]{2,5}$", r"^\d{4}-\d{2}$", "^(yes|no|東京)$", "x+y"]).map(
        lambda pattern: {"type": "string", "pattern": pattern}
    ),
    st.sampled_from(["date", "time", "date-time", "uuid", "ipv4", "email"]).map(
        lambda format: {"type": "string", "format": format}
    ),
    st.fixed_dictionaries(
        {"type": st.sampled_from(["integer", "number"])},
        optional={
            "minimum": st.integers(-100, 0),
            "exclusiveMaximum": st.integers(20, 1000),
            "multipleOf": st.sampled_from([2, 5, 7]),
        },
    ),
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": ["string", "null"]}, {}]),
    st.lists(SCALARS, min_size=1, max_size=4, unique_by=repr).map(lambda some: {"enum": some}),
    SCALARS.map(lambda value: {"const": value}),
)


def has_what_it_requires(schema: dict[str, Any]) -> bool:
    """Return whether an object may have the keys it must have."""
    is_open = schema.get("additionalProperties") is not False
    return is_open or set(schema["required"]) <= set(schema["properties"])


def nested(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    """Return schemas of what holds something."""
    return st.one_of(
        st.tuples(inner, BOUNDS).map(
            lambda found: {
                "type": "array",
                "items": found[0],
                "minItems": found[1][0],
                "maxItems": found[1][1],
            }
        ),
        st.fixed_dictionaries(
            {
                "type": st.just("object"),
                "properties": st.dictionaries(st.sampled_from(NAMES), inner, max_size=4),
                "required": st.lists(st.sampled_from(NAMES), unique=True),
            },
            optional={"additionalProperties": st.sampled_from([False, True, {"type": "boolean"}])},
        ).filter(has_what_it_requires),
        st.lists(inner, min_size=1, max_size=3).map(lambda some: {"anyOf": some}),
    )


FREE = st.recursive(LEAVES, nested, max_leaves=5)
SCHEMAS = FREE | FREE.map(
    lambda schema: {
        "$defs": {"x": schema},
        "type": "array",
        "items": {"$ref": "#/$defs/x"},
        "maxItems": 2,
    }
)


def random_schemas(count: int) -> list[dict[str, Any]]:
    """Return different schemas, the same ones every time."""
    found: dict[str, dict[str, Any]] = {}

    @settings(
        max_examples=2 * count,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(SCHEMAS)
    def collect(schema: dict[str, Any]) -> None:
        found.setdefault(json.dumps(schema, sort_keys=True), schema)

    collect()
    return list(found.values())[:count]


async def ask(client: httpx.AsyncClient, schema: dict[str, Any], seed: int) -> str:
    """Return what became of a request for an instance of a schema; an invalid one fails."""
    body = {
        "model": "smollm2",
        "messages": [{"role": "user", "content": f"Write JSON for this: {json.dumps(schema)}"}],
        "max_tokens": MAX_TOKENS,
        "seed": seed,
        "truncate_prompt_tokens": 256,
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
    }
    response = await client.post("/v1/chat/completions", json=body)
    if response.status_code == 400:
        message: str = response.json()["error"]["message"]
        assert "cannot be followed" in message, (schema, message)
        return "refused"
    assert response.status_code == 200, response.text
    choice = response.json()["choices"][0]
    if choice["finish_reason"] == "length":
        return "length"
    text = choice["message"]["content"]
    errors = list(Draft202012Validator(schema).iter_errors(json.loads(text)))
    assert errors == [], (schema, text)
    compact = json.dumps(json.loads(text), separators=(",", ":"), ensure_ascii=False)
    assert len(text.split()) <= len(compact.split()) + 1, "no whitespace but inside strings"
    return "valid"


async def ask_all(url: str, schemas: Sequence[dict[str, Any]]) -> Counter[str]:
    places = asyncio.Semaphore(CONCURRENCY)

    async def ask_one(client: httpx.AsyncClient, number: int) -> str:
        async with places:
            return await ask(client, schemas[number], number)

    async with httpx.AsyncClient(base_url=url, timeout=600.0) as client:
        return Counter(
            await asyncio.gather(*(ask_one(client, number) for number in range(len(schemas))))
        )


def test_every_answer_is_valid_or_cut_by_the_limit(node: Node, spec: FunctionSpec) -> None:
    node.deploy(spec)
    schemas = random_schemas(NUM_SCHEMAS)
    assert len(schemas) == NUM_SCHEMAS
    outcomes = asyncio.run(ask_all(node.url, schemas))
    print(dict(outcomes))  # noqa: T201  # for the log
    assert outcomes["valid"] > NUM_SCHEMAS // 2
    assert outcomes["refused"] <= NUM_SCHEMAS // 10
