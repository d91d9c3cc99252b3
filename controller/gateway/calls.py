"""From a validated body to generations: function, prompts, token budget, sampling parameters."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated

from fastapi import Depends, Request

from controller.clock import Clock
from controller.errors import ContextLengthExceeded, InvalidRequest
from controller.gateway.answers import Answer, Choice
from controller.gateway.detokenizer import StopFilter
from controller.gateway.dialect import Dialect
from controller.gateway.grammars import check_grammar
from controller.gateway.logprobs import LogprobWriter
from controller.gateway.pieces import Piece, TokenReport
from controller.gateway.prompt_echo import PromptEcho, PromptText
from controller.gateway.reader import AnswerReader
from controller.gateway.reply import ReplyPlan, ReplyReader
from controller.gateway.sampling import of_choice, sampling_params
from controller.gateway.schemas.generation import GenerationBody
from controller.gateway.schemas.sampling import SamplingBody
from controller.gateway.schemas.tools import FunctionCall, ToolCall
from controller.gateway.text import ModelText, ModelTexts
from controller.metrics import Metrics
from controller.scaling.generation import FunctionRegistry, GenerationRequest, ServedFunction
from controller.settings import Settings

MAX_PRIORITY = (1 << 31) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Gateway:
    """What the routes work with."""

    registry: FunctionRegistry
    settings: Settings
    clock: Clock
    metrics: Metrics
    texts: ModelTexts
    is_ready: Callable[[], bool]


async def gateway_of(request: Request) -> Gateway:
    """Return the gateway that `create_app` made."""
    gateway: Gateway = request.app.state.gateway
    return gateway


GatewayDependency = Annotated[Gateway, Depends(gateway_of)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One call of a generation endpoint, with its function found."""

    gateway: Gateway
    function: ServedFunction
    text: ModelText
    request_id: str
    key_id: str | None
    received_at: float | None
    num_bytes: int
    may_wake: bool
    priority: int

    @classmethod
    async def open(cls, gateway: Gateway, request: Request, model: str) -> "Call":
        """Find the function that serves a model, and its tokenizer.

        Raises:
            ModelNotFound: No function serves it.
            ActivationFailed: Its snapshot is not there yet, or could not be built.
        """
        function = gateway.registry.resolve(model)
        state = request.scope["state"]
        state.update(function=function.name, tier=function.tier)
        return cls(
            gateway=gateway,
            function=function,
            text=await gateway.texts.get(function.snapshot_path),
            request_id=state["request_id"],
            key_id=state["key_id"],
            received_at=state.get("received_at"),
            num_bytes=len(await request.body()),
            may_wake=state.get("may_wake", True),
            priority=state.get("priority", 0),
        )

    async def answer(
        self,
        prompts: Sequence[Sequence[int]],
        body: SamplingBody,
        *,
        default_max_tokens: int | None,
        grammar: str = "",
        plan: ReplyPlan | None = None,
    ) -> Answer:
        """Prepare the generations of every prompt; nothing is admitted yet.

        Args:
            prompts: Token ids, not empty and inside the vocabulary; each has `num_choices` answers,
                in a row.
            body: The request.
            default_max_tokens: Limit when the client names none; None is what the context leaves.
            grammar: What the answer must match, checked; empty for anything.
            plan: How answers are taken apart; None if they are text.

        Raises:
            InvalidRequest: A prompt, a token or a limit does not fit the model, or it only embeds.
        """
        num_choices = len(prompts) * body.num_choices
        self._check_can_generate(num_choices)
        self._check_tokens(body)
        bad_words = await self.text.encode_words(body.bad_words or ())
        choices: list[Choice] = []
        for prompt in (self._truncated(prompt, body) for prompt in prompts):
            sampling = sampling_params(
                body,
                self.text.defaults_of(self.function.spec),
                max_tokens=max(1, self._budget(len(prompt), body, default_max_tokens)),
                bad_words=bad_words,
                grammar=grammar,
            )
            told = await self._told(body, prompt)
            for number in range(body.num_choices):
                request = GenerationRequest(
                    request_id=self.request_id
                    if num_choices == 1
                    else f"{self.request_id}-{len(choices)}",
                    prompt_token_ids=prompt,
                    sampling=of_choice(sampling, body, number),
                    num_bytes=self.num_bytes // num_choices,
                    key_id=self.key_id,
                    received_at=self.received_at,
                    may_wake=self.may_wake,
                    priority=min((body.priority or 0) + self.priority, MAX_PRIORITY),
                    cache_salt=body.cache_salt or "",
                )
                echo = None if told is None else self._echo(body, told)
                reader = self._reader(body, echo, plan)
                choices.append(Choice(self.function.generate(request), reader, prompt, echo))
        return Answer(
            choices,
            num_per_prompt=body.num_choices,
            metrics=self.gateway.metrics,
            clock=self.gateway.clock,
        )

    @property
    def dialect(self) -> Dialect:
        """How the model is told of tools, and writes calls and thoughts."""
        return self.text.dialect_of(self.function.spec)

    def logprob_writer(self, body: SamplingBody) -> LogprobWriter:
        """Return what writes log-probabilities as the request wants them."""
        return LogprobWriter(self.text.token_bytes, as_ids=bool(body.return_tokens_as_token_ids))

    def prompt_logprobs(self, body: GenerationBody, tokens: Sequence[TokenReport]) -> bytes | None:
        """Write as JSON how likely a prompt's tokens were, if the request asks for it."""
        return None if body.prompt_logprobs is None else self.logprob_writer(body).prompt(tokens)

    def check_token_ids(self, token_ids: Collection[int], *, param: str) -> None:
        """Refuse ids the model does not have.

        Raises:
            InvalidRequest: With the first such id.
        """
        size = self.text.vocab_size
        if min(token_ids, default=0) >= 0 and max(token_ids, default=0) < size:
            return
        outside = next(token_id for token_id in token_ids if not 0 <= token_id < size)
        shown = str(outside) if outside < 1 << 64 else "a huge number"
        raise InvalidRequest(
            f"{param}: {shown} is not a token of {self.function.name!r}; "
            f"ids go from 0 to {size - 1}",
            param=param,
        )

    def _check_can_generate(self, num_choices: int) -> None:
        if self.function.pooling is not None:
            raise InvalidRequest(
                f"model: {self.function.name!r} embeds and generates no text; use /v1/embeddings",
                param="model",
            )
        most = self.gateway.settings.max_prompts
        if num_choices > most:
            raise InvalidRequest(
                f"n: the call asks for {num_choices} answers; at most {most} are allowed", param="n"
            )

    def _check_tokens(self, body: SamplingBody) -> None:
        self.check_token_ids(body.stop_token_ids or (), param="stop_token_ids")
        self.check_token_ids(body.allowed_token_ids or (), param="allowed_token_ids")
        self.check_token_ids([int(key) for key in body.logit_bias or ()], param="logit_bias")

    async def _told(self, body: SamplingBody, prompt: Sequence[int]) -> PromptText | None:
        """Return what is to be told of a prompt, if the request asks for it."""
        if not body.echoes_prompt and body.num_prompt_logprobs is None:
            return None
        shows_special = body.skip_special_tokens is False
        told = await self.text.prompt_text(prompt, skip_special_tokens=not shows_special)
        return told if body.echoes_prompt else replace(told, text="")

    def _echo(self, body: SamplingBody, told: PromptText) -> PromptEcho:
        return PromptEcho(
            told, has_tokens=body.echoes_tokens, drops_answer=body.max_new_tokens == 0
        )

    def _reader(
        self, body: SamplingBody, echo: PromptEcho | None, plan: ReplyPlan | None
    ) -> AnswerReader | ReplyReader:
        is_plain = plan is None or plan.is_plain
        reader = AnswerReader(
            self.text.detokenizer(
                body.stop_token_ids or (),
                skip_special_tokens=body.skip_special_tokens is not False,
                shown=frozenset() if is_plain else self.dialect.marker_ids,
            ),
            StopFilter(body.stop, is_kept=bool(body.include_stop_str_in_output)),
            stop_token_ids=frozenset(body.stop_token_ids or ()),
            min_tokens=body.min_tokens or 0,
            reports_tokens=body.reports_tokens,
            echo=echo,
        )
        return reader if plan is None or plan.is_plain else plan.reader(reader)

    def _truncated(self, prompt: Sequence[int], body: SamplingBody) -> Sequence[int]:
        """Return the part of a prompt that the request wants to keep."""
        size = body.truncate_prompt_tokens
        if size is None:
            return prompt
        if size == -1:
            size = self.function.max_model_len - (body.max_new_tokens or 1)
        size = max(size, 1)
        return prompt[:size] if body.truncation_side == "right" else prompt[-size:]

    def _budget(self, num_prompt: int, body: SamplingBody, default: int | None) -> int:
        """Return the most tokens to generate after a prompt."""
        limit, wanted = self.function.max_model_len, body.max_new_tokens
        room = limit - num_prompt
        if room < 1:
            raise ContextLengthExceeded(
                f"the prompt has {num_prompt} tokens and the context of {self.function.name!r} is "
                f"{limit} tokens, prompt and answer together; shorten the prompt to {limit - 1}",
                param=body.prompt_field,
            )
        if wanted is None:
            wanted = room if default is None else min(room, default)
        if wanted > room:
            raise ContextLengthExceeded(
                f"the prompt has {num_prompt} tokens, so the context of {self.function.name!r}, "
                f"{limit} tokens, leaves {room} for the answer and not {wanted}; "
                "shorten the prompt or lower the limit",
                param=body.limit_field,
            )
        if (body.min_tokens or 0) > wanted:
            raise InvalidRequest(
                f"min_tokens: is {body.min_tokens} and the answer has at most {wanted} tokens",
                param="min_tokens",
            )
        return wanted


async def requested_grammar(body: SamplingBody) -> str:
    """Return the grammar that a request asks its answer to match; empty if it is free.

    Raises:
        InvalidRequest: It cannot be followed.
    """
    param = body.format_field if body.structured_outputs is None else "structured_outputs"
    structure = body.structured_outputs or body.formatted
    if structure is None:
        return ""
    try:
        grammar = structure.grammar()
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{param}: cannot be read: {error}", param=param) from error
    if grammar:
        await check_grammar(grammar, param=param)
    return grammar


@dataclass(slots=True, kw_only=True)
class Whole:
    """A choice from beginning to end."""

    parts: list[str] = field(default_factory=list)
    _reasoning: list[str] = field(default_factory=list)
    _calls: list[tuple[str, str, list[str]]] = field(default_factory=list)
    tokens: list[TokenReport] = field(default_factory=list)
    finish_reason: str = ""
    stop_reason: str | int | None = None

    @property
    def text(self) -> str:
        """All of its text."""
        return "".join(self.parts)

    @property
    def calls(self) -> list[ToolCall]:
        """All calls of tools."""
        return [
            ToolCall(id=call_id, function=FunctionCall(name=name, arguments="".join(parts)))
            for call_id, name, parts in self._calls
        ]

    @property
    def reasoning(self) -> str:
        """All that was thought."""
        return "".join(self._reasoning)

    @property
    def token_ids(self) -> list[int]:
        """All of its tokens."""
        return [token.token_id for token in self.tokens]

    @property
    def mean_logprob(self) -> float:
        """How likely it is for its length; its tokens tell theirs."""
        found = [token.logprobs.logprob for token in self.tokens if token.logprobs is not None]
        return sum(found) / max(1, len(found))

    def add(self, piece: Piece) -> None:
        """Take what is new of it."""
        self.parts.append(piece.text)
        self._reasoning.append(piece.reasoning)
        for call in piece.calls:
            if call.call_id is not None:
                self._calls.append((call.call_id, call.name or "", []))
            self._calls[-1][2].append(call.arguments)
        self.tokens += piece.tokens
        self.finish_reason = piece.finish_reason or ""
        self.stop_reason = piece.stop_reason


async def collect(answer: Answer) -> list[Whole]:
    """Run an answer to its end; return its choices."""
    choices = [Whole() for _ in range(answer.size)]

    async def take(index: int, piece: Piece) -> None:
        choices[index].add(piece)

    async with answer:
        await answer.run(take)
    return choices
