"""A real HTTP server on a free port that answers from a script and remembers what it was asked."""

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """One answer; `is_cut` closes the connection where a chunked body should go on."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    is_cut: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One request as it arrived."""

    method: str
    target: str
    headers: Mapping[str, str]
    body: Any


def json_reply(value: object, *, status: int = 200, **headers: str) -> Reply:
    """Return a JSON answer."""
    return Reply(status=status, body=json.dumps(value).encode(), headers=headers)


def error_reply(status: int, message: str, **headers: str) -> Reply:
    """Return a refusal in OpenAI's envelope."""
    fields = {"message": message, "type": "server_error", "param": None, "code": None}
    return json_reply({"error": fields}, status=status, **headers)


@dataclass(slots=True)
class ScriptedServer:
    """Answers `METHOD target` with the next reply of its list; the last one stays."""

    url: str
    replies: dict[str, list[Reply]] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)

    def on(self, request: str, *replies: Reply) -> None:
        """Answer a request, such as `GET /api/v1/functions`, with these replies in turn."""
        self.replies[request] = list(replies)

    def reply_to(self, asked: Asked) -> Reply:
        """Remember a request and return its answer."""
        self.asked.append(asked)
        replies = self.replies.get(f"{asked.method} {asked.target}")
        if replies is None:
            return error_reply(404, f"the script has no {asked.method} {asked.target}")
        return replies.pop(0) if len(replies) > 1 else replies[0]


@contextmanager
def scripted_server() -> Iterator[ScriptedServer]:
    """Serve on a free port of the loopback until the end."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            length = int(self.headers.get("content-length", 0))
            body = self.rfile.read(length)
            asked = Asked(
                method=self.command,
                target=self.path,
                headers={name.lower(): value for name, value in self.headers.items()},
                body=json.loads(body) if body else None,
            )
            self._send(script.reply_to(asked))

        do_GET = do_PUT = do_POST = do_DELETE = _answer

        def _send(self, reply: Reply) -> None:
            self.send_response(reply.status)
            for name, value in reply.headers.items():
                self.send_header(name.replace("_", "-"), value)
            if reply.is_cut:
                self.send_header("transfer-encoding", "chunked")
                self.end_headers()
                self.wfile.write(b"%x\r\n%s\r\n" % (len(reply.body), reply.body))
                self.close_connection = True
                return
            self.send_header("content-length", str(len(reply.body)))
            self.end_headers()
            self.wfile.write(reply.body)

        def log_message(self, format: str, *args: object) -> None:
            """Keep quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    script = ScriptedServer(url=f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), name="scripted server")
    thread.start()
    try:
        yield script
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
