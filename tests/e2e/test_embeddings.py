"""A function that embeds, with real processes: woken, answered, parked, in the books."""

import base64
from array import array
from collections.abc import Sequence
from typing import Any, cast

import openai
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from transformers import AutoModel

from functions.loader import load_file
from tests.conftest import MINILM, REPOSITORY
from tests.e2e.conftest import Node, wait_for, with_scaling

pytestmark = [pytest.mark.e2e, pytest.mark.model, pytest.mark.timeout(180)]

SHORTER = 64
TEXTS = ["Nobody asks, so the replica is parked.", "Zürich liegt am See.", "word " * 300]


def expected(size: int | None = None) -> list[list[float]]:
    """Return what sentence-transformers computes, cut to the author's 256 tokens.

    Args:
        size: Numbers to keep of each vector, as its `truncate_dim` does; None keeps all.
    """
    tokenizer = Tokenizer.from_file(str(MINILM / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(256)
    model = AutoModel.from_pretrained(str(MINILM))
    model.train(mode=False)
    with torch.inference_mode():
        states = [
            model(torch.tensor([tokenizer.encode(text).ids])).last_hidden_state[0].mean(0)
            for text in TEXTS
        ]
    vectors: list[list[float]] = F.normalize(torch.stack(states)[:, :size]).tolist()
    return vectors


def test_sdk_gets_the_vectors_of_sentence_transformers_cold_and_awake_again(node: Node) -> None:
    spec = load_file(REPOSITORY / "functions" / "minilm.yaml")
    pooling = spec.pooling.model_copy(update={"dimensions": (SHORTER,)})
    spec = spec.model_copy(update={"pooling": pooling})
    node.deploy(with_scaling(spec, idle_timeout=1.0))
    ask = {"model": "all-minilm-l6-v2", "input": TEXTS}
    with node.client() as client:
        with pytest.raises(openai.BadRequestError, match="text 2 has 302 tokens"):
            client.embeddings.create(model="minilm", input=TEXTS)
        cut = {"truncate_prompt_tokens": -1}
        cold = client.embeddings.create(**ask, extra_body=cut)  # type: ignore[arg-type]  # a dict
        wait_for(lambda: node.view("minilm")["replicas"][0]["state"] == "parked", "parking")
        parked = node.view("minilm")["replicas"][0]
        woken = client.embeddings.create(**ask, extra_body=cut)  # type: ignore[arg-type]  # a dict
        model = client.models.retrieve("minilm")
        numbers = client.embeddings.create(model="minilm", input=TEXTS[0], encoding_format="float")
        shorter = [
            client.embeddings.create(**ask, **form, dimensions=SHORTER, extra_body=cut)  # type: ignore[arg-type]  # dicts
            for form in ({}, {"encoding_format": "base64"}, {"encoding_format": "float"})
        ]
        with pytest.raises(openai.BadRequestError, match="384, or leave it out"):
            client.embeddings.create(model="minilm", input="x", dimensions=65)
        with pytest.raises(openai.BadRequestError, match="/v1/embeddings"):
            client.completions.create(model="minilm", prompt="x")
    assert parked["memory"]["weights_bytes"] == 0
    for answer in (cold, woken):
        assert_same([one.embedding for one in answer.data], expected())
    decoded, text, listed = ([one.embedding for one in answer.data] for answer in shorter)
    unpacked = [list(array("f", base64.b64decode(cast("str", vector)))) for vector in text]
    assert decoded == unpacked
    for vectors in (unpacked, listed):
        assert_same(vectors, expected(SHORTER))
    assert numbers.data[0].embedding == pytest.approx(woken.data[0].embedding, abs=1e-6)
    assert cold.usage.prompt_tokens == woken.usage.total_tokens > 256
    assert (model.model_extra or {})["max_model_len"] == 256
    cost = wait_for(lambda: _served(node), "the books")
    assert cost["requests"] == 6
    assert float(cost["active_s"]) > 0
    assert cost["prompt_tokens"] > 2 * 256
    starts = wait_for(lambda: _cold_starts(node), "the journal")
    assert [start["from_tier"] for start in starts] == ["parked", "stopped"]


def assert_same(found: Sequence[Sequence[float]], wanted: Sequence[Sequence[float]]) -> None:
    """Compare vectors of length one by their angles."""
    one, other = (torch.tensor(vectors, dtype=torch.float64) for vectors in (found, wanted))
    assert one.shape == other.shape
    assert one.norm(dim=1).tolist() == pytest.approx([1.0] * len(found), abs=1e-4)
    assert F.cosine_similarity(one, other).min() > 0.9999


def _served(node: Node) -> dict[str, Any] | None:
    rows = node.get("/api/v1/cost", since="1h", by="function")["rows"]
    found: list[dict[str, Any]] = [row for row in rows if row["group"] == "minilm"]
    return found[0] if found and found[0]["requests"] == 6 else None


def _cold_starts(node: Node) -> list[dict[str, str]] | None:
    starts: list[dict[str, str]] = node.get("/api/v1/cold-starts", function="minilm")["cold_starts"]
    return starts if len(starts) == 2 else None
