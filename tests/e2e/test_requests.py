"""A request that is accepted, a controller that dies, an answer that comes all the same."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import openai
import pytest

from functions.spec import FunctionSpec
from tests.e2e.conftest import Node, wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.model, pytest.mark.timeout(180)]


class Receiver(ThreadingHTTPServer):
    """Keeps the webhooks it gets."""

    def __init__(self) -> None:
        self.messages: list[tuple[dict[str, str], bytes]] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                receiver.messages.append((dict(self.headers.items()), body))
                self.send_response(204)
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/answers/"


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as server:
        thread = threading.Thread(target=server.serve_forever, name="receiver")
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_accepted_request_survives_the_controllers_death(
    node: Node, spec: FunctionSpec, receiver: Receiver
) -> None:
    webhooks = {"allow": [receiver.url], "allow_private_addresses": True}
    node.deploy(FunctionSpec.model_validate(spec.model_dump() | {"webhooks": webhooks}))
    body = {
        "model": "smollm2",
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "max_tokens": 20,
        "temperature": 0,
    }
    asked = {"endpoint": "/v1/chat/completions", "body": body}
    refused = httpx.post(
        f"{node.url}/v1/requests", json=asked | {"webhook_url": "http://127.0.0.1:9/"}
    )
    assert refused.status_code == 400, refused.text
    accepted = httpx.post(
        f"{node.url}/v1/requests", json=asked | {"webhook_url": f"{receiver.url}17"}
    )
    assert accepted.status_code == 202, accepted.text
    node.kill()  # while the function is being started for it
    node.start()
    path = f"/v1/requests/{accepted.json()['id']}"
    done = wait_for(
        lambda: (one := node.get(path))["status"] != "in_progress" and one, "the answer", 90
    )
    choice = done["response"]["body"]["choices"][0]
    assert choice["message"]["content"] == "The capital of France is Paris."
    wait_for(lambda: node.get(path)["webhook"]["status"] == "delivered", "the webhook")
    (headers, message) = receiver.messages[0]
    secret = node.get("/v1/webhook_secret")["secret"]
    with node.client() as client:
        client.webhooks.verify_signature(message, headers, secret=secret)
        with pytest.raises(openai.InvalidWebhookSignatureError):
            client.webhooks.verify_signature(message + b" ", headers, secret=secret)
    assert json.loads(message)["data"]["response"] == done["response"]
