"""Between wire messages and the engine's own types; no decisions."""

from runtime.config import EngineConfig
from runtime.engine.sequence import (
    FinishedSequence,
    FinishReason,
    PromptLogprobs,
    SamplingParams,
    SequenceKey,
    SequenceRequest,
    TokenLogprobs,
)
from runtime.engine_api import Runner
from runtime.rpc import inference_pb2 as pb

_REASONS = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: pb.FINISH_REASON_CANCELLED,
    FinishReason.ERROR: pb.FINISH_REASON_ERROR,
    FinishReason.REFUSED: pb.FINISH_REASON_REFUSED,
}


def engine_config(request: pb.LoadRequest) -> EngineConfig:
    """Return the configuration a load asks for; what is unset takes the runtime's default."""
    chosen = {field.name: value for field, value in request.engine.ListFields()}
    if request.HasField("engine"):
        chosen["enable_prefix_caching"] = request.engine.enable_prefix_caching  # false means false
    return EngineConfig(
        memory_limit_bytes=request.memory_limit_bytes,
        device_memory_bytes=request.device_memory_bytes,
        **chosen,
    )


def sequence_request(key: SequenceKey, submit: pb.Submit) -> SequenceRequest:
    """Return a submitted sequence as the engine takes it."""
    sampling = submit.sampling
    return SequenceRequest(
        key=key,
        prompt_token_ids=list(submit.prompt_token_ids),
        sampling=SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            seed=sampling.seed if sampling.HasField("seed") else None,
            max_tokens=sampling.max_tokens,
            stop_token_ids=frozenset(sampling.stop_token_ids),
            ignore_eos=sampling.ignore_eos,
            repetition_penalty=(
                sampling.repetition_penalty if sampling.HasField("repetition_penalty") else 1.0
            ),
            frequency_penalty=sampling.frequency_penalty,
            presence_penalty=sampling.presence_penalty,
            logit_bias=dict(sampling.logit_bias),
            num_logprobs=sampling.num_logprobs if sampling.HasField("num_logprobs") else None,
            min_tokens=sampling.min_tokens,
            allowed_token_ids=frozenset(sampling.allowed_token_ids),
            bad_words=tuple(tuple(word.token_ids) for word in sampling.bad_words),
            grammar=sampling.grammar,
            num_prompt_logprobs=(
                sampling.num_prompt_logprobs if sampling.HasField("num_prompt_logprobs") else None
            ),
        ),
        priority=submit.priority,
        cache_salt=submit.cache_salt,
    )


def logprobs_message(sequence_id: int, logprobs: TokenLogprobs) -> pb.TokenLogprobs:
    """Return a token's log-probabilities as they go over the wire."""
    return pb.TokenLogprobs(
        sequence_id=sequence_id,
        logprob=logprobs.logprob,
        top_token_ids=logprobs.top_token_ids,
        top_logprobs=logprobs.top_logprobs,
    )


def prompt_logprobs_message(sequence_id: int, found: PromptLogprobs) -> pb.PromptLogprobs:
    """Return a prompt's log-probabilities as they go over the wire."""
    return pb.PromptLogprobs(
        sequence_id=sequence_id,
        first=found.first,
        logprobs=found.logprobs,
        top_token_ids=found.top_token_ids,
        top_logprobs=found.top_logprobs,
    )


def finished_message(finished: FinishedSequence) -> pb.Finished:
    """Return the end of a sequence as it goes over the wire."""
    return pb.Finished(
        sequence_id=finished.key.sequence_id,
        reason=_REASONS[finished.reason],
        num_prompt_tokens=finished.num_prompt_tokens,
        num_cached_tokens=finished.num_cached_tokens,
        num_output_tokens=finished.num_output_tokens,
        error=finished.error,
    )


def load_figures(figures: object) -> pb.LoadFigures:
    """Return an engine's figures, which carry the names of the wire's fields."""
    names = (field.name for field in pb.LoadFigures.DESCRIPTOR.fields)
    return pb.LoadFigures(**{name: getattr(figures, name) for name in names})


def memory_message(runner: Runner) -> pb.Memory:
    """Return what a runner holds of its device now."""
    return pb.Memory(
        weights_bytes=runner.weights_bytes,
        kv_cache_bytes=runner.kv_cache_bytes,
        kept_reason=runner.kept_reason,
        kept_bytes=runner.kept_bytes,
    )
