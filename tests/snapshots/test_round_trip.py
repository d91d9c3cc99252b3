"""What is loaded from a snapshot equals the checkpoint it was built from."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from snapshots.builder import BuildOptions, build
from snapshots.layout import GROUP_ALIGNMENT, TENSOR_ALIGNMENT
from snapshots.loader import load_rank, open_rank, views
from snapshots.sources.directory import DirectorySource
from snapshots.store import Snapshot, SnapshotStore
from tests.checkpoints import TinyLlama, write_tiny_llama

TINY_SHAPES = [
    TinyLlama(),
    TinyLlama(is_tied=True),
    TinyLlama(is_sharded=True, num_layers=3),
    TinyLlama(dtype=torch.bfloat16, head_dim=24, vocab_size=320),
]


@pytest.mark.parametrize("spec", TINY_SHAPES)
def test_fused_tensors_are_the_checkpoints_rows(
    spec: TinyLlama, tmp_path: Path, store: SnapshotStore
) -> None:
    model = write_tiny_llama(tmp_path / "model", spec)
    snapshot = build(DirectorySource(tmp_path / "model"), store).snapshot
    assert_equals(load(snapshot), fused(model), vocab_size=spec.vocab_size)


def test_ranks_reassemble_to_the_checkpoint(tmp_path: Path, store: SnapshotStore) -> None:
    model = write_tiny_llama(tmp_path / "model")
    snapshot = build(
        DirectorySource(tmp_path / "model"), store, BuildOptions(tensor_parallel_sizes=(1, 2))
    ).snapshot
    ranks = [load(snapshot, 2, rank) for rank in range(2)]
    expected = fused(model)
    for name, tensor in expected.items():
        found = _joined([rank[name] for rank in ranks], name)
        torch.testing.assert_close(found[: tensor.shape[0]], tensor, rtol=0, atol=0, msg=name)
    assert_equals(load(snapshot), expected, vocab_size=300)


def test_ranks_beyond_the_key_value_heads_share_them(tmp_path: Path, store: SnapshotStore) -> None:
    spec = TinyLlama(num_heads=4, num_kv_heads=2, head_dim=8)
    state = write_tiny_llama(tmp_path / "model", spec).state_dict()
    snapshot = build(
        DirectorySource(tmp_path / "model"), store, BuildOptions(tensor_parallel_sizes=(4,))
    ).snapshot
    attention = "model.layers.1.self_attn"
    for rank in range(4):
        qkv = load(snapshot, 4, rank)["layers.1.self_attn.qkv_proj.weight"]
        query, key, value = qkv[:8], qkv[8:16], qkv[16:]
        shared = slice(rank // 2 * 8, rank // 2 * 8 + 8)
        assert torch.equal(query, state[f"{attention}.q_proj.weight"][rank * 8 : rank * 8 + 8])
        assert torch.equal(key, state[f"{attention}.k_proj.weight"][shared])
        assert torch.equal(value, state[f"{attention}.v_proj.weight"][shared])


def test_attention_biases_are_fused_too(tmp_path: Path, store: SnapshotStore) -> None:
    write_tiny_llama(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    attention = "model.layers.{}.self_attn"
    sizes = {"q": 64, "k": 32, "v": 32}
    biases = {
        f"{attention.format(layer)}.{part}_proj.bias": torch.randn(size)
        for layer in range(2)
        for part, size in sizes.items()
    }
    save_file(load_file(path) | biases, path)
    snapshot = build(
        DirectorySource(tmp_path / "model"), store, BuildOptions(tensor_parallel_sizes=(1, 2))
    ).snapshot
    expected = torch.cat([biases[f"{attention.format(1)}.{part}_proj.bias"] for part in sizes])
    name = "layers.1.self_attn.qkv_proj.bias"
    assert torch.equal(load(snapshot)[name], expected)
    ranks = [load(snapshot, 2, rank)[name] for rank in range(2)]
    assert torch.equal(_joined(ranks, name), expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_weights_are_converted_to_the_type_asked_for(
    dtype: str, tmp_path: Path, store: SnapshotStore
) -> None:
    model = write_tiny_llama(tmp_path / "model")
    snapshot = build(DirectorySource(tmp_path / "model"), store, BuildOptions(dtype=dtype)).snapshot
    converted = {name: tensor.to(getattr(torch, dtype)) for name, tensor in fused(model).items()}
    assert snapshot.manifest.dtype == dtype
    assert_equals(load(snapshot), converted, vocab_size=300)


def test_any_safetensors_reader_opens_a_rank_file(tiny_llama: Path, store: SnapshotStore) -> None:
    snapshot = build(DirectorySource(tiny_llama), store).snapshot
    tensors = load(snapshot)
    with safe_open(snapshot.path / "tp1/rank0.safetensors", framework="pt") as file:
        names = [name for name in file.keys() if not name.startswith("__pad.")]  # noqa: SIM118
        assert set(names) == tensors.keys()
        for name in names:
            assert torch.equal(file.get_tensor(name), tensors[name])


def test_tensors_are_aligned_views_into_the_slab(tiny_llama: Path, store: SnapshotStore) -> None:
    rank = open_rank(build(DirectorySource(tiny_llama), store).snapshot.path)
    slab = torch.empty(rank.data_bytes, dtype=torch.uint8)
    for name, tensor in views(rank, slab).items():
        offset = tensor.data_ptr() - slab.data_ptr()
        assert offset % TENSOR_ALIGNMENT == 0
        assert 0 <= offset < rank.data_bytes
        if name.endswith("input_layernorm.weight"):
            assert offset % GROUP_ALIGNMENT == 0


def load(snapshot: Snapshot, num_ranks: int = 1, rank: int = 0) -> dict[str, torch.Tensor]:
    opened = open_rank(snapshot.path, tensor_parallel_size=num_ranks, rank=rank)
    slab = torch.empty(opened.data_bytes, dtype=torch.uint8)
    load_rank(opened, slab)
    return views(opened, slab)


def fused(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    """Return the engine's tensors, from transformers' state alone."""
    state = model.state_dict()
    tensors = {"embed_tokens.weight": state["model.embed_tokens.weight"]}
    for i in range(model.config.num_hidden_layers):
        source, layer = f"model.layers.{i}", f"layers.{i}"
        for name in ("input_layernorm", "post_attention_layernorm", "self_attn.o_proj"):
            tensors[f"{layer}.{name}.weight"] = state[f"{source}.{name}.weight"]
        tensors[f"{layer}.mlp.down_proj.weight"] = state[f"{source}.mlp.down_proj.weight"]
        tensors[f"{layer}.self_attn.qkv_proj.weight"] = torch.cat(
            [state[f"{source}.self_attn.{part}_proj.weight"] for part in "qkv"]
        )
        tensors[f"{layer}.mlp.gate_up_proj.weight"] = torch.cat(
            [state[f"{source}.mlp.{part}_proj.weight"] for part in ("gate", "up")]
        )
    tensors["norm.weight"] = state["model.norm.weight"]
    if not model.config.tie_word_embeddings:
        tensors["lm_head.weight"] = state["lm_head.weight"]
    return tensors


def assert_equals(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], *, vocab_size: int
) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if name in ("embed_tokens.weight", "lm_head.weight"):
            assert found[name].shape[0] % 64 == 0
            assert not found[name][vocab_size:].any()
            assert torch.equal(found[name][:vocab_size], tensor), name
        else:
            assert torch.equal(found[name], tensor), name


def _joined(ranks: list[torch.Tensor], name: str) -> torch.Tensor:
    if "norm" in name:
        assert torch.equal(ranks[0], ranks[1])
        return ranks[0]
    if "o_proj" in name or "down_proj" in name:
        return torch.cat(ranks, dim=1)
    sizes = {"qkv_proj": [32, 16, 16], "gate_up_proj": [48, 48]}
    for key, split in sizes.items():
        if key in name:
            parts = zip(*(torch.split(rank, split) for rank in ranks), strict=True)
            return torch.cat([torch.cat(part) for part in parts])
    return torch.cat(ranks)
