"""The Responses API from the official SDK to the small real model and back."""

from typing import Literal

import openai
import pytest
from openai.types.responses import Response
from pydantic import BaseModel

from functions.spec import FunctionSpec
from tests.e2e.conftest import Node, wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.model, pytest.mark.timeout(180)]
QUESTION = "What is the capital of France?"


class City(BaseModel):
    """What the model is to fill in; nothing that it could go on with for ever."""

    name: Literal["Paris", "Rome"]
    is_capital: bool


async def test_responses(node: Node, spec: FunctionSpec) -> None:
    node.deploy(spec)
    with node.client() as client:
        first = client.responses.create(
            model="smollm2", input=QUESTION, max_output_tokens=20, temperature=0
        )
        assert "Paris" in first.output_text
        assert first.output_text == node.ask(QUESTION, max_tokens=20)

        with client.responses.stream(
            model="smollm2", input=QUESTION, max_output_tokens=20, temperature=0
        ) as stream:
            deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        assert "".join(deltas) == first.output_text

        second = client.responses.create(
            model="smollm2",
            input="And of Italy?",
            previous_response_id=first.id,
            max_output_tokens=20,
            temperature=0,
        )
        assert second.usage is not None
        assert first.usage is not None
        assert second.usage.input_tokens > first.usage.input_tokens
        assert second.usage.input_tokens_details.cached_tokens > 0
        same = client.chat.completions.create(
            model="smollm2",
            messages=[
                {"role": "user", "content": QUESTION},
                {"role": "assistant", "content": first.output_text},
                {"role": "user", "content": "And of Italy?"},
            ],
            max_tokens=20,
            temperature=0,
        )
        assert second.output_text == same.choices[0].message.content

        parsed = client.responses.parse(
            model="smollm2", input="Describe Paris.", text_format=City, max_output_tokens=64
        )
        assert parsed.output_parsed is not None

        tool = openai.pydantic_function_tool(City, name="note")["function"]
        called = client.responses.create(
            model="smollm2",
            input="Note that Paris is the capital.",
            tools=[
                {
                    "type": "function",
                    "name": "note",
                    "parameters": tool["parameters"],
                    "strict": True,
                }
            ],
            tool_choice="required",
            parallel_tool_calls=False,
            max_output_tokens=96,
        )
        call = called.output[0]
        assert call.type == "function_call"
        assert called.status == "completed"
        City.model_validate_json(call.arguments)

    node.terminate()
    node.start()
    async with openai.AsyncOpenAI(base_url=f"{node.url}/v1", api_key="unused") as later:
        kept = await later.responses.retrieve(second.id)
        assert kept.output_text == second.output_text
        items = await later.responses.input_items.list(second.id, order="asc")
        assert len(items.data) == 3
        await later.responses.delete(second.id)
        with pytest.raises(openai.NotFoundError):
            await later.responses.retrieve(second.id)


async def test_background_response_survives_its_controller(node: Node, spec: FunctionSpec) -> None:
    node.deploy(spec)
    with node.client() as client:
        accepted = client.responses.create(
            model="smollm2", input=QUESTION, max_output_tokens=20, temperature=0, background=True
        )
        assert accepted.status == "queued"
    node.kill()
    node.start()
    with node.client() as client:

        def over() -> Response | None:
            found = client.responses.retrieve(accepted.id)
            return found if found.status not in ("queued", "in_progress") else None

        done = wait_for(over, "the response")
        assert (done.status, done.id, done.created_at) == (
            "completed", accepted.id, accepted.created_at,
        )  # fmt: skip
        assert "Paris" in done.output_text
        following = client.responses.create(
            model="smollm2", input="And of Italy?", previous_response_id=done.id,
            max_output_tokens=20,
        )  # fmt: skip
        assert following.previous_response_id == done.id


async def test_background_response_outlives_its_client_and_ends_when_it_is_cancelled(
    node: Node, spec: FunctionSpec
) -> None:
    node.deploy(spec)

    def num_sequences() -> float:
        return node.figures()["coldspark_engine_requests"]

    with node.client() as leaving:
        accepted = leaving.responses.create(
            model="smollm2",
            input="Count as far as you can.",
            max_output_tokens=1500,
            background=True,
            extra_body={"ignore_eos": True},
        )
    wait_for(lambda: num_sequences() == 1, "the sequence")
    with node.client() as client:
        assert client.responses.retrieve(accepted.id).status == "in_progress"
        with pytest.raises(openai.ConflictError):
            client.responses.delete(accepted.id)
        assert client.responses.cancel(accepted.id).status == "cancelled"
        wait_for(lambda: num_sequences() == 0, "the end of the sequence")
        assert client.responses.retrieve(accepted.id).status == "cancelled"
        assert client.responses.cancel(accepted.id).status == "cancelled", "again"
        with pytest.raises(openai.BadRequestError):
            client.responses.create(
                model="smollm2", input="Go on.", previous_response_id=accepted.id
            )
        client.responses.delete(accepted.id)
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(accepted.id)
