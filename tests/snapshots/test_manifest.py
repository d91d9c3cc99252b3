"""Manifests: stable digests, strict reading."""

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from snapshots.errors import InvalidName, ManifestError
from snapshots.manifest import (
    CHUNK_BYTES,
    FORMAT_VERSION,
    Chunk,
    Manifest,
    PlainFile,
    RankFile,
    Source,
    SourceKind,
    check_name,
)

SHA = "0" * 64


def manifest(name: str = "tiny") -> Manifest:
    return Manifest(
        format_version=FORMAT_VERSION,
        name=name,
        source=Source(
            kind=SourceKind.HUB,
            location="org/tiny",
            requested_revision="main",
            revision="c0ffee",
            fingerprint="f",
            dtype="bfloat16",
        ),
        architecture="llama",
        dtype="bfloat16",
        tensor_parallel_sizes=(1,),
        ranks=(
            RankFile(
                path="tp1/rank0.safetensors",
                size_bytes=4096 + CHUNK_BYTES + 4096,
                data_offset=4096,
                header_sha256=SHA,
                chunks=(Chunk(sha256=SHA, i64sum=-5), Chunk(sha256=SHA, i64sum=7)),
                crc32s=(1, 2),
            ),
        ),
        files=(PlainFile(path="config.json", size_bytes=2, sha256=SHA),),
    )


def test_reading_gives_back_what_was_written() -> None:
    assert Manifest.from_json(manifest().to_json()) == manifest()
    assert Manifest.from_json(manifest().to_json()).digest == manifest().digest


def test_digest_depends_on_content_alone() -> None:
    assert manifest().digest == manifest().digest
    assert manifest().digest != manifest("other").digest
    assert manifest().ref == f"tiny@{manifest().digest[:12]}"


Change = Callable[[dict[str, Any]], object]
CHANGES: list[tuple[Change, str]] = [
    (lambda m: m.pop("dtype"), "dtype"),
    (lambda m: m.update(extra=1), "extra"),
    (lambda m: m.update(format_version=2), "format version 2"),
    (lambda m: m.update(name="../evil"), "name"),
    (lambda m: m.update(name=3), "name in the manifest is int"),
    (lambda m: m.update(architecture=None), "architecture in the manifest is NoneType"),
    (lambda m: m["source"].update(kind="floppy"), "floppy"),
    (lambda m: m["source"].pop("location"), "location"),
    (lambda m: m.update(tensor_parallel_sizes=[]), "tensor_parallel_sizes"),
    (lambda m: m.update(tensor_parallel_sizes=[True]), "tensor_parallel_sizes"),
    (lambda m: m.update(tensor_parallel_sizes=[2]), "rank files"),
    (lambda m: m["ranks"][0].update(path="../../etc/passwd"), "rank files"),
    (lambda m: m["ranks"][0]["chunks"].pop(), "1 chunks"),
    (lambda m: m["ranks"][0].update(data_offset=1 << 40), "no room for its header"),
    (lambda m: m["ranks"][0]["chunks"][0].update(sha256="xyz"), "SHA-256"),
    (lambda m: m["ranks"][0]["chunks"][0].update(i64sum="7"), "i64sum"),
    (lambda m: m["ranks"][0].update(crc32s=["1"]), "crc32s"),
    (lambda m: m["ranks"].append(3), "keys"),
    (lambda m: m.update(ranks={}), "ranks in the manifest is dict"),
    (lambda m: m["files"][0].update(path="/etc/passwd"), "/etc/passwd"),
    (lambda m: m["files"][0].update(path="a/../b"), "a/../b"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_tampered_manifests_are_refused(change: Change, message: str) -> None:
    content = json.loads(manifest().to_json())
    change(content)
    with pytest.raises(ManifestError, match=message):
        Manifest.from_json(json.dumps(content))


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "[" * 100_000])
def test_texts_that_are_no_manifest_are_refused(text: str) -> None:
    with pytest.raises(ManifestError):
        Manifest.from_json(text)


def test_a_rank_that_was_not_built_is_named() -> None:
    with pytest.raises(ManifestError, match=r"no tp2/rank1\.safetensors"):
        manifest().rank_file(2, 1)


@pytest.mark.parametrize("name", ["", ".", "..", "../etc", "a/b", ".hidden", "a" * 97, "a\n", "é"])
def test_names_that_could_leave_the_store_are_refused(name: str) -> None:
    with pytest.raises(InvalidName):
        check_name(name)


def test_manifest_and_store_need_only_the_standard_library() -> None:
    code = (
        "import sys; import snapshots.manifest, snapshots.store; "
        "found = {name.partition('.')[0] for name in sys.modules} - set(sys.stdlib_module_names); "
        "sys.exit(str(found - {'snapshots', '__main__', 'sitecustomize'}) "
        "if found & {'torch', 'numpy', 'transformers', 'tokenizers', 'typer', 'rich'} else 0)"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
