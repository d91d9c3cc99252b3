from runtime.engine.sequence import PromptLogprobs, SamplingParams, SequenceKey, TokenLogprobs
from runtime.rpc import inference_pb2 as pb
from runtime.translate import logprobs_message, prompt_logprobs_message, sequence_request

KEY = SequenceKey(3, 7)


def over_the_wire(sampling: pb.SamplingParams) -> SamplingParams:
    """Return what the engine gets of sampling parameters that were sent."""
    sent = pb.Submit(sequence_id=7, prompt_token_ids=[5, 6], sampling=sampling)
    request = sequence_request(KEY, pb.Submit.FromString(sent.SerializeToString()))
    assert request.key == KEY
    assert request.prompt_token_ids == [5, 6]
    return request.sampling


def test_every_sampling_parameter_reaches_the_engine() -> None:
    sent = pb.SamplingParams(
        temperature=0.5,
        top_p=0.25,
        top_k=40,
        min_p=0.125,
        seed=0,
        max_tokens=9,
        stop_token_ids=[2, 11, 2],
        ignore_eos=True,
        repetition_penalty=1.5,
        frequency_penalty=0.75,
        presence_penalty=-0.5,
        logit_bias={4: -100.0, 9: 2.5},
        num_logprobs=0,
        grammar='start: "a"',
        min_tokens=3,
        allowed_token_ids=[5, 4],
        bad_words=[pb.TokenIds(token_ids=[1, 2]), pb.TokenIds(token_ids=[3])],
        num_prompt_logprobs=0,
    )
    assert {field.name for field, _ in sent.ListFields()} == set(sent.DESCRIPTOR.fields_by_name)
    assert over_the_wire(sent) == SamplingParams(
        temperature=0.5,
        top_p=0.25,
        top_k=40,
        min_p=0.125,
        seed=0,
        max_tokens=9,
        stop_token_ids=frozenset({2, 11}),
        ignore_eos=True,
        repetition_penalty=1.5,
        frequency_penalty=0.75,
        presence_penalty=-0.5,
        logit_bias={4: -100.0, 9: 2.5},
        num_logprobs=0,
        grammar='start: "a"',
        min_tokens=3,
        allowed_token_ids=frozenset({4, 5}),
        bad_words=((1, 2), (3,)),
        num_prompt_logprobs=0,
    )


def test_no_seed_is_not_seed_zero() -> None:
    assert over_the_wire(pb.SamplingParams(max_tokens=1)).seed is None


def test_what_is_not_sent_is_off() -> None:
    sampling = over_the_wire(pb.SamplingParams(max_tokens=1))
    assert not sampling.has_penalties
    assert sampling.num_logprobs is None
    assert sampling.num_prompt_logprobs is None


def test_logprobs_go_over_the_wire() -> None:
    sent = logprobs_message(7, TokenLogprobs(-0.5, (3, 1), (-0.5, -1.25)))
    received = pb.TokenLogprobs.FromString(sent.SerializeToString())
    assert (received.sequence_id, received.logprob) == (7, -0.5)
    assert list(received.top_token_ids) == [3, 1]
    assert list(received.top_logprobs) == [-0.5, -1.25]


def test_priority_and_salt_reach_the_engine() -> None:
    sent = pb.Submit(sequence_id=7, prompt_token_ids=[5], priority=-3, cache_salt="mine")
    request = sequence_request(KEY, pb.Submit.FromString(sent.SerializeToString()))
    assert (request.priority, request.cache_salt) == (-3, "mine")


def test_prompt_logprobs_go_over_the_wire() -> None:
    sent = prompt_logprobs_message(7, PromptLogprobs(3, [-0.5, -2.0], [1, 2], [-0.25, -0.5]))
    received = pb.PromptLogprobs.FromString(sent.SerializeToString())
    assert (received.sequence_id, received.first) == (7, 3)
    assert list(received.logprobs) == [-0.5, -2.0]
    assert list(received.top_token_ids) == [1, 2]
    assert list(received.top_logprobs) == [-0.25, -0.5]
