"""Small real tokenizers of the two kinds models use, in snapshot-like directories."""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer

CHATML = (
    "{% for message in messages %}\n"
    "{% if message['role'] not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('no such role: ' + message['role']) }}{% endif %}\n"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CORPUS = (
    "The spark was cold until somebody asked for it, and then it was warm again.",
    "Zürich liegt am See; 東京 is far away, naïve café 🔥🔥.",
    "def wake(function): return function.wake()",
)


def byte_level_tokenizer() -> Tokenizer:
    """Return a byte-level BPE tokenizer, as GPT-2's, Llama-3's and Qwen's descendants have."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def byte_fallback_tokenizer() -> Tokenizer:
    """Return a SentencePiece-like tokenizer, as Llama-2's and Mistral's descendants have."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", *sorted(set("abcdefghijklmnopqrstuvwxyzHTS.,;:!'éü東"))]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "H"), ("l", "l"), ("o", "w")]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    model = models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True) for token in ("<unk>", "<s>", "</s>")]
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def write_snapshot(
    directory: Path,
    tokenizer: Tokenizer,
    *,
    eos_token: str,
    chat_template: str | None = CHATML,
    generation_config: dict[str, object] | None = None,
) -> Path:
    """Write the files of a snapshot that the gateway reads."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"vocab_size": tokenizer.get_vocab_size() + 5}
    eos_ids = {"eos_token_id": [tokenizer.token_to_id(eos_token)]}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").write_text(
        json.dumps({**eos_ids, **(generation_config or {})})
    )
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": eos_token, "bos_token": {"content": "<s>"}})
    )
    if chat_template is not None:
        (directory / "chat_template.jinja").write_text(chat_template)
    return directory
