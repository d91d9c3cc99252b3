"""From a validated body to generations: function, prompts, token budget, sampling parameters."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from controller.clock import Clock
from controller.errors import ContextLengthExceeded, InvalidRequest
from controller.gateway.answers import Answer, Choice
from controller.gateway.detokenizer import StopFilter
from controller.gateway.grammars import check_grammar
from controller.gateway.schemas.sampling import SamplingBody
from controller.gateway.text import ModelText, ModelTexts
from controller.metrics import Metrics
from controller.scaling.generation import FunctionRegistry, GenerationRequest, ServedFunction
from controller.settings import Settings
from runtime.rpc import inference_pb2 as pb

UINT64_MASK = (1 << 64) - 1


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
    num_bytes: int

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
            num_bytes=len(await request.body()),
        )

    def answer(
        self,
        prompts: Sequence[Sequence[int]],
        body: SamplingBody,
        *,
        default_max_tokens: int | None,
        grammar: str = "",
    ) -> Answer:
        """Prepare one generation per prompt; nothing is admitted yet.

        Args:
            prompts: Token ids, not empty and inside the vocabulary.
            body: The request.
            default_max_tokens: Limit when the client names none; None is what the context leaves.
            grammar: What the answer must match, checked; empty for anything.

        Raises:
            InvalidRequest: A prompt or a limit does not fit the model, or it only embeds.
        """
        if self.function.pooling is not None:
            raise InvalidRequest(
                f"model: {self.function.name!r} embeds and generates no text; use /v1/embeddings",
                param="model",
            )
        self._check_stop_tokens(body.stop_token_ids or [])
        budgets = [self._budget(len(prompt), body, default_max_tokens) for prompt in prompts]
        choices = [
            Choice(
                self.function.generate(
                    GenerationRequest(
                        request_id=self._sequence_name(index, len(prompts)),
                        prompt_token_ids=prompt,
                        sampling=self._sampling(body, max_tokens, grammar),
                        num_bytes=self.num_bytes // len(prompts),
                        key_id=self.key_id,
                    )
                ),
                self.text.detokenizer(body.stop_token_ids or ()),
                StopFilter(body.stop),
            )
            for index, (prompt, max_tokens) in enumerate(zip(prompts, budgets, strict=True))
        ]
        return Answer(choices, metrics=self.gateway.metrics, clock=self.gateway.clock)

    def check_token_ids(self, token_ids: Sequence[int], *, param: str) -> None:
        """Refuse ids the model does not have.

        Raises:
            InvalidRequest: With the first such id.
        """
        size = self.text.vocab_size
        outside = next((token_id for token_id in token_ids if not 0 <= token_id < size), None)
        if outside is not None:
            shown = str(outside) if outside < 1 << 64 else "a huge number"
            raise InvalidRequest(
                f"{param}: {shown} is not a token of {self.function.name!r}; "
                f"ids go from 0 to {size - 1}",
                param=param,
            )

    def _check_stop_tokens(self, token_ids: Sequence[int]) -> None:
        self.check_token_ids(token_ids, param="stop_token_ids")

    def _budget(self, num_prompt: int, body: SamplingBody, default: int | None) -> int:
        """Return the most tokens to generate after a prompt."""
        limit, wanted = self.function.max_model_len, body.max_new_tokens
        room = limit - num_prompt
        if room < 1:
            raise ContextLengthExceeded(
                f"the prompt has {num_prompt} tokens and the context of {self.function.name!r} is "
                f"{limit} tokens, prompt and answer together; shorten the prompt to {limit - 1}",
                param="messages" if "messages" in type(body).model_fields else "prompt",
            )
        if wanted is None:
            return room if default is None else min(room, default)
        if wanted > room:
            raise ContextLengthExceeded(
                f"the prompt has {num_prompt} tokens, so the context of {self.function.name!r}, "
                f"{limit} tokens, leaves {room} for the answer and not {wanted}; "
                "shorten the prompt or lower the limit",
                param=body.limit_field,
            )
        return wanted

    def _sampling(self, body: SamplingBody, max_tokens: int, grammar: str) -> pb.SamplingParams:
        defaults = self.text.defaults
        top_k = defaults.top_k if body.top_k is None else body.top_k
        return pb.SamplingParams(
            temperature=defaults.temperature if body.temperature is None else body.temperature,
            top_p=defaults.top_p if body.top_p is None else body.top_p,
            top_k=max(top_k, 0),
            min_p=defaults.min_p if body.min_p is None else body.min_p,
            seed=None if body.seed is None else body.seed & UINT64_MASK,
            max_tokens=max_tokens,
            stop_token_ids=body.stop_token_ids or [],
            ignore_eos=bool(body.ignore_eos),
            grammar=grammar,
        )

    def _sequence_name(self, index: int, num_prompts: int) -> str:
        return self.request_id if num_prompts == 1 else f"{self.request_id}-{index}"


async def requested_grammar(body: SamplingBody) -> str:
    """Return the grammar that a request asks its answer to match; empty if it is free.

    Raises:
        InvalidRequest: It cannot be followed.
    """
    param = "response_format" if body.structured_outputs is None else "structured_outputs"
    structure = body.structured_outputs or body.response_format
    if structure is None:
        return ""
    try:
        grammar = structure.grammar()
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{param}: cannot be read: {error}", param=param) from error
    if grammar:
        await check_grammar(grammar, param=param)
    return grammar


async def collect(answer: Answer) -> list[tuple[str, str]]:
    """Run an answer to its end; return text and finish reason of each choice."""
    pieces: list[list[str]] = [[] for _ in range(answer.size)]
    reasons = [""] * answer.size

    async def take(index: int, text: str, finish_reason: str | None) -> None:
        pieces[index].append(text)
        reasons[index] = finish_reason or ""

    async with answer:
        await answer.run(take)
    return [("".join(texts), reason) for texts, reason in zip(pieces, reasons, strict=True)]
