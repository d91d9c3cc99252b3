"""Builds: reused, resumed after a kill, run one at a time, and never half visible."""

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from snapshots import convert, staging
from snapshots.builder import BuildOptions, BuildReport, build
from snapshots.errors import (
    DiskFull,
    InvalidName,
    SourceInvalid,
    SourceUnsupported,
    TensorParallelUnsupported,
)
from snapshots.loader import load_rank, open_rank, views
from snapshots.progress import Phase, Progress
from snapshots.sources.directory import DirectorySource
from snapshots.sources.hub import HubSource, _Listing
from snapshots.store import SnapshotStore
from tests.checkpoints import TinyLlama, write_tiny_llama

BOTH = BuildOptions(tensor_parallel_sizes=(1, 2))

KILLED_BUILD = """
import os, signal, sys
from pathlib import Path
from snapshots.builder import BuildOptions, build
from snapshots.sources.directory import DirectorySource
from snapshots.staging import Stage
from snapshots.store import SnapshotStore

source, store, moment, count = sys.argv[1:]
record = Stage.record
seen = 0

def killing(self, group):
    global seen
    seen += 1
    if moment == "before" and seen > int(count):
        os.kill(os.getpid(), signal.SIGKILL)
    record(self, group)

def killed_by_progress(progress):
    if moment == progress.phase and progress.done_bytes >= int(count):
        os.kill(os.getpid(), signal.SIGKILL)

Stage.record = killing
build(
    DirectorySource(Path(source)),
    SnapshotStore(Path(store)),
    BuildOptions(tensor_parallel_sizes=(1, 2)),
    on_progress=killed_by_progress,
)
"""


def kill_a_build(source: Path, store: SnapshotStore, moment: str, count: int) -> None:
    command = [sys.executable, "-c", KILLED_BUILD, str(source), str(store.root), moment, str(count)]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=Path.cwd())
    assert finished.returncode == -signal.SIGKILL, finished.stderr


@pytest.mark.parametrize(
    ("moment", "count", "num_resumed"),
    [
        ("before", 0, 0),
        ("before", 3, 3),
        ("checksum", 1, 4),
    ],
)
def test_killed_build_shows_nothing_and_is_resumed(
    moment: str,
    count: int,
    num_resumed: int,
    tiny_llama: Path,
    store: SnapshotStore,
    tmp_path: Path,
) -> None:
    kill_a_build(tiny_llama, store, moment, count)
    assert store.list() == []
    assert store.broken() == []
    resumed = build(DirectorySource(tiny_llama), store, BOTH)
    assert resumed.num_resumed_groups == num_resumed
    at_once = build(DirectorySource(tiny_llama), SnapshotStore(tmp_path / "other"), BOTH)
    assert resumed.snapshot.ref == at_once.snapshot.ref
    assert not list((store.root / ".building").iterdir())


def test_resuming_does_not_trust_what_was_damaged_meanwhile(
    tiny_llama: Path, store: SnapshotStore, tmp_path: Path
) -> None:
    kill_a_build(tiny_llama, store, "before", 3)
    (path,) = store.root.glob(".building/*/content/tp1/rank0.safetensors")
    (journal,) = store.root.glob(".building/*/journal.jsonl")
    flip(path, path.stat().st_size // 2)
    with journal.open("a") as file:
        file.write('{"group": 3, "sha')
    resumed = build(DirectorySource(tiny_llama), store, BOTH)
    assert resumed.num_resumed_groups in (1, 2)
    at_once = build(DirectorySource(tiny_llama), SnapshotStore(tmp_path / "other"), BOTH)
    assert resumed.snapshot.ref == at_once.snapshot.ref


def test_stage_of_another_plan_is_thrown_away(
    tiny_llama: Path, store: SnapshotStore, tmp_path: Path
) -> None:
    kill_a_build(tiny_llama, store, "before", 3)
    (journal,) = store.root.glob(".building/*/journal.jsonl")
    lines = journal.read_text().splitlines()
    journal.write_text("\n".join([json.dumps({"plan": "another"}), *lines[1:]]) + "\n")
    assert build(DirectorySource(tiny_llama), store, BOTH).num_resumed_groups == 0


def test_build_of_the_same_source_is_reused(tiny_llama: Path, store: SnapshotStore) -> None:
    first = build(DirectorySource(tiny_llama), store, BOTH)
    assert not first.is_reused
    for options in (BOTH, BuildOptions(), BuildOptions(dtype="float32", name="tiny-llama")):
        again = build(DirectorySource(tiny_llama), store, options)
        assert again.is_reused
        assert again.snapshot.ref == first.snapshot.ref
    for options in (BuildOptions(dtype="bfloat16"), BuildOptions(name="other")):
        assert not build(DirectorySource(tiny_llama), store, options).is_reused


def test_changed_source_is_built_again(tmp_path: Path, store: SnapshotStore) -> None:
    write_tiny_llama(tmp_path / "model")
    first = build(DirectorySource(tmp_path / "model"), store)
    write_tiny_llama(tmp_path / "model", TinyLlama(seed=1))
    second = build(DirectorySource(tmp_path / "model"), store)
    assert not second.is_reused
    assert second.snapshot.ref != first.snapshot.ref


def test_source_that_changes_during_a_build_is_refused(
    tmp_path: Path, store: SnapshotStore
) -> None:
    write_tiny_llama(tmp_path / "model")

    def touch(progress: Progress) -> None:
        os.utime(tmp_path / "model" / "model.safetensors", ns=(1, 1))

    with pytest.raises(SourceInvalid, match="changed while it was built"):
        build(DirectorySource(tmp_path / "model"), store, on_progress=touch)
    assert store.list() == []


def test_concurrent_builds_of_one_source_do_the_work_once(
    tiny_llama: Path, store: SnapshotStore
) -> None:
    code = (
        "import sys; from pathlib import Path; from snapshots.builder import build; "
        "from snapshots.sources.directory import DirectorySource; "
        "from snapshots.store import SnapshotStore; sys.stdin.read(1); "
        "report = build(DirectorySource(Path(sys.argv[1])), SnapshotStore(Path(sys.argv[2]))); "
        "sys.stdout.write(f'{report.snapshot.ref} {report.is_reused}')"
    )
    command = [sys.executable, "-c", code, str(tiny_llama), str(store.root)]
    builds = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    for process in builds:
        assert process.stdin is not None
        process.stdin.write("!")
        process.stdin.flush()
    outputs = [process.communicate()[0].split() for process in builds]
    (snapshot,) = store.list()
    assert {ref for ref, _ in outputs} == {snapshot.ref}
    assert sorted(reused for _, reused in outputs) == ["False", "True", "True"]


@pytest.mark.parametrize("failing", ["allocate", "write"])
def test_full_disk_is_told_and_leaves_nothing(
    failing: str, tiny_llama: Path, store: SnapshotStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if failing == "allocate":
        monkeypatch.setattr(os, "posix_fallocate", full)
    else:
        monkeypatch.setattr(convert, "write_at", full)
    with pytest.raises(DiskFull, match="no room"):
        build(DirectorySource(tiny_llama), store)
    assert store.list() == []
    assert not list((store.root / ".building").iterdir())


def test_full_disk_of_the_source_is_not_the_stores(
    tiny_llama: Path, store: SnapshotStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", full)
    kill_a_build(tiny_llama, store, "before", 3)
    source = HubSource("org/tiny", None)
    source._listing = _Listing(commit="c0ffee", files={"config.json": 100})
    with pytest.raises(DiskFull, match="no room to download org/tiny") as caught:
        build(source, store)
    assert "HF_HOME" in caught.value.hint
    monkeypatch.setattr(DirectorySource, "open", full)
    with pytest.raises(OSError, match="No space left"):
        build(DirectorySource(tiny_llama), store, BOTH)
    assert len(list((store.root / ".building").iterdir())) == 1, "it can be resumed"


def test_other_failures_of_the_disk_pass_through(
    tiny_llama: Path, store: SnapshotStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(staging, "write_at", broken)
    with pytest.raises(OSError, match="Input/output"):
        build(DirectorySource(tiny_llama), store)
    assert store.list() == []


def test_large_tensors_are_converted_in_blocks(
    tiny_llama: Path, store: SnapshotStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = build(DirectorySource(tiny_llama), SnapshotStore(tmp_path / "whole"), BOTH)
    monkeypatch.setattr(convert, "BLOCK_BYTES", 7 * 64 * 4)
    blocks = build(DirectorySource(tiny_llama), store, BOTH)
    assert blocks.snapshot.ref == whole.snapshot.ref


def test_progress_is_monotonic_and_complete(tiny_llama: Path, store: SnapshotStore) -> None:
    reports: list[Progress] = []
    build(DirectorySource(tiny_llama), store, BOTH, on_progress=reports.append)
    for phase in (Phase.CONVERT, Phase.CHECKSUM):
        done = [report.done_bytes for report in reports if report.phase is phase]
        assert done == sorted(done)
        assert done[-1] == next(r.total_bytes for r in reports if r.phase is phase)


def test_reusing_a_snapshot_imports_no_torch(tiny_llama: Path, store: SnapshotStore) -> None:
    build(DirectorySource(tiny_llama), store)
    code = (
        "import sys; from pathlib import Path; from snapshots.builder import build; "
        "from snapshots.sources.directory import DirectorySource; "
        "from snapshots.store import SnapshotStore; "
        "report = build(DirectorySource(Path(sys.argv[1])), SnapshotStore(Path(sys.argv[2]))); "
        "assert report.is_reused; "
        "sys.exit(str({'torch', 'numpy', 'transformers'} & set(sys.modules) or '') or 0)"
    )
    command = [sys.executable, "-c", code, str(tiny_llama), str(store.root)]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr


def test_files_for_serving_are_in_the_snapshot(tiny_llama: Path, store: SnapshotStore) -> None:
    path = build(DirectorySource(tiny_llama), store).snapshot.path
    config = json.loads((path / "config.json").read_text())
    assert config == json.loads((tiny_llama / "config.json").read_text())
    assert json.loads((path / "generation_config.json").read_text())["eos_token_id"] == 2
    assert "<|im_start|>" in (path / "chat_template.jinja").read_text()
    assert (path / "tokenizer.json").read_bytes() == (tiny_llama / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("name", ["../evil", "a/b", "", ".hidden"])
def test_names_that_leave_the_store_are_refused(
    name: str, tiny_llama: Path, store: SnapshotStore
) -> None:
    with pytest.raises(InvalidName):
        build(DirectorySource(tiny_llama), store, BuildOptions(name=name))
    assert not store.root.exists()


def test_model_that_does_not_divide_is_refused(tiny_llama: Path, store: SnapshotStore) -> None:
    options = BuildOptions(tensor_parallel_sizes=(3,))
    with pytest.raises(TensorParallelUnsupported, match="4 attention heads do not divide over 3"):
        build(DirectorySource(tiny_llama), store, options)
    assert store.list() == []


def test_values_beyond_float16_are_refused(tmp_path: Path, store: SnapshotStore) -> None:
    edit(tmp_path / "model", lambda t: t["model.norm.weight"].fill_(1e6))
    with pytest.raises(SourceUnsupported, match=r"model\.norm\.weight has values beyond float16"):
        build(DirectorySource(tmp_path / "model"), store, BuildOptions(dtype="float16"))
    assert not list((store.root / ".building").iterdir()), "what cannot succeed is not resumed"


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), SourceInvalid, "no tensor 'model.norm.weight'"),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(3)}),
            SourceInvalid,
            r"model.norm.weight has the shape \(3,\), the config says \(64,\)",
        ),
        (
            lambda t: t.update({"model.layers.0.mlp.down_proj.bias": torch.ones(64)}),
            SourceUnsupported,
            "1 tensors are not part of a llama model.*down_proj.bias",
        ),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}),
            SourceInvalid,
            "no tensor 'model.layers.0.self_attn.k_proj.bias'",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.int32)}),
            SourceUnsupported,
            "is I32",
        ),
    ],
)
def test_checkpoints_that_do_not_fit_the_architecture_are_refused(
    change: Callable[[dict[str, torch.Tensor]], Any],
    kind: type[Exception],
    message: str,
    tmp_path: Path,
    store: SnapshotStore,
) -> None:
    edit(tmp_path / "model", change)
    with pytest.raises(kind, match=message):
        build(DirectorySource(tmp_path / "model"), store)
    assert store.list() == []


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"model_type": "qwen2"}, SourceUnsupported, r"no weight map for .*'qwen2'.*known: llama"),
        ({"architectures": ["LlamaForTokens"]}, SourceUnsupported, "architecture 'LlamaForTokens'"),
        ({"hidden_act": "gelu"}, SourceUnsupported, "activation 'gelu'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, SourceUnsupported, "rope type 'yarn'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "dynamic"}}, SourceUnsupported, "dyna"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, SourceUnsupported, "partial"),
        ({"rope_parameters": [1]}, SourceInvalid, "rope_parameters is"),
    ],
)
def test_models_the_runtime_cannot_compute_are_refused_before_the_build(
    change: dict[str, Any],
    kind: type[Exception],
    message: str,
    tmp_path: Path,
    store: SnapshotStore,
) -> None:
    write_tiny_llama(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(kind, match=message):
        build(DirectorySource(tmp_path / "model"), store)
    assert not (store.root / ".building").exists()


def test_old_rotary_buffers_are_ignored(tmp_path: Path, store: SnapshotStore) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit(tmp_path / "model", lambda tensors: tensors.update({name: torch.ones(8)}))
    assert not build(DirectorySource(tmp_path / "model"), store).is_reused


def test_tied_head_that_is_stored_all_the_same_is_left_out(
    tmp_path: Path, store: SnapshotStore
) -> None:
    write_tiny_llama(tmp_path / "model", TinyLlama(is_tied=True))
    edit(
        tmp_path / "model",
        lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}),
        make=False,
    )
    report = build(DirectorySource(tmp_path / "model"), store)
    assert "lm_head.weight" not in loaded(report)


@pytest.mark.parametrize(
    ("declared", "expected"), [("bfloat16", "bfloat16"), (None, "float32"), ("int4", "float32")]
)
def test_auto_takes_the_checkpoints_type(
    declared: str | None, expected: str, tmp_path: Path, store: SnapshotStore
) -> None:
    write_tiny_llama(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    config.pop("dtype")
    path.write_text(json.dumps(config | ({"dtype": declared} if declared else {})))
    report = build(DirectorySource(tmp_path / "model"), store)
    assert report.snapshot.manifest.dtype == expected


def edit(
    directory: Path, change: Callable[[dict[str, torch.Tensor]], Any], *, make: bool = True
) -> None:
    """Write a tiny checkpoint and change its tensors."""
    if make:
        write_tiny_llama(directory)
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def loaded(report: BuildReport) -> dict[str, torch.Tensor]:
    rank = open_rank(report.snapshot.path)
    slab = torch.empty(rank.data_bytes, dtype=torch.uint8)
    load_rank(rank, slab)
    return views(rank, slab)
