"""Sentence-transformers' directories: an encoder's weights, and how its author pools."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel

from snapshots.builder import build
from snapshots.errors import SourceError, SourceInvalid, SourceUnsupported
from snapshots.sources.directory import DirectorySource
from snapshots.sources.hub import _wanted
from snapshots.store import SnapshotStore
from tests.checkpoints import write_checkpoint, write_tiny_llama

MODULES = [
    {"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
]


def write_pooling(model: Path, mode: str = "mean_tokens", **extra: Any) -> None:
    (model / "modules.json").write_text(json.dumps(MODULES))
    (model / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 32}))
    (model / "1_Pooling").mkdir()
    modes = {"pooling_mode_mean_tokens": False, f"pooling_mode_{mode}": True}
    (model / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": 24} | modes | extra)
    )


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A random encoder, with the table of positions that old checkpoints carry."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=300,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=40,
        max_position_embeddings=64,
    )
    directory = tmp_path / "encoder"
    write_checkpoint(directory, BertModel(config), is_sharded=False)
    tensors = load_file(directory / "model.safetensors")
    tensors["embeddings.position_ids"] = torch.arange(64)[None]
    save_file(tensors, directory / "model.safetensors")
    write_pooling(directory)
    return directory


def test_encoder_is_fused_whole(model: Path, store: SnapshotStore) -> None:
    path = build(DirectorySource(model), store).snapshot.path
    built = load_file(path / "tp1" / "rank0.safetensors")
    source = load_file(model / "model.safetensors")
    torch.testing.assert_close(
        built["layers.1.attention.qkv.bias"],
        torch.cat(
            [source[f"encoder.layer.1.attention.self.{p}.bias"] for p in ("query", "key", "value")]
        ),
    )
    for ours, theirs in (
        ("embed_tokens.weight", "embeddings.word_embeddings.weight"),
        ("embed_positions.weight", "embeddings.position_embeddings.weight"),
        ("embed_types.weight", "embeddings.token_type_embeddings.weight"),
        ("embed_norm.bias", "embeddings.LayerNorm.bias"),
        ("layers.0.mlp_norm.weight", "encoder.layer.0.output.LayerNorm.weight"),
        ("layers.0.mlp.down.weight", "encoder.layer.0.output.dense.weight"),
    ):
        assert torch.equal(built[ours][: len(source[theirs])], source[theirs]), ours
    assert not any("pooler" in name or "position_ids" in name for name in built)


@pytest.mark.parametrize(
    ("mode", "expected"), [("mean_tokens", "mean"), ("cls_token", "cls"), ("lasttoken", "last")]
)
def test_pooling_is_kept(mode: str, expected: str, tmp_path: Path, store: SnapshotStore) -> None:
    write_tiny_llama(tmp_path / "decoder")
    write_pooling(tmp_path / "decoder", mode)
    path = build(DirectorySource(tmp_path / "decoder"), store).snapshot.path
    assert json.loads((path / "pooling.json").read_text()) == {
        "mode": expected,
        "normalize": True,
        "max_tokens": 32,
    }


def test_model_that_says_nothing_of_pooling_has_no_such_file(
    tmp_path: Path, store: SnapshotStore
) -> None:
    write_tiny_llama(tmp_path / "decoder")
    path = build(DirectorySource(tmp_path / "decoder"), store).snapshot.path
    assert not (path / "pooling.json").exists()


@pytest.mark.parametrize(
    ("file", "content", "kind", "words"),
    [
        ("modules.json", {}, SourceInvalid, "not a JSON array"),
        ("modules.json", [{"type": 1}], SourceInvalid, "without a type"),
        ("modules.json", [*MODULES, {"type": "a.Dense"}], SourceUnsupported, "'Dense'"),
        ("1_Pooling/config.json", {"pooling_mode_max_tokens": True}, SourceUnsupported, "max"),
        ("1_Pooling/config.json", {}, SourceUnsupported, "pooling by"),
        ("sentence_bert_config.json", {"max_seq_length": "9"}, SourceInvalid, "max_seq_length"),
    ],
)
def test_pooling_that_is_not_computed_is_refused(
    file: str,
    content: object,
    kind: type[SourceError],
    words: str,
    model: Path,
    store: SnapshotStore,
) -> None:
    (model / file).write_text(json.dumps(content))
    with pytest.raises(kind, match=words):
        build(DirectorySource(model), store)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"hidden_act": "relu"}, "activation 'relu'"),
        ({"position_embedding_type": "relative_key"}, "relative_key"),
        ({"is_decoder": True}, "decodes"),
        ({"architectures": ["BertForMaskedLM"]}, "BertForMaskedLM"),
    ],
)
def test_encoder_that_is_not_computed_is_refused(
    overrides: dict[str, Any], words: str, model: Path, store: SnapshotStore
) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | overrides))
    with pytest.raises(SourceUnsupported, match=words):
        build(DirectorySource(model), store)


def test_hub_source_fetches_what_says_how_to_pool() -> None:
    names = ["config.json", "modules.json", "1_Pooling/config.json", "model.safetensors"]
    files = list(_wanted("org/name", dict.fromkeys([*names, "onnx/model.safetensors"], 1)))
    assert sorted(files) == sorted(names)
    assert files[0] == "config.json"  # the others are found beside it
