"""Embeddings beside those of transformers, pooled by the textbook."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModel, BertConfig, BertModel, LlamaForCausalLM

from runtime.config import EngineConfig
from runtime.engine.pooling import PoolingRequest
from runtime.engine.sequence import SequenceKey
from runtime.errors import LoadFailed
from runtime.model.bert_config import BertConfig as OurBertConfig
from runtime.model.config import ModelConfig
from runtime.pooling.models import Bert, LlamaEmbedder
from runtime.pooling.packed import PackedTexts, attend
from runtime.pooling.runner import PoolingRunner
from tests.runtime.cpu.oracle import TensorWeights, engine_tensors, random_llama

TEXTS = [
    "A replica is parked when nobody asks for it.",
    "Nobody asks, so the replica is parked.",
    "Zürich liegt am See.",
    "ok",
    "The quick brown fox jumps over the lazy dog. " * 12,
]


def embed(runner: PoolingRunner, texts: Sequence[Sequence[int]], dimensions: int = 0) -> Tensor:
    pooled = runner.embed(
        [
            PoolingRequest(key=SequenceKey(1, number), token_ids=text, dimensions=dimensions)
            for number, text in enumerate(texts)
        ]
    )
    assert not any(one.error for one in pooled)
    return torch.stack(
        [torch.frombuffer(bytearray(one.embedding), dtype=torch.float32) for one in pooled]
    )


def cosines(one: Tensor, other: Tensor) -> Tensor:
    return F.cosine_similarity(one.double(), other.double())


def pooled_by_the_textbook(hidden: Tensor, mode: str) -> Tensor:
    match mode:
        case "mean":
            return hidden.mean(0)
        case "cls":
            return hidden[0]
        case _:
            return hidden[-1]


def config_of(mode: str = "mean", *, normalize: bool = True) -> EngineConfig:
    return EngineConfig(task="embed", pooling=mode, normalize=normalize)


@pytest.fixture(scope="module")
def token_ids(minilm: Path) -> list[list[int]]:
    tokenizer = Tokenizer.from_file(str(minilm / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(256)
    return [encoding.ids for encoding in tokenizer.encode_batch(TEXTS)]


@pytest.fixture(scope="module")
def reference(minilm: Path) -> Callable[[Sequence[int]], Tensor]:
    """Return what sentence-transformers computes: transformers' states, mean, length 1."""
    model = AutoModel.from_pretrained(str(minilm), attn_implementation="eager")
    model.train(mode=False)

    @torch.inference_mode()
    def embedding(text: Sequence[int]) -> Tensor:
        hidden = model(torch.tensor([text])).last_hidden_state[0]
        return F.normalize(hidden.mean(0), dim=0)

    return embedding


@pytest.mark.model
def test_minilm_equals_sentence_transformers(
    minilm_snapshot: Path,
    token_ids: list[list[int]],
    reference: Callable[[Sequence[int]], Tensor],
) -> None:
    runner = PoolingRunner.open(minilm_snapshot, config_of())
    runner.load_weights()
    ours = embed(runner, token_ids)
    expected = torch.stack([reference(text) for text in token_ids])
    assert cosines(ours, expected).min() > 0.999999
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-4)
    similar, other = ours[0] @ ours[1], ours[0] @ ours[2]
    assert similar > other + 0.5
    assert runner.release() > 0
    assert runner.weights_bytes == 0
    runner.load_weights()
    torch.testing.assert_close(embed(runner, token_ids), ours)


@pytest.mark.parametrize("mode", ["mean", "cls", "last"])
@pytest.mark.parametrize("normalize", [True, False])
def test_random_bert_equals_transformers(mode: str, normalize: bool) -> None:
    model = random_bert()
    runner = bert_runner(model, config_of(mode, normalize=normalize))
    texts = [[5, 6, 7], [8] * 40, [9], [1, 2, 3, 4]]
    expected = torch.stack(
        [pooled_by_the_textbook(bert_states(model, text), mode) for text in texts]
    )
    if normalize:
        expected = F.normalize(expected)
    torch.testing.assert_close(embed(runner, texts), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("mode", ["mean", "last"])
@pytest.mark.parametrize(
    "overrides", [{}, {"num_key_value_heads": 4}, {"attention_bias": True}, {"head_dim": 20}]
)
def test_random_llama_equals_transformers(mode: str, overrides: dict[str, Any]) -> None:
    model = random_llama(**overrides)
    runner = llama_runner(model, config_of(mode))
    texts = [[5, 6, 7], [8, 9] * 20, [9], [1, 2, 3, 4]]
    expected = F.normalize(
        torch.stack([pooled_by_the_textbook(llama_states(model, text), mode) for text in texts])
    )
    torch.testing.assert_close(embed(runner, texts), expected, atol=1e-5, rtol=1e-4)


@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=12), seed=st.integers(0, 1 << 30))
@settings(max_examples=30)
def test_what_else_is_in_a_batch_changes_nothing(lengths: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    texts = [torch.randint(0, 90, (n,), generator=generator).tolist() for n in lengths]
    for runner in RUNNERS:
        together = embed(runner, texts)
        alone = torch.cat([embed(runner, [text]) for text in texts])
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


def test_attention_of_a_group_sees_its_own_text_only() -> None:
    texts = PackedTexts.pack([[1] * 9, [1] * 11, [1] * 10], "cpu")
    assert len(texts.groups) == 1
    qkv = torch.randn(30, 6, 8)
    before = attend(qkv, texts, 2, is_causal=False)
    qkv[9:20] = torch.nan
    after = attend(qkv, texts, 2, is_causal=False)
    torch.testing.assert_close(after[:9], before[:9])
    torch.testing.assert_close(after[20:], before[20:])


def test_fewer_dimensions_are_the_leading_ones_at_length_one() -> None:
    whole = embed(RUNNERS[0], [[5, 6, 7]])
    cut = embed(RUNNERS[0], [[5, 6, 7]], dimensions=10)
    torch.testing.assert_close(cut, F.normalize(whole[:, :10]))


def test_text_that_is_not_finite_fails_alone() -> None:
    model = random_bert()
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[7] = torch.inf
    runner = bert_runner(model, config_of())
    requests = [
        PoolingRequest(key=SequenceKey(1, n), token_ids=text)
        for n, text in enumerate([[5, 6, 8], [7, 7, 7], [5, 6, 8]])
    ]
    pooled = runner.embed(requests)
    assert "not finite" in pooled[1].error
    vectors = [
        torch.frombuffer(bytearray(pooled[n].embedding), dtype=torch.float32) for n in (0, 2)
    ]
    torch.testing.assert_close(*vectors)


def test_packed_weights_give_the_same_up_to_rounding() -> None:
    model = random_llama()
    tensors = {name: weight.bfloat16() for name, weight in engine_tensors(model).items()}
    shape = ModelConfig.from_hf(model.config.to_dict())
    runner = PoolingRunner(
        lambda builder: LlamaEmbedder(shape, builder), shape, config_of(), TensorWeights(tensors)
    )
    runner.load_weights()
    first = embed(runner, [[5, 6, 7], [8] * 9])
    for _ in range(4):  # a layer is packed before each step
        assert cosines(embed(runner, [[5, 6, 7], [8] * 9]), first).min() > 0.9999


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (EngineConfig(task="embed", pooling="max"), "use one of mean, cls, last"),
        (EngineConfig(task="embed", pooling="mean", max_model_len=65), "own limit of 64"),
    ],
)
def test_what_cannot_be_served_is_refused(config: EngineConfig, words: str) -> None:
    with pytest.raises(LoadFailed, match=words):
        bert_runner(random_bert(), config)


def random_bert() -> BertModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=90,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=40,
        max_position_embeddings=64,
        initializer_range=0.5,
    )
    model = BertModel(config, add_pooling_layer=False)
    model.train(mode=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "LayerNorm" in name or name.endswith("bias"):
                parameter.uniform_(0.5, 1.5)
    return model


def bert_runner(model: BertModel, config: EngineConfig) -> PoolingRunner:
    shape = OurBertConfig.from_hf(model.config.to_dict())
    runner = PoolingRunner(
        lambda builder: Bert(shape, builder), shape, config, TensorWeights(bert_weights(model))
    )
    runner.load_weights()
    return runner


def llama_runner(model: LlamaForCausalLM, config: EngineConfig) -> PoolingRunner:
    shape = ModelConfig.from_hf(model.config.to_dict())
    runner = PoolingRunner(
        lambda builder: LlamaEmbedder(shape, builder),
        shape,
        config,
        TensorWeights(engine_tensors(model)),
    )
    runner.load_weights()
    return runner


@torch.inference_mode()
def bert_states(model: BertModel, text: Sequence[int]) -> Tensor:
    hidden: Tensor = model(torch.tensor([text])).last_hidden_state[0]
    return hidden


@torch.inference_mode()
def llama_states(model: LlamaForCausalLM, text: Sequence[int]) -> Tensor:
    hidden: Tensor = model.model(torch.tensor([text])).last_hidden_state[0]
    return hidden


def bert_weights(model: BertModel) -> dict[str, Tensor]:
    """Return weights under the engine's names, by hand."""
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    weights = {
        "embed_tokens.weight": state["embeddings.word_embeddings.weight"],
        "embed_positions.weight": state["embeddings.position_embeddings.weight"],
        "embed_types.weight": state["embeddings.token_type_embeddings.weight"],
    }
    for kind in ("weight", "bias"):
        weights[f"embed_norm.{kind}"] = state[f"embeddings.LayerNorm.{kind}"]
        for layer in range(model.config.num_hidden_layers):
            theirs, ours = f"encoder.layer.{layer}", f"layers.{layer}"
            weights[f"{ours}.attention.qkv.{kind}"] = torch.cat(
                [
                    state[f"{theirs}.attention.self.{part}.{kind}"]
                    for part in ("query", "key", "value")
                ]
            )
            for name, source in (
                ("attention.output", "attention.output.dense"),
                ("attention_norm", "attention.output.LayerNorm"),
                ("mlp.up", "intermediate.dense"),
                ("mlp.down", "output.dense"),
                ("mlp_norm", "output.LayerNorm"),
            ):
                weights[f"{ours}.{name}.{kind}"] = state[f"{theirs}.{source}.{kind}"]
    return weights


RUNNERS = (bert_runner(random_bert(), config_of()), llama_runner(random_llama(), config_of("last")))
