import asyncio
import json
from pathlib import Path

import pytest
from blockbuster import BlockBuster, blockbuster_ctx
from tokenizers import Tokenizer

from controller.clock import SystemClock
from controller.errors import InternalError
from controller.gateway import text as text_module
from controller.gateway.sampling import SamplingDefaults
from controller.gateway.text import ModelText, ModelTexts
from tests.fakes.tokenizers import write_snapshot

CLOCK = SystemClock()


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Paths in the order they were opened."""
    paths: list[Path] = []
    original = ModelText.open

    def note(snapshot_path: Path, clock: SystemClock) -> ModelText:
        paths.append(snapshot_path)
        return original(snapshot_path, clock)

    monkeypatch.setattr(ModelText, "open", note)
    return paths


async def test_many_callers_open_a_snapshot_once(snapshot: Path, opened: list[Path]) -> None:
    texts = ModelTexts(CLOCK)
    found = await asyncio.gather(*(texts.get(snapshot) for _ in range(20)))
    assert len(set(map(id, found))) == 1
    assert await texts.get(snapshot) is found[0]
    assert opened == [snapshot]


async def test_a_warmed_snapshot_is_open_when_the_first_call_comes(
    snapshot: Path, opened: list[Path]
) -> None:
    texts = ModelTexts(CLOCK)
    texts.warm(snapshot)
    for _ in range(1000):
        if opened:
            break
        await asyncio.sleep(0.01)
    assert opened == [snapshot], "nobody has called yet"
    await texts.get(snapshot)
    assert opened == [snapshot]


async def test_caller_that_gives_up_does_not_spoil_the_others(
    snapshot: Path, opened: list[Path], byte_level: Tokenizer
) -> None:
    texts = ModelTexts(CLOCK)
    first, second = (asyncio.create_task(texts.get(snapshot)) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    assert (await second).vocab_size == byte_level.get_vocab_size() + 5
    assert opened == [snapshot]


async def test_failure_is_not_remembered(
    tmp_path: Path, byte_level: Tokenizer, opened: list[Path]
) -> None:
    texts = ModelTexts(CLOCK)
    with pytest.raises(InternalError, match="no usable tokenizer"):
        await texts.get(tmp_path)
    write_snapshot(tmp_path, byte_level, eos_token="<|im_end|>")
    assert (await texts.get(tmp_path)).vocab_size == byte_level.get_vocab_size() + 5


async def test_least_recently_used_text_is_let_go(
    tmp_path: Path, byte_level: Tokenizer, opened: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_module, "MAX_OPEN_TEXTS", 2)
    a, b, c = (
        write_snapshot(tmp_path / name, byte_level, eos_token="<|im_end|>") for name in "abc"
    )
    texts = ModelTexts(CLOCK)
    for path in (a, b, a, c, a, b):
        await texts.get(path)
    assert opened == [a, b, c, b]


async def test_opening_does_not_block_the_event_loop(snapshot: Path) -> None:
    with blockbuster_ctx() as blockbuster:
        assert isinstance(blockbuster, BlockBuster)
        await ModelTexts(CLOCK).get(snapshot)


async def test_long_text_has_the_same_tokens_as_its_short_form(
    snapshot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_text = ModelText.open(snapshot, CLOCK)
    prompts = ["The spark was cold, 東京.", "", "naïve 🔥"]
    messages = [{"role": "user", "content": prompts[0]}]
    short = await model_text.encode(prompts), await model_text.encode_chat(messages)
    monkeypatch.setattr(text_module, "LONG_TEXT_CHARS", 1)
    assert (await model_text.encode(prompts), await model_text.encode_chat(messages)) == short


async def test_truncation_in_a_tokenizer_file_is_not_obeyed(
    tmp_path: Path, byte_level: Tokenizer
) -> None:
    tokenizer = Tokenizer.from_str(byte_level.to_str())
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=64)
    write_snapshot(tmp_path, tokenizer, eos_token="<|im_end|>")
    (ids,) = await ModelText.open(tmp_path, CLOCK).encode(["The spark was cold"])
    assert ids == byte_level.encode("The spark was cold").ids


async def test_template_may_live_in_the_tokenizer_config(
    tmp_path: Path, byte_level: Tokenizer
) -> None:
    write_snapshot(tmp_path, byte_level, eos_token="<|im_end|>", chat_template=None)
    named = [
        {"name": "tool_use", "template": "wrong"},
        {"name": "default", "template": "{{ eos_token }}{{ messages[0].content }}"},
    ]
    config = {"chat_template": named, "eos_token": "<|im_end|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ids = await ModelText.open(tmp_path, CLOCK).encode_chat([{"role": "user", "content": "a"}])
    assert ids == byte_level.encode("<|im_end|>a").ids


async def test_special_tokens_come_from_ids_where_no_config_names_them(
    tmp_path: Path, byte_fallback: Tokenizer
) -> None:
    template = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"
    write_snapshot(tmp_path, byte_fallback, eos_token="</s>", chat_template=template)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "config.json").write_text('{"bos_token_id": 1, "eos_token_id": 2}')
    ids = await ModelText.open(tmp_path, CLOCK).encode_chat([{"role": "user", "content": "a"}])
    assert (ids[0], ids[-1]) == (1, 2)


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "chat_template.jinja"])
def test_broken_file_is_an_error_of_the_snapshot(
    tmp_path: Path, byte_level: Tokenizer, name: str
) -> None:
    write_snapshot(tmp_path, byte_level, eos_token="<|im_end|>")
    (tmp_path / name).write_text("{% [")
    with pytest.raises(InternalError, match="build it again"):
        ModelText.open(tmp_path, CLOCK)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, SamplingDefaults()),
        ({"temperature": 0.6, "top_k": 20.0}, SamplingDefaults(temperature=0.6, top_k=20)),
        ({"temperature": 0.6, "do_sample": False}, SamplingDefaults()),
        ({"temperature": None, "top_p": "0.9", "top_k": True, "min_p": 7}, SamplingDefaults()),
        ({"temperature": -1, "top_p": 0, "min_p": 0.1}, SamplingDefaults(min_p=0.1)),
    ],
)
def test_unusable_recommendations_are_left_out(
    config: dict[str, object], expected: SamplingDefaults
) -> None:
    assert SamplingDefaults.from_generation_config(config) == expected


@pytest.mark.model
async def test_real_tokenizer_and_template_agree_with_the_reference(smollm2_snapshot: Path) -> None:
    from transformers import AutoTokenizer  # slow to import

    reference = AutoTokenizer.from_pretrained(smollm2_snapshot)
    model_text = ModelText.open(smollm2_snapshot, CLOCK)
    prompts = ["Zürich is warm, 東京 too 🔥🔥.\n\n  def f(x):\n\treturn x", " leading", "日本語"]
    encoded = await model_text.encode(prompts)
    assert encoded == [reference(prompt)["input_ids"] for prompt in prompts]
    for prompt, ids in zip(prompts, encoded, strict=True):
        detokenizer = model_text.detokenizer()
        pieces = [*(detokenizer.feed(token_id) for token_id in ids), detokenizer.finish()]
        assert "".join(pieces) == reference.decode(ids, skip_special_tokens=True) == prompt
    messages = [{"role": "user", "content": prompts[0]}]
    rendered = reference.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    expected = reference(str(rendered), add_special_tokens=False)["input_ids"]
    assert await model_text.encode_chat(messages) == expected
