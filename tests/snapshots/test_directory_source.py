"""Local directories: what is read, what is refused, and nothing outside of them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from snapshots.builder import build
from snapshots.errors import (
    PickleRefused,
    SourceError,
    SourceInvalid,
    SourceNotFound,
    SourceUnsupported,
)
from snapshots.sources.directory import DirectorySource
from snapshots.sources.gguf import GgufSource
from snapshots.sources.hub import HubSource
from snapshots.sources.resolve import resolve_source
from snapshots.store import SnapshotStore
from tests.checkpoints import TinyLlama, write_tiny_llama

PICKLE = b"\x80\x04}\x94."  # an empty dict


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_tiny_llama(tmp_path / "model", TinyLlama(is_sharded=True))
    return tmp_path / "model"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.PTH", "last.ckpt"])
def test_pickles_are_refused_with_a_way_out(
    name: str, tmp_path: Path, store: SnapshotStore
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / name).write_bytes(PICKLE)
    for source in (str(tmp_path / "model"), str(tmp_path / "model" / name)):
        with pytest.raises(PickleRefused, match="run code when they are opened") as caught:
            build(resolve_source(source), store)
        assert "save_pretrained" in caught.value.hint


def test_pickles_beside_safetensors_are_left_alone(model: Path, store: SnapshotStore) -> None:
    (model / "pytorch_model.bin").write_bytes(b"never opened")
    assert build(DirectorySource(model), store).snapshot.manifest.name == "model"


def test_pickle_called_safetensors_is_refused(model: Path, store: SnapshotStore) -> None:
    next(model.glob("model-00001-*")).write_bytes(PICKLE * 50)
    with pytest.raises(SourceInvalid, match="is not a safetensors file"):
        build(DirectorySource(model), store)


def shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("model-*.safetensors"))


def index(directory: Path, **weight_map: str) -> None:
    path = directory / "model.safetensors.index.json"
    content = json.loads(path.read_text())
    content["weight_map"] |= weight_map
    path.write_text(json.dumps(content))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def duplicate_tensor(directory: Path) -> None:
    first, second, *_ = shards(directory)
    save_file(load_file(first) | load_file(second), second)


Damage = Callable[[Path], object]
DAMAGES: list[tuple[Damage, type[SourceError], str]] = [
    (lambda d: shards(d)[1].unlink(), SourceInvalid, "which its index names"),
    (lambda d: cut(shards(d)[0]), SourceInvalid, "is not a safetensors file"),
    (lambda d: shards(d)[0].write_bytes(b""), SourceInvalid, "is not a safetensors file"),
    (lambda d: index(d, extra="../secret.safetensors"), SourceInvalid, "no safetensors file"),
    (lambda d: index(d, extra="/etc/passwd"), SourceInvalid, "no safetensors file beside it"),
    (lambda d: index(d, extra=shards(d)[0].name), SourceInvalid, "does not hold extra"),
    (duplicate_tensor, SourceInvalid, "is in both"),
    (lambda d: (d / "config.json").unlink(), SourceNotFound, "config.json cannot be read"),
    (lambda d: (d / "config.json").write_text("{"), SourceInvalid, "config.json is not JSON"),
    (lambda d: (d / "config.json").write_text("[]"), SourceInvalid, "not a JSON object"),
    (lambda d: (d / "tokenizer.json").write_text("{}"), SourceInvalid, "cannot be used"),
    (lambda d: (d / "tokenizer.json").unlink(), SourceInvalid, "no usable tokenizer"),
    (
        lambda d: (d / "config.json").write_text(
            json.dumps({"model_type": "llama", "quantization_config": {"quant_method": "awq"}})
        ),
        SourceUnsupported,
        "is quantised",
    ),
    (
        lambda d: (d / "config.json").write_text(json.dumps({"model_type": "mamba"})),
        SourceUnsupported,
        "no weight map for model_type 'mamba'",
    ),
]


@pytest.mark.filterwarnings("default")  # transformers' own
@pytest.mark.parametrize(("damage", "kind", "message"), DAMAGES)
def test_damaged_checkpoints_are_refused_by_name(
    damage: Damage,
    kind: type[SourceError],
    message: str,
    model: Path,
    store: SnapshotStore,
) -> None:
    damage(model)
    with pytest.raises(kind, match=message):
        build(DirectorySource(model), store)
    assert store.list() == []


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_links_out_of_the_source_are_not_followed(
    name: str, tmp_path: Path, store: SnapshotStore
) -> None:
    write_tiny_llama(tmp_path / "model")
    path = tmp_path / "model" / name
    path.rename(tmp_path / "secret")
    path.symlink_to(tmp_path / "secret")
    with pytest.raises(SourceInvalid, match="outside of the source"):
        build(DirectorySource(tmp_path / "model"), store)


def test_links_within_a_hub_cache_are_followed(tmp_path: Path, store: SnapshotStore) -> None:
    repository = tmp_path / "models--org--tiny"
    commit = repository / "snapshots" / ("c" * 40)
    write_tiny_llama(commit)
    (repository / "blobs").mkdir()
    (commit / "model.safetensors").rename(repository / "blobs" / "b")
    (commit / "model.safetensors").symlink_to("../../blobs/b")
    assert build(DirectorySource(commit), store).snapshot.manifest.name == "tiny"


def test_chat_template_is_found_where_older_checkpoints_keep_it(
    tmp_path: Path, store: SnapshotStore
) -> None:
    for number, template in enumerate(
        ["{{ one }}", [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "y"}]]
    ):
        model = tmp_path / f"model{number}"
        write_tiny_llama(model)
        (model / "chat_template.jinja").unlink()
        path = model / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
        snapshot = build(DirectorySource(model), store).snapshot
        expected = "{{ one }}" if number == 0 else "y"
        assert (snapshot.path / "chat_template.jinja").read_text() == expected


def test_generation_config_is_derived_when_missing(tmp_path: Path, store: SnapshotStore) -> None:
    write_tiny_llama(tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").unlink()
    path = build(DirectorySource(tmp_path / "model"), store).snapshot.path
    found = json.loads((path / "generation_config.json").read_text())
    assert found == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("org/name", HubSource),
        ("org/name@refs/pr/1", HubSource),
        ("./model.d", DirectorySource),
        ("single", DirectorySource),
        ("./model.d/model.safetensors", DirectorySource),
        ("dir/model.gguf", GgufSource),
        ("./model.d/unnamed", GgufSource),
    ],
)
def test_spelling_decides_what_a_source_is(
    text: str, kind: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("single", "org/name", "dir", "model.d"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("dir/model.gguf", "model.d/model.safetensors", "model.d/unnamed"):
        (tmp_path / name).touch()
    assert type(resolve_source(text)) is kind


@pytest.mark.parametrize(
    ("text", "revision", "kind"),
    [
        ("./nothing", None, SourceNotFound),
        ("", None, SourceNotFound),
        ("../../etc/shadow-of-nothing", None, SourceNotFound),
        ("a/b/c", None, SourceNotFound),
        ("org/name@v1", "v2", SourceInvalid),
        ("./model", "main", SourceInvalid),
    ],
)
def test_sources_that_name_nothing_are_refused(
    text: str, revision: str | None, kind: type[SourceError]
) -> None:
    with pytest.raises(kind):
        resolve_source(text, revision).identify()
