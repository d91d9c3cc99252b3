"""No request makes the Responses API fail in any other way than by being refused."""

import asyncio
import os
from typing import Any

import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from controller.gateway.schemas.responses import ResponseRequest
from tests.controller.gateway.conftest import client_of
from tests.controller.gateway.jobs.responses.helpers import HELLO, PATH, TOOL
from tests.controller.gateway.test_fuzzed_schemas import VALUES

NUM_REQUESTS = int(os.environ.get("REQUESTS", "20"))
FIELDS = [*ResponseRequest.model_fields, *ResponseRequest.unsupported, *ResponseRequest.ignored]
TEXTS = st.sampled_from(["", "x", "東京", "{}", "c1", "weather", "<think>", "\x00"])
CONTENTS = TEXTS | st.lists(
    st.fixed_dictionaries({"type": st.sampled_from(["input_text", "output_text"]), "text": TEXTS}),
    max_size=2,
)
ITEMS = st.one_of(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "developer"]), "content": CONTENTS}
    ),
    st.fixed_dictionaries(
        {"type": st.just("function_call"), "call_id": TEXTS, "name": TEXTS, "arguments": TEXTS}
    ),
    st.fixed_dictionaries(
        {"type": st.just("function_call_output"), "call_id": TEXTS, "output": CONTENTS}
    ),
    st.fixed_dictionaries(
        {"type": st.just("reasoning"), "summary": st.just([]), "content": st.none() | CONTENTS}
    ),
    VALUES,
)
KNOWN = st.fixed_dictionaries(
    {},
    optional={
        "input": st.lists(ITEMS, max_size=5),
        "tools": st.just([TOOL]),
        "tool_choice": st.sampled_from(["auto", "none", "required", {"type": "function"}]),
        "truncation": st.sampled_from(["auto", "disabled"]),
        "instructions": TEXTS,
        "stream": st.booleans(),
        "background": st.booleans(),
        "max_output_tokens": st.integers(1, 300),
        "previous_response_id": TEXTS,
        "text": st.sampled_from([{}, {"format": {"type": "json_object"}}, {"format": None}]),
    },
)


@pytest.mark.timeout(60 + NUM_REQUESTS)
async def test_every_request_is_answered_or_refused(app: FastAPI) -> None:
    loop = asyncio.get_running_loop()
    async with client_of(app) as client:

        async def ask(body: dict[str, Any]) -> int:
            status = (await client.post(PATH, json=body)).status_code
            counted = (await client.post(f"{PATH}/input_tokens", json=body)).status_code
            return max(status, counted)

        @settings(max_examples=NUM_REQUESTS, suppress_health_check=list(HealthCheck))
        @given(known=KNOWN, changes=st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=2))
        def check(known: dict[str, Any], changes: dict[str, Any]) -> None:
            body = {**HELLO, **known, **changes}
            assert asyncio.run_coroutine_threadsafe(ask(body), loop).result(30) < 500

        await asyncio.to_thread(check)
