"""API keys: who may call. Keys exist here only as hashes.

Pure ASGI, in front of everything that reads a body.
"""

import base64
import hashlib
import secrets
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from controller.clock import Clock
from controller.errors import ApiError, Unauthorized
from controller.gateway.failures import error_response

PUBLIC_PATHS = frozenset({"/healthz", "/readyz", "/health", "/ping"})


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """A key as it is stored.

    Attributes:
        key_hash: Lower-case hexadecimal SHA-256 of the key.
        expires_at: Aware; None never expires.
    """

    id: str
    name: str
    key_hash: str
    expires_at: datetime | None = None
    is_revoked: bool = False


class KeyStore(Protocol):
    """Where keys are kept."""

    async def find(self, key_hash: str) -> ApiKey | None:
        """Return the key with this hash, also an expired or revoked one."""


class ApiKeys:
    """Middleware that lets calls with a good key through and leaves its id in the state."""

    def __init__(self, app: ASGIApp, *, key_store: KeyStore, clock: Clock) -> None:
        self._app = app
        self._key_store = key_store
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 401, or pass the call on."""
        if scope["type"] == "http" and scope["path"] not in PUBLIC_PATHS:
            try:
                scope["state"]["key_id"] = await self._check(Headers(scope=scope))
            except ApiError as error:
                await error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    async def _check(self, headers: Headers) -> str:
        secret = _secret(headers.get("authorization", ""))
        if not secret:
            raise Unauthorized("no API key; send it as 'Authorization: Bearer sk-…'")
        key_hash = hash_key(secret)
        key = await self._key_store.find(key_hash)
        if key is None or not secrets.compare_digest(key.key_hash, key_hash):
            raise Unauthorized("this API key is not known; ask the operator for one")
        if key.is_revoked:
            raise Unauthorized(f"the API key {key.name!r} was revoked; ask for a new one")
        if key.expires_at is not None and key.expires_at <= self._clock.now():
            raise Unauthorized(
                f"the API key {key.name!r} expired at {key.expires_at.isoformat()}; ask for a new one"
            )
        return key.id


def _secret(authorization: str) -> str:
    """Return the key of a bearer header, or of a browser's login with the key as its password."""
    scheme, _, credentials = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return credentials.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(credentials, validate=True).decode().partition(":")[2]
        except ValueError:
            return ""
    return ""


def hash_key(secret: str) -> str:
    """Return the hash a key is stored and looked up under."""
    return hashlib.sha256(secret.encode()).hexdigest()
