"""The small real model, against what transformers makes of the same file."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from snapshots.loader import load_rank, open_rank, views

pytestmark = [pytest.mark.model, pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.mark.filterwarnings("default")  # transformers' own
def test_gguf_weights_equal_those_transformers_unpacks(
    smollm2_gguf: Path, smollm2_snapshot_fp32: Path, smollm2_snapshot: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        str(smollm2_gguf.parent), gguf_file=smollm2_gguf.name, dtype=torch.float32
    )
    state = model.state_dict()
    full, half = _tensors(smollm2_snapshot_fp32), _tensors(smollm2_snapshot)
    assert "lm_head.weight" not in full
    assert torch.equal(full["embed_tokens.weight"], state["model.embed_tokens.weight"])
    for layer in range(model.config.num_hidden_layers):
        attention = f"model.layers.{layer}.self_attn"
        expected = torch.cat([state[f"{attention}.{p}_proj.weight"] for p in "qkv"])
        assert torch.equal(full[f"layers.{layer}.self_attn.qkv_proj.weight"], expected)
        down = state[f"model.layers.{layer}.mlp.down_proj.weight"]
        assert torch.equal(full[f"layers.{layer}.mlp.down_proj.weight"], down)
    assert full.keys() == half.keys()
    for name, tensor in full.items():
        assert torch.equal(half[name], tensor.to(torch.bfloat16)), name


def _tensors(snapshot: Path) -> dict[str, torch.Tensor]:
    rank = open_rank(snapshot)
    slab = torch.empty(rank.data_bytes, dtype=torch.uint8)
    load_rank(rank, slab)
    return views(rank, slab)
