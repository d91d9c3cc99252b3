"""An asynchronous request as the API shows it and as a webhook carries it: plain JSON values."""

import json
from typing import Any

from controller.store.requests import StoredRequest


def request_view(request: StoredRequest) -> dict[str, Any]:
    """Return everything about a request but what was asked."""
    webhook = None
    if request.webhook_url is not None:
        webhook = {
            "url": request.webhook_url,
            "status": request.webhook_status,
            "attempts": request.webhook_attempts,
            "last_error": request.webhook_error,
        }
    return {
        "id": request.id,
        "object": "async_request",
        "endpoint": request.endpoint,
        "model": request.model,
        "status": request.status,
        "created_at": request.created_us // 1_000_000,
        "expires_at": request.expires_us // 1_000_000,
        "ended_at": None if request.ended_us is None else request.ended_us // 1_000_000,
        "response": _answer(request),
        "webhook": webhook,
        "metadata": None if request.metadata_ is None else dict(request.metadata_),
    }


def _answer(request: StoredRequest) -> dict[str, Any] | None:
    if request.answer_status is None:
        return None
    answer = {"status_code": request.answer_status}
    # A list has no contents.
    return answer if request.answer is None else answer | {"body": json.loads(request.answer)}
