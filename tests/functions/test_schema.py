from pathlib import Path

from functions.schema import json_schema, json_schema_text
from functions.spec import FunctionSpec

COMMITTED = Path(__file__).parents[2] / "functions" / "function.schema.json"


def test_committed_schema_is_current() -> None:
    hint = "run: coldspark schema > functions/function.schema.json"
    assert COMMITTED.read_text() == json_schema_text(), hint


def test_schema_describes_every_field_of_every_section() -> None:
    schema = json_schema()
    assert set(schema["properties"]) == set(FunctionSpec.model_fields)
    for section in schema["$defs"].values():
        for key, field in section.get("properties", {}).items():
            assert field.get("description"), f"{key} has no description"


def test_schema_refuses_unknown_keys_everywhere() -> None:
    schema = json_schema()
    sections = [schema, *(part for part in schema["$defs"].values() if "properties" in part)]
    assert all(section["additionalProperties"] is False for section in sections)
