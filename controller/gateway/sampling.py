"""From a request's fields to the engine's sampling parameters, with the author's defaults."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from controller.gateway.schemas.sampling import SamplingBody
from runtime.rpc import inference_pb2 as pb

UINT64_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingDefaults:
    """What the model's author recommends for fields a request leaves out."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @classmethod
    def from_generation_config(cls, config: Mapping[str, Any]) -> Self:
        """Take the usable values of a generation_config.json; a greedy one recommends none."""
        if config.get("do_sample") is False:
            return cls()
        limits = {
            "temperature": (0, 2),
            "top_p": (1e-6, 1),
            "top_k": (0, 2**31 - 1),
            "min_p": (0, 1),
            "repetition_penalty": (1e-6, 100),
        }
        usable = {
            name: config[name]
            for name, (low, high) in limits.items()
            if _is_number(config.get(name)) and low <= config[name] <= high
        }
        return cls(**{**usable, "top_k": int(usable.get("top_k", 0))})


def sampling_params(
    body: SamplingBody,
    defaults: SamplingDefaults,
    *,
    max_tokens: int,
    bad_words: Sequence[Sequence[int]],
    grammar: str,
) -> pb.SamplingParams:
    """Return how to sample, but for the seed.

    Args:
        body: The request; a field that is left out takes its default.
        defaults: The model's.
        max_tokens: Most tokens to generate.
        bad_words: The request's, as token ids.
        grammar: What the answer must match; empty for anything.
    """
    chosen = {
        name: default if (value := getattr(body, name)) is None else value
        for name, default in asdict(defaults).items()
    }
    chosen["top_k"] = max(chosen["top_k"], 0)
    if chosen["top_p"] == 0:
        chosen |= {"temperature": 0.0, "top_p": 1.0, "top_k": 0}  # the likeliest, ties settled
    return pb.SamplingParams(
        **chosen,
        max_tokens=max_tokens,
        stop_token_ids=body.stop_token_ids or [],
        ignore_eos=bool(body.ignore_eos),
        frequency_penalty=body.frequency_penalty or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        logit_bias={int(key): bias for key, bias in (body.logit_bias or {}).items()},
        num_logprobs=body.num_logprobs,
        num_prompt_logprobs=body.num_prompt_logprobs,
        min_tokens=body.min_tokens or 0,
        allowed_token_ids=body.allowed_token_ids or [],
        bad_words=[pb.TokenIds(token_ids=word) for word in bad_words],
        grammar=grammar,
    )


def of_choice(sampling: pb.SamplingParams, body: SamplingBody, choice: int) -> pb.SamplingParams:
    """Return parameters for one of several answers to a prompt.

    Each draws otherwise. The first tells how likely the prompt was, the others only if they echo
    that: to know it, the engine has to compute the whole prompt again.
    """
    own = pb.SamplingParams()
    own.CopyFrom(sampling)
    if body.seed is not None:
        own.seed = (body.seed + choice) & UINT64_MASK
    if choice and not body.echoes_tokens:
        own.ClearField("num_prompt_logprobs")
    return own


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
