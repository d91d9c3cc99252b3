"""A hub on the loopback interface: one repository, served as the real one serves it."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

COMMIT = "c0ffee" + "0" * 34
TOKEN = "hf_secret"  # of the fake


@dataclass
class FakeHub:
    """What the hub serves, and what it was asked for."""

    directory: Path
    repository: str = "org/tiny"
    is_gated: bool = False
    paths: list[str] = field(default_factory=list)
    url: str = ""


@contextmanager
def serve(hub: FakeHub) -> Iterator[FakeHub]:
    """Serve until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(with_body=True)

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def log_message(self, *arguments: object) -> None:
            pass

        def _answer(self, *, with_body: bool) -> None:
            path = urlsplit(self.path).path
            hub.paths.append(path)
            status, headers, body = _response(hub, path, self.headers.get("Authorization"))
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if with_body:
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, name="fake hub")
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _response(
    hub: FakeHub, path: str, authorization: str | None
) -> tuple[int, dict[str, str], bytes]:
    path = path.replace("/resolve/main/", f"/resolve/{COMMIT}/")
    api, files = f"/api/models/{hub.repository}", f"/{hub.repository}/resolve/{COMMIT}/"
    if not path.startswith((api, files)):
        return HTTPStatus.NOT_FOUND, {"X-Error-Code": "RepoNotFound"}, b"{}"
    if hub.is_gated and authorization != f"Bearer {TOKEN}":
        return HTTPStatus.FORBIDDEN, {"X-Error-Code": "GatedRepo"}, b"{}"
    if path in (api, f"{api}/revision/main", f"{api}/revision/{COMMIT}"):
        return HTTPStatus.OK, {}, json.dumps(_listing(hub)).encode()
    file = hub.directory / path.removeprefix(files)
    if path.startswith(files) and file.is_file():
        content = file.read_bytes()
        etag = hashlib.sha256(content).hexdigest()
        return HTTPStatus.OK, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}, content
    code = "RevisionNotFound" if "/revision/" in path else "EntryNotFound"
    return HTTPStatus.NOT_FOUND, {"X-Error-Code": code}, b"{}"


def _listing(hub: FakeHub) -> dict[str, object]:
    files = [
        {"rfilename": path.name, "size": path.stat().st_size}
        for path in sorted(hub.directory.iterdir())
    ]
    return {"id": hub.repository, "sha": COMMIT, "siblings": files}
