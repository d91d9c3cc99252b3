"""GGUF files: unpacked as transformers does it, refused when they make no sense."""

import json
import math
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType
from transformers import AutoModelForCausalLM, AutoTokenizer

from snapshots.builder import BuildOptions, build
from snapshots.errors import SourceInvalid, SourceNotFound, SourceUnsupported
from snapshots.loader import load_rank, open_rank, views
from snapshots.sources.gguf import GgufSource
from snapshots.sources.gguf_rope import rope_parameters
from snapshots.store import Snapshot, SnapshotStore
from tests.checkpoints import TinyLlama, write_tiny_llama
from tests.snapshots.gguf_files import write_gguf

pytestmark = pytest.mark.filterwarnings("default")  # transformers' own


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    write_gguf(tmp_path / "tiny.gguf", write_tiny_llama(tmp_path / "source"))
    return tmp_path / "tiny.gguf"


def test_a_file_is_parsed_once_also_for_transformers(
    gguf_file: Path, store: SnapshotStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    parse, num_parsed = gguf.GGUFReader._build_fields, 0

    def parse_and_count(*arguments: Any) -> int:
        nonlocal num_parsed
        num_parsed += 1
        return parse(*arguments)

    monkeypatch.setattr(gguf.GGUFReader, "_build_fields", parse_and_count)
    build(GgufSource(gguf_file), store)
    assert num_parsed == 1
    gguf.GGUFReader(gguf_file)
    assert num_parsed == 2, "others parse for themselves again"


@pytest.mark.parametrize(
    ("quantization", "is_tied"),
    [
        (GGMLQuantizationType.Q8_0, False),
        (GGMLQuantizationType.Q4_1, True),
        (GGMLQuantizationType.F16, False),
        (GGMLQuantizationType.BF16, False),
    ],
)
def test_weights_equal_those_transformers_unpacks(
    quantization: GGMLQuantizationType, is_tied: bool, tmp_path: Path, store: SnapshotStore
) -> None:
    written = write_tiny_llama(tmp_path / "source", TinyLlama(is_tied=is_tied))
    path = tmp_path / "tiny.gguf"
    write_gguf(path, written, quantization=quantization)
    model = AutoModelForCausalLM.from_pretrained(
        str(tmp_path), gguf_file=path.name, dtype=torch.float32
    )
    state = model.state_dict()
    tensors = load(build(GgufSource(path), store, BuildOptions(dtype="float32")).snapshot)
    assert torch.equal(tensors["embed_tokens.weight"][:300], state["model.embed_tokens.weight"])
    assert ("lm_head.weight" in tensors) is not is_tied
    for layer in range(2):
        attention = f"model.layers.{layer}.self_attn"
        qkv = torch.cat([state[f"{attention}.{part}_proj.weight"] for part in "qkv"])
        assert torch.equal(tensors[f"layers.{layer}.self_attn.qkv_proj.weight"], qkv)
        norm = state[f"model.layers.{layer}.post_attention_layernorm.weight"]
        assert torch.equal(tensors[f"layers.{layer}.post_attention_layernorm.weight"], norm)
    for name in ("q", "k"):  # undone, not merely consistent
        original = written.state_dict()[f"model.layers.0.self_attn.{name}_proj.weight"]
        unpacked = state[f"model.layers.0.self_attn.{name}_proj.weight"]
        assert (original - unpacked).abs().max() < 0.1


@pytest.mark.parametrize(
    ("quantization", "dtype"),
    [
        (GGMLQuantizationType.Q8_0, "bfloat16"),
        (GGMLQuantizationType.F16, "float16"),
        (GGMLQuantizationType.BF16, "bfloat16"),
        (GGMLQuantizationType.F32, "float32"),
    ],
)
def test_auto_keeps_plain_types_and_serves_quantised_ones_in_bfloat16(
    quantization: GGMLQuantizationType, dtype: str, tmp_path: Path, store: SnapshotStore
) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, write_tiny_llama(tmp_path / "source"), quantization=quantization)
    assert build(GgufSource(path), store).snapshot.manifest.dtype == dtype


def test_files_for_serving_come_from_the_metadata(gguf_file: Path, store: SnapshotStore) -> None:
    path = build(GgufSource(gguf_file), store).snapshot.path
    config = json.loads((path / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["num_key_value_heads"] == 2
    assert config["rope_parameters"]["rope_theta"] == 10_000.0
    assert not [key for key in config if key.startswith("_")]
    generation = json.loads((path / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    assert "<|im_start|>" in (path / "chat_template.jinja").read_text()
    ids = AutoTokenizer.from_pretrained(str(path)).encode("<|im_start|>hi")
    assert ids == AutoTokenizer.from_pretrained(str(gguf_file.parent / "source")).encode(
        "<|im_start|>hi"
    )


def llama3_factors(scale: float, num: int = 32, theta: float = 500_000.0) -> list[float]:
    """Compute what llama.cpp's converter writes, from the published formula."""
    factors = []
    for index in range(num):
        wavelength = 2 * math.pi * theta ** (index / num)
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192:
            factors.append(scale)
        else:
            smooth = (8192 / wavelength - 1) / 3
            factors.append(1 / ((1 - smooth) / scale + smooth))
    return factors


@pytest.mark.parametrize("scale", [8.0, 32.0])
def test_llama_3_scaling_is_recovered_from_its_factors(scale: float) -> None:
    config = {"rope_parameters": {"rope_theta": 500_000.0}}
    parameters = rope_parameters(llama3_factors(scale), config)
    assert parameters["rope_type"] == "llama3"
    assert parameters["factor"] == scale
    assert parameters["original_max_position_embeddings"] == 8192


def test_factors_of_another_scaling_are_refused(tmp_path: Path, store: SnapshotStore) -> None:
    model = write_tiny_llama(tmp_path / "source")
    path = tmp_path / "tiny.gguf"
    write_gguf(path, model, rope_factors=[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])
    with pytest.raises(SourceUnsupported, match=r"rope_freqs\.weight is no Llama 3 scaling"):
        build(GgufSource(path), store)


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"scaling.type": "linear", "scaling.factor": 4.0}, ("linear", 4.0)),
        ({"scaling.factor": 2.0}, ("linear", 2.0)),
        ({"scale_linear": 2.0}, ("linear", 2.0)),
        ({"scaling.type": "linear", "scaling.factor": 0.0}, ("default", None)),
        ({"scaling.type": "none"}, ("default", None)),
    ],
)
def test_linear_scaling_is_taken_over(
    metadata: dict[str, str | float],
    expected: tuple[str, float | None],
    tmp_path: Path,
    store: SnapshotStore,
) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, write_tiny_llama(tmp_path / "source"), rope_metadata=metadata)
    snapshot = build(GgufSource(path), store).snapshot
    parameters = json.loads((snapshot.path / "config.json").read_text())["rope_parameters"]
    assert (parameters["rope_type"], parameters.get("factor")) == expected
    assert parameters["rope_theta"] == 10_000.0


def test_other_scalings_are_refused(tmp_path: Path, store: SnapshotStore) -> None:
    path = tmp_path / "tiny.gguf"
    model = write_tiny_llama(tmp_path / "source")
    write_gguf(path, model, rope_metadata={"scaling.type": "yarn", "scaling.factor": 4.0})
    with pytest.raises(SourceUnsupported, match=r"rope\.scaling\.type 'yarn'"):
        build(GgufSource(path), store)
    write_gguf(path, model, rope_factors=[1.0] * 8, rope_metadata={"scaling.factor": 4.0})
    with pytest.raises(SourceUnsupported, match="exclude each other"):
        build(GgufSource(path), store)


@pytest.mark.parametrize("share", [0.0001, 0.001, 0.01, 0.1, 0.5, 0.99])
def test_files_that_are_cut_short_are_refused(
    share: float, gguf_file: Path, store: SnapshotStore
) -> None:
    content = gguf_file.read_bytes()
    gguf_file.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(SourceInvalid):
        build(GgufSource(gguf_file), store)
    assert store.list() == []


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(SourceInvalid, match="is not a GGUF file"):
        GgufSource(tmp_path / "x.gguf").identify()
    with pytest.raises(SourceNotFound):
        GgufSource(tmp_path / "y.gguf").identify()


def test_one_part_of_several_is_refused(tmp_path: Path, store: SnapshotStore) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, write_tiny_llama(tmp_path / "source"), num_parts=3)
    with pytest.raises(SourceUnsupported, match="one of 3 parts") as caught:
        build(GgufSource(path), store)
    assert "--merge" in caught.value.hint


def test_unknown_architecture_is_refused(tmp_path: Path, store: SnapshotStore) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, write_tiny_llama(tmp_path / "source"), architecture="rwkv7")
    with pytest.raises(SourceUnsupported, match="no weight map for 'rwkv7'"):
        build(GgufSource(path), store)


def load(snapshot: Snapshot) -> dict[str, torch.Tensor]:
    rank = open_rank(snapshot.path)
    slab = torch.empty(rank.data_bytes, dtype=torch.uint8)
    load_rank(rank, slab)
    return views(rank, slab)
