"""lm-eval's loglikelihoods through /v1/completions, against transformers on the same weights.

The reference reads the model's GGUF file by itself, so nothing of ours is on its side.
"""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from functions.loader import load_file
from functions.spec import FunctionSpec
from tests.conftest import REPOSITORY
from tests.e2e.conftest import Node, home_directory, running_node

LM_EVAL = REPOSITORY / ".venv-lm-eval"
# In float32 no logit differs from transformers' by more than 1e-3: tests/runtime/cpu holds the
# engine to that. A log probability is a logit less the logarithm of a sum of exponentials, which
# moves no more than the logits do: twice that for each token of what is scored.
MAX_ERROR_PER_TOKEN = 2e-3
SENTENCES = [
    ("The capital of France is", " Paris."),
    ("The capital of France is", " a small blue teapot."),
    ("Water boils at one hundred", " degrees Celsius at sea level."),
    ("Rhône, Saône and", " Garonne are rivers; 東京 is a city."),
    ("One two three four", " five"),
]
TASK = {
    "task": "sentences",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "loglikelihood",
    "doc_to_text": "{{context}}",
    "doc_to_target": "{{continuation}}",
    "target_delimiter": "",
    "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
}
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.model,
    pytest.mark.timeout(300),
    pytest.mark.skipif(
        not (LM_EVAL / ".installed").is_file(), reason="lm-eval is large: run `make lm-eval`"
    ),
]


@pytest.fixture
def fp32_node(smollm2_snapshot_fp32: Path) -> Iterator[Node]:
    spec = load_file(REPOSITORY / "functions" / "smollm2.yaml")
    model = spec.model.model_dump() | {"dtype": "float32"}
    with home_directory() as home:
        (home / "snapshots").symlink_to(smollm2_snapshot_fp32.parent)
        with running_node(home) as node:
            node.deploy(FunctionSpec.model_validate(spec.model_dump() | {"model": model}))
            yield node


def told_by_lm_eval(node: Node, tokenizer: Path, directory: Path) -> list[tuple[float, bool]]:
    """Return how likely each continuation is, and whether it is the greedy one."""
    data = directory / "sentences.jsonl"
    lines = [json.dumps({"context": c, "continuation": e}) + "\n" for c, e in SENTENCES]
    data.write_text("".join(lines))
    task = TASK | {"dataset_kwargs": {"data_files": {"test": str(data)}}}
    (directory / "sentences.yaml").write_text(json.dumps(task))  # JSON is YAML
    where = f"base_url={node.url}/v1/completions,model=smollm2,tokenizer={tokenizer}"
    command: list[str | Path] = [LM_EVAL / "bin" / "lm-eval", "run"]
    command += ["--model", "local-completions"]
    command += ["--model_args", f"{where},tokenizer_backend=huggingface,num_concurrent=2"]
    command += ["--tasks", directory / "sentences.yaml", "--log_samples"]
    command += ["--output_path", directory / "out"]
    cache = {"HF_HOME": str(directory / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, env=os.environ | cache, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    (samples,) = (directory / "out").rglob("samples_*.jsonl")
    found = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda s: s["doc_id"])
    return [_number(sample["filtered_resps"][0]) for sample in found]


def _number(told: Any) -> tuple[float, bool]:
    return float(told[0]), told[1] in (True, "True")


def told_by_transformers(gguf: Path, tokenizer: Path) -> list[tuple[float, bool, int]]:
    """Return the same, and how many tokens each continuation has."""
    import torch
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    encode = Tokenizer.from_file(str(tokenizer / "tokenizer.json")).encode
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    found = []
    for context, continuation in SENTENCES:
        first, ids = len(encode(context).ids), encode(context + continuation).ids
        with torch.inference_mode():
            logits = model(torch.tensor([ids])).logits[0, first - 1 : -1]
        target = torch.tensor(ids[first:])
        logprobs = logits.log_softmax(-1).gather(1, target[:, None])
        is_greedy = bool((logits.argmax(-1) == target).all())
        found.append((float(logprobs.sum()), is_greedy, len(target)))
    return found


def test_loglikelihoods_are_those_of_transformers(
    fp32_node: Node, smollm2_gguf: Path, smollm2_snapshot_fp32: Path, tmp_path: Path
) -> None:
    told = told_by_lm_eval(fp32_node, smollm2_snapshot_fp32, tmp_path)
    expected = told_by_transformers(smollm2_gguf, smollm2_snapshot_fp32)
    print(told, expected)  # noqa: T201  # for the log
    assert {is_greedy for _, is_greedy in told} == {True, False}
    for (logprob, is_greedy), (wanted, should_be_greedy, num_tokens) in zip(
        told, expected, strict=True
    ):
        assert logprob == pytest.approx(wanted, abs=num_tokens * MAX_ERROR_PER_TOKEN)
        assert is_greedy == should_be_greedy
