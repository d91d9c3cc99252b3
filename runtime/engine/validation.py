"""What a sequence must be before it may reach the step loop. No torch.

Everything a client can send is checked here, so that nothing it sends can stop the loop.
"""

import math
from collections.abc import Sequence as SequenceOf

from runtime.engine.sequence import SamplingParams, SequenceRequest
from runtime.errors import InvalidSequence

MAX_SEED = 2**64 - 1
MAX_LOGPROBS = 20
MAX_LOGIT_BIASES = 1024
MAX_BAD_WORDS = 1024
MAX_GRAMMAR_CHARS = 1 << 20
MAX_REPETITION_PENALTY = 1e6  # and no less than its inverse: logits stay finite
MAX_LOGIT_BIAS = 1e6  # far beyond any logit, and still finite when added to one


def check_request(request: SequenceRequest, *, vocab_size: int, max_model_len: int) -> None:
    """Raise InvalidSequence unless the engine can run the request."""
    check_prompt(request.prompt_token_ids, vocab_size=vocab_size, max_model_len=max_model_len)
    check_sampling(request.sampling, vocab_size=vocab_size)


def check_prompt(token_ids: SequenceOf[int], *, vocab_size: int, max_model_len: int) -> None:
    """Raise InvalidSequence unless the prompt has tokens, all known, and leaves room for one."""
    if not token_ids:
        raise InvalidSequence("the prompt is empty: send at least one token")
    if len(token_ids) >= max_model_len:
        raise InvalidSequence(
            f"the prompt has {len(token_ids)} tokens, which leaves no room for an answer within "
            f"max_model_len={max_model_len}: shorten it"
        )
    for token_id in (min(token_ids), max(token_ids)):
        if not 0 <= token_id < vocab_size:
            raise InvalidSequence(
                f"token id {token_id!r} is not in the vocabulary [0, {vocab_size}): was the "
                "prompt made with this model's tokenizer?"
            )


def check_sampling(sampling: SamplingParams, *, vocab_size: int) -> None:
    """Raise InvalidSequence unless every value is in its range."""
    _check(
        math.isfinite(sampling.temperature) and sampling.temperature >= 0,
        "temperature",
        sampling.temperature,
        "a finite number of at least 0",
    )
    _check(0 < sampling.top_p <= 1, "top_p", sampling.top_p, "above 0 and at most 1; 1 is off")
    _check(sampling.top_k >= 0, "top_k", sampling.top_k, "at least 0; 0 is off")
    _check(0 <= sampling.min_p <= 1, "min_p", sampling.min_p, "between 0 and 1; 0 is off")
    _check(sampling.max_tokens >= 1, "max_tokens", sampling.max_tokens, "at least 1")
    least, most = 1 / MAX_REPETITION_PENALTY, MAX_REPETITION_PENALTY
    _check(
        least <= sampling.repetition_penalty <= most,
        "repetition_penalty",
        sampling.repetition_penalty,
        f"between {least:g} and {most:g}; 1 is off",
    )
    for name, penalty in (
        ("frequency_penalty", sampling.frequency_penalty),
        ("presence_penalty", sampling.presence_penalty),
    ):
        _check(math.isfinite(penalty), name, penalty, "a finite number; 0 is off")
    num_biases = len(sampling.logit_bias)
    _check(num_biases <= MAX_LOGIT_BIASES, "len(logit_bias)", num_biases, "at most 1024 tokens")
    for token_id, bias in sampling.logit_bias.items():
        expected = f"for a token in [0, {vocab_size}) and between -1e6 and 1e6"
        is_valid = 0 <= token_id < vocab_size and abs(bias) <= MAX_LOGIT_BIAS
        _check(is_valid, f"logit_bias[{token_id}]", bias, expected)
    most = min(MAX_LOGPROBS, vocab_size)
    for name, number in (
        ("num_logprobs", sampling.num_logprobs),
        ("num_prompt_logprobs", sampling.num_prompt_logprobs),
    ):
        if number is not None:
            _check(0 <= number <= most, name, number, f"between 0 and {most}")
    is_valid = 0 <= sampling.min_tokens <= sampling.max_tokens
    _check(is_valid, "min_tokens", sampling.min_tokens, "between 0 and max_tokens")
    num_words, size = len(sampling.bad_words), len(sampling.grammar)
    _check(num_words <= MAX_BAD_WORDS, "len(bad_words)", num_words, f"at most {MAX_BAD_WORDS}")
    _check(size <= MAX_GRAMMAR_CHARS, "len(grammar)", size, f"at most {MAX_GRAMMAR_CHARS}")
    for name, words in (
        ("bad_words", sampling.bad_words),
        ("allowed_token_ids", ((token_id,) for token_id in sampling.allowed_token_ids)),
        ("stop_token_ids", ((token_id,) for token_id in sampling.stop_token_ids)),
    ):
        for word in words:
            expected = f"tokens in [0, {vocab_size})"
            is_known = bool(word) and min(word) >= 0 and max(word) < vocab_size
            _check(is_known, name, next(iter(word), -1), expected)
    if sampling.seed is not None:
        _check(0 <= sampling.seed <= MAX_SEED, "seed", sampling.seed, "between 0 and 2**64 - 1")


def _check(is_valid: bool, name: str, value: float, expected: str) -> None:
    if not is_valid:
        raise InvalidSequence(f"{name} is {value!r}: it must be {expected}")
