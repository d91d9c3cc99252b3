import httpx
import jsonschema
from prometheus_client.parser import text_string_to_metric_families

from tests.controller.gateway.conftest import AppMaker, client_of
from tests.fakes.function import FakeFunction

READINESS = ("/readyz", "/health", "/ping")
HELLO = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}


async def test_every_served_name_is_listed_with_its_function(
    make_app: AppMaker, function: FakeFunction
) -> None:
    function.served_names = ("tiny", "Org/Tiny-1B")
    function.tier = "parked"
    async with client_of(make_app()) as client:
        listed = (await client.get("/v1/models")).json()
        one = (await client.get("/v1/models/Org/Tiny-1B")).json()
    assert listed["object"] == "list"
    assert [model["id"] for model in listed["data"]] == ["tiny", "Org/Tiny-1B"]
    assert one.pop("sampling_defaults")["temperature"] == 1.0
    assert listed["data"][1].pop("sampling_defaults") is None
    assert one == listed["data"][1]
    assert one == {
        "id": "Org/Tiny-1B",
        "object": "model",
        "created": 1_700_000_000,
        "owned_by": "coldspark",
        "root": "nowhere",
        "parent": None,
        "permission": [],
        "max_model_len": 256,
        "function": "tiny",
        "tier": "parked",
        "task": "generate",
        "embedding_size": None,
        "limits": {"max_concurrency": 256, "max_replicas": 2, "max_queued_requests": 1000},
    }


async def test_unknown_model_is_404(client: httpx.AsyncClient) -> None:
    response = await client.get("/v1/models/other")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"


async def test_readiness_follows_the_controller_and_health_does_not(make_app: AppMaker) -> None:
    async with client_of(make_app(is_ready=False)) as client:
        assert (await client.get("/healthz")).json() == {"status": "ok"}
        for path in READINESS:
            response = await client.get(path)
            assert response.status_code == 503
            assert response.json() == {"status": "not ready"}
    async with client_of(make_app()) as client:
        assert [(await client.get(path)).status_code for path in READINESS] == [200] * 3


async def test_figures_count_calls_and_times(
    client: httpx.AsyncClient, answer_tokens: list[int]
) -> None:
    await client.post("/v1/chat/completions", json=HELLO)
    await client.post("/v1/chat/completions", json={**HELLO, "n": 0})
    response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    found = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
        if not sample.name.endswith(("_bucket", "_created"))
    }
    assert found["coldspark_requests_total", "200", "false", "tiny"] == 1
    assert found["coldspark_requests_total", "", "400", "false"] == 1
    assert found["coldspark_inter_token_seconds_count", "tiny"] == len(answer_tokens)
    assert found["coldspark_request_duration_seconds_count", "tiny"] == 1
    assert not any(name.startswith("coldspark_client_disconnects_total") for name, *_ in found)


async def test_unknown_model_name_never_becomes_a_label(client: httpx.AsyncClient) -> None:
    await client.post("/v1/chat/completions", json={**HELLO, "model": "made-up"})
    assert "made-up" not in (await client.get("/metrics")).text


async def test_document_describes_bodies_answers_and_errors(client: httpx.AsyncClient) -> None:
    document = (await client.get("/openapi.json")).json()
    schemas = document["components"]["schemas"]
    for path, body in (
        ("/v1/chat/completions", "ChatCompletionRequest"),
        ("/v1/completions", "CompletionRequest"),
    ):
        operation = document["paths"][path]["post"]
        content = operation["requestBody"]["content"]["application/json"]["schema"]
        assert content == {"$ref": f"#/components/schemas/{body}"}
        answers = operation["responses"]
        assert set(answers["200"]["content"]) == {"application/json", "text/event-stream"}
        event = answers["200"]["content"]["text/event-stream"]["schema"]
        jsonschema.validate({"event": "response.created", "data": "{}"}, event)
        jsonschema.validate({"data": "[DONE]"}, event)
        assert "422" not in answers
        for status in ("400", "401", "404", "408", "413", "429", "502", "503", "504", "default"):
            schema = answers[status]["content"]["application/json"]["schema"]
            assert schema == {"$ref": "#/components/schemas/ErrorBody"}
        fields = schemas[body]
        assert fields["additionalProperties"] is False
        assert fields["properties"]["use_beam_search"]["enum"] == [None, False]
        assert fields["properties"]["user"] == {"description": "Accepted and ignored."}
        assert "HTTPValidationError" not in schemas
