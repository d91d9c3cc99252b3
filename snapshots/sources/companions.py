"""The small files beside the weights: config, tokenizer, chat template, in one form for serving."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from snapshots.errors import SourceInvalid
from snapshots.sources.paths import read_json

TOKEN_ID_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object in a form that depends on nothing but its content."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_generation_config(directory: Path, config: Mapping[str, Any]) -> None:
    """Write the generation config of a source that has none, from the ids in its config."""
    ids = {key: config[key] for key in TOKEN_ID_KEYS if config.get(key) is not None}
    write_json(directory / "generation_config.json", ids)


def convert_tokenizer(target: Path, source: Path, *, gguf_file: str | None = None) -> None:
    """Write tokenizer.json and what goes with it from any form that transformers reads.

    Raises:
        SourceInvalid: It reads none.
    """
    from transformers import AutoTokenizer  # build only, takes seconds

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(source), gguf_file=gguf_file, local_files_only=True
        )
    except Exception as error:  # tokenizers below it raises nothing narrower
        place = source / gguf_file if gguf_file else source
        raise SourceInvalid(f"{place} has no usable tokenizer: {error}") from error
    tokenizer.save_pretrained(str(target))


def write_chat_template(directory: Path) -> None:
    """Write chat_template.jinja from where older sources keep it; none is fine.

    Raises:
        SourceInvalid: There is one, but it is not text.
    """
    target = directory / "chat_template.jinja"
    if target.exists():
        return
    for name in ("chat_template.json", "tokenizer_config.json"):
        path = directory / name
        template = _default(read_json(path).get("chat_template")) if path.exists() else None
        if template is None:
            continue
        if not isinstance(template, str):
            raise SourceInvalid(f"chat_template in {name} is not text")
        target.write_text(template, encoding="utf-8")
        return


def check_tokenizer(directory: Path) -> None:
    """Make sure that serving will be able to load the tokenizer.

    Raises:
        SourceInvalid: It is missing or malformed.
    """
    from tokenizers import Tokenizer  # reusing a snapshot needs none

    path = directory / "tokenizer.json"
    if not path.exists():
        raise SourceInvalid("the source has no tokenizer")
    try:
        Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing narrower
        raise SourceInvalid(f"tokenizer.json cannot be used: {error}") from error


def _default(template: object) -> object:
    if not isinstance(template, list):
        return template
    named = {entry.get("name"): entry.get("template") for entry in template}
    return named.get("default")
