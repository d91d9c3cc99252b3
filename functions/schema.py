"""The published JSON Schema of a function spec, for editors and other tools.

functions/function.schema.json is this, committed; `coldspark schema` prints it.
"""

import json
from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from functions.spec import FunctionSpec


class _Untitled(GenerateJsonSchema):
    """Leaves out the titles pydantic makes up from field names."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def json_schema() -> dict[str, Any]:
    """Return the schema; durations and sizes carry `x-coldspark-type`."""
    schema = FunctionSpec.model_json_schema(schema_generator=_Untitled)
    return {"$schema": GenerateJsonSchema.schema_dialect, **schema}


def json_schema_text() -> str:
    """Return the schema as the committed file holds it."""
    return json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"
