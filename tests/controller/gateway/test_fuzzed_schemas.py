"""No JSON makes a request body fail in any other way than by being refused."""

import contextlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from controller.gateway.schemas.base import ApiBody
from controller.gateway.schemas.batches import BatchRequest
from controller.gateway.schemas.embeddings import EmbeddingsRequest
from controller.gateway.schemas.requests import AsyncRequestBody
from controller.gateway.schemas.responses import ResponseRequest
from controller.gateway.schemas.tokens import DetokenizeRequest, TokenizeRequest

GOOD: dict[type[ApiBody], dict[str, Any]] = {
    BatchRequest: {
        "input_file_id": "file-0",
        "endpoint": "/v1/embeddings",
        "completion_window": "24h",
    },
    AsyncRequestBody: {"endpoint": "/v1/embeddings", "body": {"model": "tiny"}},
    EmbeddingsRequest: {"model": "tiny", "input": "a"},
    TokenizeRequest: {"prompt": "a"},
    DetokenizeRequest: {"tokens": [1]},
    ResponseRequest: {
        "model": "tiny",
        "input": [
            {"role": "user", "content": "a"},
            {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": "1"},
        ],
    },
}
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20)
    | st.sampled_from(["24h", "1e9d", "model", "user", "/v1/embeddings", "-1s", "float", "message"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["role", "content", "type", "model", "stream", "x"]), inner
        )
    ),
    max_leaves=8,
)


@pytest.mark.parametrize("kind", GOOD, ids=lambda kind: kind.__name__)
@given(data=st.data())
@settings(max_examples=150)
def test_every_body_is_taken_or_refused(kind: type[ApiBody], data: st.DataObject) -> None:
    fields = [*kind.model_fields, *kind.unsupported, *kind.ignored, "unknown"]
    changes = data.draw(st.dictionaries(st.sampled_from(fields), VALUES, max_size=3))
    start = GOOD[kind] if data.draw(st.booleans()) else {}
    with contextlib.suppress(ValidationError):
        kind.model_validate(start | changes)


@pytest.mark.parametrize("kind", GOOD, ids=lambda kind: kind.__name__)
def test_good_body_is_taken(kind: type[ApiBody]) -> None:
    kind.model_validate(GOOD[kind])
