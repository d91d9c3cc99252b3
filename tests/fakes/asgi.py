"""A client that sees every message of an ASGI call as it happens, and can leave at any time."""

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.types import ASGIApp, Message


class AsgiCall:
    """One HTTP call against an application, driven by the test.

    Args:
        app: The application.
        body: The request body's pieces; more can be sent with `send_piece`.
        is_complete: Whether the pieces are the whole body.
    """

    def __init__(
        self,
        app: ASGIApp,
        path: str,
        body: Sequence[bytes] = (b"",),
        *,
        method: str = "POST",
        headers: Mapping[str, str] | None = None,
        is_complete: bool = True,
    ) -> None:
        sent_headers = {"content-type": "application/json", **(headers or {})}
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "scheme": "http",
            "headers": [(key.encode(), value.encode()) for key, value in sent_headers.items()],
            "client": ("127.0.0.1", 50_000),
            "server": ("127.0.0.1", 8000),
        }
        self.messages: list[Message] = []
        self.num_received = 0
        self.hold_sends = asyncio.Event()
        self.hold_sends.set()
        self._inbox: asyncio.Queue[Message] = asyncio.Queue()
        self._changed = asyncio.Condition()
        for number, piece in enumerate(body, start=1):
            self.send_piece(piece, is_last=is_complete and number == len(body))
        self.task = asyncio.ensure_future(self._run(app, scope))

    def send_piece(self, piece: bytes, *, is_last: bool) -> None:
        """Send a piece of the body."""
        self._inbox.put_nowait({"type": "http.request", "body": piece, "more_body": not is_last})

    def leave(self) -> None:
        """Close the connection."""
        self._inbox.put_nowait({"type": "http.disconnect"})

    def break_connection(self) -> None:
        """Make the server's next read fail."""
        self._inbox.put_nowait({"type": "broken"})

    async def seen(self, text: str) -> str:
        """Wait until the body contains a text; return the body so far."""
        await self._until(lambda: text in self.text)
        return self.text

    async def finished(self) -> str:
        """Wait for the end of the call; return the whole body."""
        await self.task
        return self.text

    @property
    def status(self) -> int:
        """The response's status."""
        status: int = self.messages[0]["status"]
        return status

    @property
    def headers(self) -> dict[str, str]:
        """The response's headers."""
        return {key.decode(): value.decode() for key, value in self.messages[0]["headers"]}

    @property
    def text(self) -> str:
        """The body received so far."""
        return b"".join(message.get("body", b"") for message in self.messages[1:]).decode()

    async def _run(self, app: ASGIApp, scope: dict[str, Any]) -> None:
        await app(scope, self._receive, self._send)

    async def _receive(self) -> Message:
        message = await self._inbox.get()
        self.num_received += 1
        if message["type"] == "broken":
            raise ConnectionResetError
        return message

    async def _send(self, message: Message) -> None:
        await self.hold_sends.wait()
        async with self._changed:
            self.messages.append(message)
            self._changed.notify_all()

    async def _until(self, condition: Any) -> None:
        async def changed() -> None:
            async with self._changed:
                await self._changed.wait_for(condition)

        waiting = asyncio.ensure_future(changed())
        done, _ = await asyncio.wait(
            {waiting, self.task}, return_when=asyncio.FIRST_COMPLETED, timeout=10
        )
        if waiting not in done:
            waiting.cancel()
            assert condition(), f"the call ended with {self.messages}"


def events(text: str) -> list[Any]:
    """Return the data of server-sent events, parsed; `[DONE]` stays text."""
    found = []
    for block in text.split("\n\n"):
        if block.startswith("data: "):
            data = block.removeprefix("data: ")
            found.append(data if data == "[DONE]" else json.loads(data))
    return found
