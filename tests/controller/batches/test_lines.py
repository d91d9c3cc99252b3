import json
from pathlib import Path
from typing import Any

import pytest

from controller.batches.lines import MAX_ERRORS, read_input

CHAT = "/v1/chat/completions"


def request(custom_id: object = "a", **changes: Any) -> dict[str, Any]:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Zürich"}]}
    return {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": body} | changes


def write(path: Path, *lines: object) -> Path:
    texts = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.write_bytes(b"\n".join(texts))
    return path


def test_bodies_are_found_again_by_their_place(tmp_path: Path) -> None:
    lines = [request(f"id-{n}", body={"model": "tiny", "n": n, "t": "é" * n}) for n in range(50)]
    path = write(tmp_path / "in", *lines[:20], b"", b"   ", *lines[20:])
    found, errors = read_input(path, CHAT, max_line_bytes=1 << 20)
    assert errors == []
    assert found.model == "tiny"
    assert found.custom_ids == [f"id-{n}" for n in range(50)]
    for n in (0, 19, 20, 49):
        assert json.loads(found.body(n)) == lines[n]["body"]


@pytest.mark.parametrize(
    ("line", "code", "param"),
    [
        (b"{", "invalid_json_line", None),
        (b'"text"', "invalid_json_line", None),
        (b"\xff\xfe", "invalid_json_line", None),
        (b"[" * 100_000, "invalid_json_line", None),
        (request(None), "invalid_custom_id", "custom_id"),
        (request(""), "invalid_custom_id", "custom_id"),
        (request("x" * 513), "invalid_custom_id", "custom_id"),
        (request(method="GET"), "invalid_method", "method"),
        (request(url="/v1/completions"), "invalid_url", "url"),
        (request(url="http://169.254.169.254/"), "invalid_url", "url"),
        (request(body="text"), "invalid_body", "body"),
        (request(body={}), "missing_model", "body.model"),
        (request(body={"model": "tiny", "stream": True}), "invalid_body", "body.stream"),
        (request(body={"model": "tiny", "background": True}), "invalid_body", "body.background"),
        (request("first"), "duplicate_custom_id", "custom_id"),
        (request(body={"model": "other"}), "mismatched_model", "body.model"),
        (b"x" * 300_000, "line_too_long", None),
    ],
)
def test_wrong_line_is_named(tmp_path: Path, line: object, code: str, param: str | None) -> None:
    path = write(tmp_path / "in", request("first"), b"", line, request("last"))
    found, (error,) = read_input(path, CHAT, max_line_bytes=200_000)
    assert (error.code, error.line, error.param) == (code, 3, param)
    assert found.custom_ids == ["first", "last"]


def test_empty_input_is_an_error(tmp_path: Path) -> None:
    _, (error,) = read_input(write(tmp_path / "in", b"\n\n"), CHAT, max_line_bytes=99)
    assert error.code == "empty_file"


def test_input_that_is_gone_is_an_error(tmp_path: Path) -> None:
    _, (error,) = read_input(tmp_path / "nothing", CHAT, max_line_bytes=99)
    assert error.code == "file_gone"


def test_not_all_of_many_errors_are_told(tmp_path: Path) -> None:
    path = write(tmp_path / "in", *[b"x"] * 500)
    _, errors = read_input(path, CHAT, max_line_bytes=99)
    assert [error.line for error in errors] == list(range(1, MAX_ERRORS + 1))


def test_too_many_requests_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("controller.batches.lines.MAX_REQUESTS", 10)
    template = json.dumps(request("<>", body={"model": "m"}))
    lines = [template.replace("<>", str(n)).encode() for n in range(11)]
    _, (error,) = read_input(write(tmp_path / "in", *lines), CHAT, max_line_bytes=999)
    assert error.code == "too_many_requests"
