"""Tiny random checkpoints as transformers writes them, made where a test needs one."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

if TYPE_CHECKING:
    from transformers import PreTrainedModel

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyLlama:
    """What a random checkpoint is made of; the defaults load in milliseconds.

    `vocab_size` must be at least 259: all bytes and three special tokens.
    """

    num_layers: int = 2
    hidden_size: int = 64
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int | None = None
    intermediate_size: int = 96
    vocab_size: int = 300
    max_position_embeddings: int = 512
    is_tied: bool = False
    is_sharded: bool = False
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            num_hidden_layers=self.num_layers,
            hidden_size=self.hidden_size,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            head_dim=self.head_dim or self.hidden_size // self.num_heads,
            intermediate_size=self.intermediate_size,
            vocab_size=self.vocab_size,
            max_position_embeddings=self.max_position_embeddings,
            tie_word_embeddings=self.is_tied,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            initializer_range=0.2,  # far enough apart that greedy choices are not ties
        )


def write_tiny_llama(directory: Path, spec: TinyLlama | None = None) -> LlamaForCausalLM:
    """Write a random Llama with a tokenizer into `directory` and return the model itself."""
    spec = spec or TinyLlama()
    torch.manual_seed(spec.seed)
    model: LlamaForCausalLM = LlamaForCausalLM(spec.config())
    torch.nn.Module.to(model, spec.dtype)  # the model's own has no usable signature
    model.train(mode=False)
    _move_norms_off_one(model)
    write_checkpoint(directory, model, is_sharded=spec.is_sharded)
    return model


def write_checkpoint(directory: Path, model: "PreTrainedModel", *, is_sharded: bool) -> None:
    """Save a model in one file or several, with the tokenizer of `tiny_tokenizer`."""
    options: dict[str, Any] = {"max_shard_size": "64KB"} if is_sharded else {}
    model.save_pretrained(directory, **options)
    tiny_tokenizer().save_pretrained(directory)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per byte after three special ones."""
    special = {END_OF_TEXT: 0, IM_START: 1, IM_END: 2}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = special | {letter: len(special) + i for i, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token=IM_START,
        eos_token=IM_END,
        pad_token=END_OF_TEXT,
        chat_template=CHAT_TEMPLATE,
    )


def _move_norms_off_one(model: LlamaForCausalLM) -> None:
    """Make the norms' weights random, so that a mix-up of two of them shows."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
