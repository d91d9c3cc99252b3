"""Webhooks as Standard Webhooks has them: what is signed, with which key, and when to try again.

https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md
"""

import base64
import hashlib
import hmac
import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

SECRET_PREFIX = "whsec_"
RETRY_AFTER_S = (5.0, 300.0, 1800.0, 7200.0, 18_000.0, 36_000.0, 50_400.0)
"""Waits between attempts; after the last one the delivery has failed."""


def secret_of(node_secret: bytes, key_id: str | None) -> str:
    """Return the secret that a key's webhooks are signed with, in the form libraries take."""
    derived = hmac.digest(node_secret, b"webhook\0" + (key_id or "").encode(), hashlib.sha256)
    return SECRET_PREFIX + base64.b64encode(derived).decode()


def headers_of(secret: str, message_id: str, moment: datetime, body: bytes) -> dict[str, str]:
    """Return the headers that identify and sign one attempt."""
    timestamp = str(int(moment.timestamp()))
    key = base64.b64decode(secret.removeprefix(SECRET_PREFIX))
    signed = f"{message_id}.{timestamp}.".encode() + body
    signature = base64.b64encode(hmac.digest(key, signed, hashlib.sha256)).decode()
    return {
        "webhook-id": message_id,
        "webhook-timestamp": timestamp,
        "webhook-signature": f"v1,{signature}",
    }


def payload(kind: str, moment: datetime, data: Mapping[str, Any]) -> bytes:
    """Return the body; the same facts always give the same bytes."""
    content = {"type": kind, "timestamp": moment.isoformat(), "data": data}
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()


def next_attempt_s(num_attempts: int) -> float | None:
    """Return how long to wait after some failed attempts; None when there is no other."""
    if num_attempts > len(RETRY_AFTER_S):
        return None
    return RETRY_AFTER_S[num_attempts - 1]
