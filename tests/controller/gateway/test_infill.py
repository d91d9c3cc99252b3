"""Completions with a suffix."""

from pathlib import Path

import httpx
import pytest
from tokenizers import AddedToken

from controller.scaling.generation import TokenChunk
from tests.controller.gateway.conftest import AppMaker, client_of
from tests.fakes.function import FakeFunction
from tests.fakes.tokenizers import byte_level_tokenizer, write_snapshot

PATH = "/v1/completions"
BODY = {"model": "tiny", "prompt": "def wake(", "suffix": ")\n", "stop_token_ids": [7]}


@pytest.mark.parametrize(
    ("markers", "pad"),
    [
        (("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"), "<|file_sep|>"),
        (("<fim_prefix>", "<fim_suffix>", "<fim_middle>"), "<fim_pad>"),
        (("<\uff5cfim▁begin\uff5c>", "<\uff5cfim▁hole\uff5c>", "<\uff5cfim▁end\uff5c>"), None),
    ],
)
async def test_answer_goes_between_prompt_and_suffix(
    make_app: AppMaker, tmp_path: Path, markers: tuple[str, str, str], pad: str | None
) -> None:
    tokenizer = byte_level_tokenizer()
    added = [*markers, *([pad] if pad else [])]
    tokenizer.add_tokens([AddedToken(marker, special=True) for marker in added])
    snapshot = write_snapshot(tmp_path, tokenizer, eos_token="<|im_end|>")
    function = FakeFunction(snapshot, lambda _: [TokenChunk([68], finish_reason="stop")])
    async with client_of(make_app(function)) as client:
        answer = await client.post(PATH, json=BODY | {"prompt": ["def wake(", ""]})
        plain = await client.post(PATH, json=BODY | {"suffix": ""})
    assert answer.is_success, answer.text
    first, second, third = (one.request for one in function.generations)
    before, between, after = (tokenizer.token_to_id(marker) for marker in markers)
    prefix, suffix = tokenizer.encode("def wake(").ids, tokenizer.encode(")\n").ids
    assert list(first.prompt_token_ids) == [before, *prefix, between, *suffix, after]
    assert list(second.prompt_token_ids) == [before, between, *suffix, after]
    assert set(first.sampling.stop_token_ids) == {7, *map(tokenizer.token_to_id, added)}
    assert plain.is_success
    assert list(third.prompt_token_ids) == prefix
    assert list(third.sampling.stop_token_ids) == [7]


async def test_model_that_cannot_fill_in_says_so(client: httpx.AsyncClient) -> None:
    error = (await client.post(PATH, json=BODY)).json()["error"]
    assert error["param"] == "suffix"
    assert "cannot fill in" in error["message"]
