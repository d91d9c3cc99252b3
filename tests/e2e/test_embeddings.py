"""A function that embeds, with real processes: woken, answered, parked, in the books."""

from typing import Any

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

TEXTS = ["Nobody asks, so the replica is parked.", "Zürich liegt am See.", "word " * 300]


def expected() -> list[list[float]]:
    """Return what sentence-transformers computes, cut to the author's 256 tokens."""
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
    vectors: list[list[float]] = F.normalize(torch.stack(states)).tolist()
    return vectors


def test_sdk_gets_the_vectors_of_sentence_transformers_cold_and_awake_again(node: Node) -> None:
    spec = load_file(REPOSITORY / "functions" / "minilm.yaml")
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
        with pytest.raises(openai.BadRequestError, match="/v1/embeddings"):
            client.completions.create(model="minilm", prompt="x")
    assert parked["memory"]["weights_bytes"] == 0
    for answer in (cold, woken):
        for one, other in zip(answer.data, expected(), strict=True):
            cosine = F.cosine_similarity(
                torch.tensor(one.embedding, dtype=torch.float64),
                torch.tensor(other, dtype=torch.float64),
                dim=0,
            )
            assert cosine > 0.9999
    assert numbers.data[0].embedding == pytest.approx(woken.data[0].embedding, abs=1e-6)
    assert cold.usage.prompt_tokens == woken.usage.total_tokens > 256
    assert (model.model_extra or {})["max_model_len"] == 256
    cost = wait_for(lambda: _served(node), "the books")
    assert cost["requests"] == 3
    assert float(cost["active_s"]) > 0
    assert cost["prompt_tokens"] > 2 * 256
    starts = wait_for(lambda: _cold_starts(node), "the journal")
    assert [start["from_tier"] for start in starts] == ["parked", "stopped"]


def _served(node: Node) -> dict[str, Any] | None:
    rows = node.get("/api/v1/cost", since="1h", by="function")["rows"]
    found: list[dict[str, Any]] = [row for row in rows if row["group"] == "minilm"]
    return found[0] if found and found[0]["requests"] == 3 else None


def _cold_starts(node: Node) -> list[dict[str, str]] | None:
    starts: list[dict[str, str]] = node.get("/api/v1/cold-starts", function="minilm")["cold_starts"]
    return starts if len(starts) == 2 else None
