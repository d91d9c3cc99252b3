"""`python -m snapshots` as controller, operator and scripts see it; hub sources included."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from snapshots import errors
from snapshots.exit_codes import EXIT_CODES, ExitCode, exit_code_of
from snapshots.store import SnapshotStore
from tests.checkpoints import TinyLlama, write_tiny_llama
from tests.snapshots.hub_server import COMMIT, TOKEN, FakeHub, serve


class Result:
    """What a command has printed and ended with."""

    def __init__(self, finished: subprocess.CompletedProcess[str]) -> None:
        self.code = finished.returncode
        self.stdout = finished.stdout
        self.stderr = finished.stderr

    @property
    def json(self) -> Any:
        return json.loads(self.stdout)

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.stdout.splitlines()]


def run(*arguments: object, environment: dict[str, str] | None = None) -> Result:
    command = [sys.executable, "-m", "snapshots", *map(str, arguments)]
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    return Result(
        subprocess.run(command, capture_output=True, text=True, env=inherited | (environment or {}))
    )


def test_one_snapshot_from_build_to_collection(tiny_llama: Path, store: SnapshotStore) -> None:
    where = ("--store", store.root)
    built = run("build", tiny_llama, *where, "--tp", 1, "--tp", 2, "--progress", "json")
    assert built.code == ExitCode.OK, built.stderr
    *progress, last = built.events
    assert {event["phase"] for event in progress} == {"convert", "checksum"}
    assert all(event["event"] == "progress" for event in progress)
    assert progress[-1]["done_bytes"] == progress[-1]["total_bytes"] > 0
    ref = last["snapshot"]
    assert last == {
        "event": "built",
        "snapshot": ref,
        "path": str(store.root / ref),
        "reused": False,
    }
    again = run("build", tiny_llama, *where, "-o", "json", "--progress", "none")
    assert again.json == {"snapshot": ref, "path": str(store.root / ref), "reused": True}

    facts = run("inspect", "tiny-llama", *where, "--tensors", "-o", "json").json
    assert facts["ref"] == ref
    assert facts["tensor_parallel_sizes"] == [1, 2]
    assert facts["tensors"]["norm.weight"]["dtype"] == "F32"
    assert "tp2/rank1.safetensors" in run("inspect", ref, *where).stdout

    assert run("pin", ref, *where, "--owner", "me").code == ExitCode.OK
    (row,) = run("list", *where, "-o", "json").json["snapshots"]
    assert (row["snapshot"], row["pins"]) == (ref, ["me"])
    assert ref in run("list", *where).stdout
    assert run("gc", *where, "-o", "json").json["removed"] == []
    assert run("unpin", ref, *where, "--owner", "me").code == ExitCode.OK
    dry = run("gc", *where, "--dry-run", "-o", "json").json
    assert [entry["ref"] for entry in dry["removed"]] == [ref]
    assert ref in run("gc", *where).stdout
    assert store.list() == []


def test_verify_names_the_tensor_and_fails(tiny_llama: Path, store: SnapshotStore) -> None:
    where = ("--store", store.root, "--progress", "none")
    assert run("build", tiny_llama, *where).code == ExitCode.OK
    sound = run("verify", "tiny-llama", *where)
    assert (sound.code, "verified" in sound.stdout) == (ExitCode.OK, True)
    path = store.list()[0].path / "tp1/rank0.safetensors"
    content = bytearray(path.read_bytes())
    content[8192] ^= 1
    path.write_bytes(content)
    damaged = run("verify", "tiny-llama", *where, "-o", "json")
    assert damaged.code == ExitCode.CORRUPTED
    (problem,) = damaged.json["problems"]
    assert problem["path"] == str(path)
    assert (problem["chunk"], problem["tensors"]) == (0, ["embed_tokens.weight"])
    assert "embed_tokens.weight" in damaged.stderr

    run("pin", "tiny-llama", *where[:2])
    taken = run("verify", "tiny-llama", *where, "--quarantine")
    assert taken.code == ExitCode.CORRUPTED
    assert ".quarantine" in taken.stderr
    assert "quarantined: tiny-llama" in run("list", *where[:2]).stderr
    assert store.list() == []
    assert run("build", tiny_llama, *where).code == ExitCode.OK
    assert run("verify", "tiny-llama", *where, "--quarantine").code == ExitCode.OK


def test_failure_is_told_to_people_and_programs(tmp_path: Path, store: SnapshotStore) -> None:
    result = run("build", tmp_path / "none", "--store", store.root, "--progress", "json")
    assert result.code == ExitCode.NOT_FOUND
    (event,) = result.events
    assert (event["event"], event["type"]) == ("error", "SourceNotFound")
    assert "none" in event["message"]
    assert event["hint"]
    assert f"error: {event['message']}\nhint: {event['hint']}\n" == result.stderr


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("list",), ExitCode.USAGE),  # no store
        (("inspect", "none", "--store", "s"), ExitCode.NOT_FOUND),
        (("verify", "../x", "--store", "s"), ExitCode.NOT_FOUND),
        (("build", ".", "--store", "s", "--tp", "0"), ExitCode.USAGE),
        (("build", ".", "--store", "s", "--dtype", "int4"), ExitCode.USAGE),
        (("build", "./x", "--store", "s", "--revision", "main"), ExitCode.FAILURE),
    ],
)
def test_mistakes_have_exit_codes(
    arguments: tuple[str, ...], code: ExitCode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path.cwd()))
    monkeypatch.chdir(tmp_path)
    assert run(*arguments).code == code


def test_help_lists_every_exit_code() -> None:
    text = " ".join(run("build", "--help").stdout.split())
    for code, meaning in EXIT_CODES.items():
        assert f"{code.value} {meaning}" in text


def test_every_error_has_an_exit_code() -> None:
    leaves = list(_leaves(errors.SnapshotError))
    assert len(leaves) == 13
    for leaf in leaves:
        if leaf is errors.SnapshotCorrupted:
            error: errors.SnapshotError = errors.SnapshotCorrupted(Path("x"), "bad")
        else:
            error = leaf("message")
        assert exit_code_of(error) in EXIT_CODES


def _leaves(kind: type[errors.SnapshotError]) -> Iterator[type[errors.SnapshotError]]:
    children = kind.__subclasses__()
    if not children:
        yield kind
    for child in children:
        yield from _leaves(child)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    write_tiny_llama(tmp_path / "model", TinyLlama(is_sharded=True))
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(b"never fetched")
    with serve(FakeHub(directory=tmp_path / "model")) as hub:
        yield hub


def build_from(hub: FakeHub, source: str, store: SnapshotStore, *more: str, **env: str) -> Result:
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(store.root.parent / "hf")} | env
    command = ("build", source, "--store", store.root, "--progress", "json", *more)
    return run(*command, environment=environment)


def test_hub_model_is_downloaded_once_and_found_without_a_network(
    hub: FakeHub, store: SnapshotStore
) -> None:
    built = build_from(hub, "org/tiny", store)
    assert built.code == ExitCode.OK, built.stderr
    download = [event for event in built.events if event.get("phase") == "download"]
    assert download[-1]["done_bytes"] == download[-1]["total_bytes"] > 100_000
    assert not [path for path in hub.paths if path.endswith(".bin")]
    source = store.list()[0].manifest.source
    assert (source.location, source.revision, source.requested_revision) == ("org/tiny", COMMIT, "")

    hub.paths.clear()
    again = build_from(hub, "org/tiny", store)
    assert again.events == [built.events[-1] | {"reused": True}]
    assert [path for path in hub.paths if "org/tiny" in path] == ["/api/models/org/tiny"]
    offline = build_from(hub, "org/tiny", store, HF_HUB_OFFLINE="1")
    assert offline.events == again.events

    def find(revision: str | None) -> bool:
        found = store.find(
            location="org/tiny", revision=revision, dtype="auto", tensor_parallel_size=1
        )
        return found is not None

    assert [find(revision) for revision in (None, "main", COMMIT, "v2")] == [
        True,
        True,
        True,
        False,
    ]


def test_gated_model_asks_for_a_token_and_takes_it(hub: FakeHub, store: SnapshotStore) -> None:
    hub.is_gated = True
    refused = build_from(hub, "org/tiny", store)
    assert refused.code == ExitCode.UNAUTHORIZED
    assert refused.events[-1]["type"] == "SourceGated"
    assert "HF_TOKEN" in refused.events[-1]["hint"]
    allowed = build_from(hub, "org/tiny", store, HF_TOKEN=TOKEN)
    assert allowed.code == ExitCode.OK, allowed.stderr
    assert TOKEN not in allowed.stdout + allowed.stderr


@pytest.mark.parametrize(
    ("source", "environment", "kind", "code"),
    [
        ("org/none", {}, "SourceNotFound", ExitCode.NOT_FOUND),
        ("org/tiny@v9", {}, "SourceNotFound", ExitCode.NOT_FOUND),
        ("org/tiny", {"HF_HUB_OFFLINE": "1"}, "SourceUnreachable", ExitCode.TRY_LATER),
        (
            "org/tiny",
            {"HF_ENDPOINT": "http://127.0.0.1:9"},
            "SourceUnreachable",
            ExitCode.TRY_LATER,
        ),
    ],
)
def test_hub_failures_say_what_is_wrong(
    source: str,
    environment: dict[str, str],
    kind: str,
    code: ExitCode,
    hub: FakeHub,
    store: SnapshotStore,
) -> None:
    result = build_from(hub, source, store, **environment)
    assert result.code == code, result.stderr
    assert result.events[-1]["type"] == kind
    assert result.events[-1]["hint"] or "v9" in result.events[-1]["message"]


def test_hub_model_that_cannot_be_served_is_refused_before_it_is_fetched(
    hub: FakeHub, store: SnapshotStore
) -> None:
    path = hub.directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_act": "gelu"}))
    result = build_from(hub, "org/tiny", store)
    assert result.events[-1]["type"] == "SourceUnsupported"
    assert "gelu" in result.events[-1]["message"]
    assert not [path for path in hub.paths if path.endswith(".safetensors")]


def test_hub_pickles_are_refused_before_they_are_fetched(
    hub: FakeHub, store: SnapshotStore
) -> None:
    for path in hub.directory.glob("*.safetensors*"):
        path.unlink()
    result = build_from(hub, "org/tiny", store)
    assert (result.code, result.events[-1]["type"]) == (ExitCode.FAILURE, "PickleRefused")
    assert not [path for path in hub.paths if "/resolve/" in path]
