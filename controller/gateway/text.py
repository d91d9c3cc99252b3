"""Between text and token ids for one model: tokenizer, chat template, sampling defaults.

Reads the small files of a snapshot; knows neither weights nor replicas.
"""

import asyncio
import json
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

from tokenizers import Encoding, Tokenizer

from controller.clock import Clock
from controller.errors import InternalError, InvalidRequest
from controller.gateway.chat_template import ChatTemplate
from controller.gateway.detokenizer import Detokenizer, TokenTexts
from controller.gateway.dialect import Dialect
from controller.gateway.infill import Infill
from controller.gateway.prompt_echo import PromptText
from controller.gateway.sampling import SamplingDefaults
from controller.gateway.token_bytes import TokenBytes
from functions.spec import FunctionSpec, ModelSpec

LONG_TEXT_TOKENS = 2048  # more are told one by one in a thread: about 5 ms
LONG_TEXT_CHARS = 8192  # more is encoded in a thread: about 5 ms
MESSAGE_CHARS = 64  # what a message costs besides its content
MAX_OPEN_TEXTS = 32


class ModelText:
    """Tokenizer and chat template of one snapshot."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        chat_template: ChatTemplate | None,
        template_source: str,
        vocab_size: int,
        special_token_ids: frozenset[int],
        end_token_ids: frozenset[int],
        defaults: SamplingDefaults,
    ) -> None:
        self.vocab_size = vocab_size
        self.defaults = defaults
        self._tokenizer = tokenizer
        self._token_texts = TokenTexts(tokenizer)
        self.token_bytes = TokenBytes(tokenizer)
        self.infill = Infill.of(tokenizer)
        self._chat_template = chat_template
        self._template_source = template_source
        self._dialects: dict[ModelSpec, Dialect] = {}
        self._end_token_ids = end_token_ids
        self._hidden_token_ids = special_token_ids | end_token_ids

    @classmethod
    def open(cls, snapshot_path: Path, clock: Clock) -> Self:
        """Read a snapshot's text files; takes up to half a second, so not on the event loop.

        Raises:
            InternalError: The tokenizer or the template is missing or broken.
        """
        try:
            return cls._open(snapshot_path, clock)
        except Exception as error:  # tokenizers raises bare Exception
            raise InternalError(
                f"the snapshot {snapshot_path.name!r} has no usable tokenizer or chat template: "
                f"{error}; build it again"
            ) from error

    @classmethod
    def _open(cls, snapshot_path: Path, clock: Clock) -> Self:
        tokenizer = Tokenizer.from_file(str(snapshot_path / "tokenizer.json"))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        config = _read_json(snapshot_path / "config.json")
        generation_config = _read_json(snapshot_path / "generation_config.json")
        tokenizer_config = _read_json(snapshot_path / "tokenizer_config.json")
        added = tokenizer.get_added_tokens_decoder()
        special_ids = {token_id for token_id, token in added.items() if token.special}
        source = _template_source(snapshot_path, tokenizer_config)
        template = source and ChatTemplate(
            source,
            special_tokens=_special_tokens(tokenizer, config, tokenizer_config),
            strftime_now=lambda pattern: clock.now().strftime(pattern),
        )
        text_config = config.get("text_config") or config
        return cls(
            tokenizer,
            chat_template=template or None,
            template_source=source or "",
            vocab_size=text_config.get("vocab_size") or tokenizer.get_vocab_size(),
            special_token_ids=frozenset(special_ids),
            end_token_ids=frozenset(_ids(text_config, "eos") | _ids(generation_config, "eos")),
            defaults=SamplingDefaults.from_generation_config(generation_config),
        )

    def dialect_of(self, spec: FunctionSpec) -> Dialect:
        """Return how a function's model is told of tools, and writes calls and thoughts."""
        dialect = self._dialects.get(spec.model)
        if dialect is None:
            dialect = Dialect(self._template_source, self._tokenizer, spec.model)
            self._dialects[spec.model] = dialect
        return dialect

    def defaults_of(self, spec: FunctionSpec) -> SamplingDefaults:
        """Return what sampling fields a request to a function leaves out are set to."""
        return SamplingDefaults() if spec.model.generation_config == "none" else self.defaults

    async def encode(
        self,
        prompts: Sequence[str],
        *,
        add_special_tokens: bool = True,
        max_tokens: int | None = None,
    ) -> list[list[int]]:
        """Return the token ids of plain prompts, with the special tokens the model wants.

        Args:
            prompts: The texts.
            add_special_tokens: Whether to add those.
            max_tokens: Cut each text at its end to have so many, special tokens included.
        """
        if max_tokens is None:
            return await self._encode(prompts, add_special_tokens=add_special_tokens)
        encodings = await self._encodings(prompts, add_special_tokens=False)
        num_special = self._tokenizer.num_special_tokens_to_add(is_pair=False)
        for encoding in encodings:
            encoding.truncate(max(max_tokens - num_special * add_special_tokens, 0))
        complete = self._tokenizer.post_process
        return [
            complete(encoding, add_special_tokens=add_special_tokens).ids[:max_tokens]
            for encoding in encodings
        ]

    async def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        add_special_tokens: bool = False,
        variables: Mapping[str, Any] = MappingProxyType({}),
    ) -> list[int]:
        """Return the token ids of a conversation; the template writes the special tokens.

        Args:
            messages: As the template reads them.
            add_generation_prompt: Whether to end with what opens the next answer.
            continue_final_message: Whether to end within the last message, after its text.
            add_special_tokens: Whether the tokenizer adds its own special tokens.
            variables: What else the template may read.

        Raises:
            InvalidRequest: The template refuses the messages, or the model has none.
        """
        template = self._chat_template
        if template is None:
            raise InvalidRequest(
                "this model has no chat template; use /v1/completions", param="messages"
            )
        render = partial(
            template.render,
            messages,
            add_generation_prompt=add_generation_prompt,
            variables=variables,
        )
        size = sum(len(message["content"] or "") + MESSAGE_CHARS for message in messages)
        text = await asyncio.to_thread(render) if size > LONG_TEXT_CHARS else render()
        if continue_final_message:
            text = _cut_after(text, messages[-1]["content"] or "")
        (token_ids,) = await self._encode([text], add_special_tokens=add_special_tokens)
        return token_ids

    async def encode_words(self, words: Sequence[str]) -> list[list[int]]:
        """Return the tokens of words, as they begin a text and as they follow a space."""
        texts = [prefix + word.lstrip() for word in words for prefix in ("", " ")]
        encoded = await self._encode(texts, add_special_tokens=False)
        return [list(ids) for ids in dict.fromkeys(map(tuple, encoded)) if ids]

    async def prompt_text(
        self, token_ids: Sequence[int], *, skip_special_tokens: bool = True
    ) -> PromptText:
        """Return a prompt's text and where its tokens are in it."""
        read = partial(self._prompt_text, token_ids, skip_special_tokens=skip_special_tokens)
        return await asyncio.to_thread(read) if len(token_ids) > LONG_TEXT_TOKENS else read()

    def _prompt_text(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> PromptText:
        detokenizer = self.detokenizer(skip_special_tokens=skip_special_tokens)
        parts: list[str] = []
        offsets: list[int] = []
        num_chars = 0
        for token_id in token_ids:
            offsets.append(num_chars)
            parts.append(detokenizer.feed(token_id))
            num_chars += len(parts[-1])
        parts.append(detokenizer.finish())
        return PromptText(token_ids=token_ids, text="".join(parts), offsets=offsets)

    async def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of tokens, special ones included; ids are inside the vocabulary."""
        if len(token_ids) <= LONG_TEXT_CHARS:
            text: str = self._tokenizer.decode(token_ids, skip_special_tokens=False)
        else:
            text = await asyncio.to_thread(
                self._tokenizer.decode, token_ids, skip_special_tokens=False
            )
        return text

    def spell(self, token_ids: Sequence[int]) -> list[str]:
        """Return tokens as the tokenizer spells them; padding of the vocabulary is empty."""
        return [self._tokenizer.id_to_token(token_id) or "" for token_id in token_ids]

    def detokenizer(
        self,
        stop_token_ids: Iterable[int] = (),
        *,
        skip_special_tokens: bool = True,
        shown: AbstractSet[int] = frozenset(),
    ) -> Detokenizer:
        """Return a fresh incremental detokenizer for one sequence.

        Args:
            stop_token_ids: What ends the sequence beside the model's own; it has no text either.
            skip_special_tokens: Whether special tokens have none; ends of sequence never have.
            shown: Special tokens that have text all the same.
        """
        hidden = self._hidden_token_ids - shown if skip_special_tokens else self._end_token_ids
        return Detokenizer(self._token_texts, hidden.union(stop_token_ids))

    async def _encode(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
        encodings = await self._encodings(texts, add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encodings]

    async def _encodings(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[Encoding]:
        if sum(map(len, texts)) <= LONG_TEXT_CHARS:
            encode = self._tokenizer.encode
            return [encode(text, add_special_tokens=add_special_tokens) for text in texts]
        # NOTE: `encode` holds the interpreter lock for seconds on megabytes, the batch form lets
        # it go, so only the latter is of use in a thread.
        encodings: list[Encoding] = await asyncio.to_thread(
            self._tokenizer.encode_batch_fast, list(texts), add_special_tokens=add_special_tokens
        )
        return encodings


class ModelTexts:
    """The texts in use, each opened once, off the event loop, however many wait for it."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._opening: OrderedDict[Path, asyncio.Task[ModelText]] = OrderedDict()

    def warm(self, snapshot_path: Path) -> None:
        """Begin to open a snapshot's text, so that its first call need not wait for that."""
        _ = self._opened(snapshot_path)

    async def get(self, snapshot_path: Path) -> ModelText:
        """Return a snapshot's text, from memory if it was used lately.

        Raises:
            InternalError: The snapshot's text files cannot be used.
        """
        return await asyncio.shield(self._opened(snapshot_path))

    def _opened(self, snapshot_path: Path) -> "asyncio.Task[ModelText]":
        task = self._opening.get(snapshot_path)
        if task is None:
            task = asyncio.create_task(
                asyncio.to_thread(ModelText.open, snapshot_path, self._clock),
                name=f"open-text-{snapshot_path.name}",
            )
            task.add_done_callback(lambda done: self._forget_failure(snapshot_path, done))
            self._opening[snapshot_path] = task
            if len(self._opening) > MAX_OPEN_TEXTS:
                self._opening.popitem(last=False)
        self._opening.move_to_end(snapshot_path)
        return task

    def _forget_failure(self, snapshot_path: Path, task: asyncio.Task[ModelText]) -> None:
        if task.cancelled() or task.exception() is not None:
            self._opening.pop(snapshot_path, None)


def _cut_after(prompt: str, content: str) -> str:
    """Return a prompt up to the end of its last message's text.

    Raises:
        InvalidRequest: The template has changed the text, or there is none.
    """
    text = content.strip()
    at = prompt.rfind(text)
    if not text or at < 0:
        raise InvalidRequest(
            "continue_final_message: the last message's text is empty, or the model's chat "
            "template does not write it as it is",
            param="continue_final_message",
        )
    end = at + len(text)
    trailing = content[len(content.rstrip()) :]
    return prompt[: end + len(trailing)] if prompt.startswith(trailing, end) else prompt[:end]


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} is not a JSON object")
    return content


def _template_source(snapshot_path: Path, tokenizer_config: Mapping[str, Any]) -> str | None:
    path = snapshot_path / "chat_template.jinja"
    if path.exists():
        return path.read_text(encoding="utf-8")
    source = tokenizer_config.get("chat_template")
    if isinstance(source, list):
        named = {entry["name"]: entry["template"] for entry in source}
        return named.get("default")
    return source


def _special_tokens(
    tokenizer: Tokenizer, config: Mapping[str, Any], tokenizer_config: Mapping[str, Any]
) -> dict[str, str]:
    """Return token text by name: what tokenizer_config.json says, else what the ids say."""
    tokens = {}
    for name in ("bos_token", "eos_token"):
        token_id = next(iter(sorted(_ids(config, name.removesuffix("_token")))), None)
        if token_id is not None and (token := tokenizer.id_to_token(token_id)) is not None:
            tokens[name] = token
    for name, value in tokenizer_config.items():
        content = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(content, str):
            tokens[name] = content
    return tokens


def _ids(config: Mapping[str, Any], kind: str) -> set[int]:
    """Return a config's `<kind>_token_id`, which may be absent, one id or several."""
    value = config.get(f"{kind}_token_id")
    ids = value if isinstance(value, list) else [value]
    return {token_id for token_id in ids if isinstance(token_id, int)}
