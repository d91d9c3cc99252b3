"""Nothing that a request may ask for compiles a kernel; without a GPU, would compile one.

What Triton compiles a kernel anew for is asked of Triton itself, by what each launch passes: its
cache, and what earlier tests have compiled, would hide a kernel from a count of compilations. In
the interpreter, which is slow, the model's kernels are not even run: tokens are any that may be.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from llguidance import LLMatcher
from triton import JITFunction
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import create_function_from_signature

from runtime.config import EngineConfig
from runtime.engine.engine import Engine
from runtime.engine.grammars import GrammarCompiler
from runtime.engine.sequence import FinishReason, SamplingParams
from runtime.kernels import sampling as sampling_kernels
from runtime.kernels.norm import rms_norm
from tests.fakes.tokenizers import byte_level_tokenizer
from tests.runtime.engine.sequences import new_request
from tests.runtime.gpu.test_runner import new_gpu_runner, tiny_llama
from tests.runtime.kernels.device import DEVICE, DTYPES

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
TOKENIZER = byte_level_tokenizer()
VOCAB_SIZE = TOKENIZER.get_vocab_size() + 5
CONFIG = EngineConfig(
    kv_cache_bytes=1 << 23, max_num_seqs=40, max_num_batched_tokens=64, max_model_len=128
)
HALF = DTYPES[-1]  # bf16 where there is a GPU

GREEDY = SamplingParams(temperature=0.0)
KINDS = {
    "greedy": GREEDY,
    "seeded": SamplingParams(temperature=0.7, seed=3),
    "filters": SamplingParams(temperature=0.7, top_p=0.9, top_k=20, min_p=0.01),
    "penalties": replace(GREEDY, repetition_penalty=1.2, frequency_penalty=0.5),
    "presence penalty": replace(GREEDY, presence_penalty=0.5),
    "biases": replace(GREEDY, logit_bias={3: 1.0, 4: -1.0}),
    "log-probabilities": replace(GREEDY, num_logprobs=5),
    "log-probabilities of prompts": replace(GREEDY, num_prompt_logprobs=3),
    "grammar": replace(GREEDY, grammar=LLMatcher.grammar_from_regex("[a-f]{20}")),
    "tokens": replace(GREEDY, allowed_token_ids=frozenset({5, 300}), bad_words=((5, 5),)),
    "least length": replace(GREEDY, min_tokens=2),
}  # fmt: skip


def everything() -> SamplingParams:
    """Return all of it at once."""
    changed = {
        name: getattr(params, name)
        for params in KINDS.values()
        for name in SamplingParams.__slots__
        if getattr(params, name) != getattr(SamplingParams(), name)
    }
    return SamplingParams(**changed | {"temperature": 0.7, "allowed_token_ids": frozenset()})


@dataclass(frozen=True, slots=True, kw_only=True)
class Warm:
    """An engine that was warmed up, and what all its launches so far were compiled for."""

    engine: Engine
    grammars: GrammarCompiler
    compiled: set[str]


@pytest.fixture(
    scope="module", params=[(torch.float32, 16), (HALF, 64)], ids=["fp32", "16 bits, blocks of 64"]
)
def warm(request: pytest.FixtureRequest) -> Iterator[Warm]:
    dtype, block_size = request.param
    sizes: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
    if dtype is not torch.float32:  # the sizes that Hopper's kernels want
        sizes |= {"head_dim": 64, "hidden_size": 128, "intermediate_size": 128}
    config = replace(CONFIG, block_size=block_size)
    with pytest.MonkeyPatch.context() as patch:
        compiled = note_compiled(patch)
        runner = new_gpu_runner(tiny_llama(vocab_size=VOCAB_SIZE, **sizes).to(dtype), config)
        runner.warm_up()
        eos_token_ids = frozenset({2})
        grammars = GrammarCompiler(
            TOKENIZER.to_str, vocab_size=VOCAB_SIZE, eos_token_ids=eos_token_ids
        )
        engine = Engine(config, runner, eos_token_ids, grammars)
        yield Warm(engine=engine, grammars=grammars, compiled=compiled)


def note_compiled(patch: pytest.MonkeyPatch) -> set[str]:
    """Return what will hold all that kernels are launched with and compiled anew for."""
    compiled: set[str] = set()
    backend = make_backend(GPUTarget("cuda", 90, 32))

    def noting(run: Any) -> Any:
        def noted(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
            kernel = self
            is_interpreted = isinstance(self, InterpretedFunction)
            if is_interpreted:
                kernel = JITFunction(self.fn, do_not_specialize=self.kwargs["do_not_specialize"])
            bind = create_function_from_signature(kernel.signature, kernel.params, backend)
            _, specialization, options = bind(*args, **kwargs)
            compiled.add(f"{kernel.fn.__name__} {specialization} {options}")
            if is_interpreted and self.fn.__module__ != sampling_kernels.__name__:
                return None
            return run(self, *args, grid=grid, warmup=warmup, **kwargs)

        return noted

    for cls in (JITFunction, InterpretedFunction):
        patch.setattr(cls, "run", noting(cls.run))
    return compiled


@pytest.mark.parametrize("sampling", [*KINDS.values(), everything()], ids=[*KINDS, "everything"])
def test_no_request_compiles_a_kernel(warm: Warm, sampling: SamplingParams) -> None:
    before = set(warm.compiled)
    for num_sequences in (1, 5):
        run(warm, [replace(sampling, max_tokens=2)] * num_sequences)
    assert warm.compiled - before == set()
    assert warm.engine.figures().num_late_compilations == 0


def test_no_number_of_sequences_compiles_a_kernel(warm: Warm) -> None:
    before = set(warm.compiled)
    for num_sequences in (2, 3, 9, 17, 33, CONFIG.max_num_seqs):
        run(warm, [replace(GREEDY, max_tokens=3)] * num_sequences, prompt_sizes=(1,))
    assert warm.compiled - before == set()
    assert warm.engine.figures().num_late_compilations == 0


def test_no_mix_of_requests_compiles_a_kernel(warm: Warm) -> None:
    before = set(warm.compiled)
    kinds = [*KINDS.values(), everything()]
    run(warm, [replace(sampling, max_tokens=2 + i % 3) for i, sampling in enumerate(kinds)])
    assert warm.compiled - before == set()
    assert warm.engine.figures().num_late_compilations == 0


def test_a_kernel_that_is_compiled_late_is_noticed(warm: Warm) -> None:
    before = set(warm.compiled)
    x = torch.ones(1, 321, device=DEVICE)
    rms_norm(x, x[0], 1e-5, torch.empty_like(x))
    assert len(warm.compiled - before) == 1


def run(
    warm: Warm,
    samplings: Sequence[SamplingParams],
    prompt_sizes: Sequence[int] = (1, 70, 4, 17, 9),
) -> None:
    """Run prompts of some sizes in turn; the largest takes several steps."""
    for sampling in samplings:  # else sequences wait for their grammars, and for each other
        if sampling.grammar:
            warm.grammars.compile(sampling.grammar).result()
    for id, sampling in enumerate(samplings):
        prompt = [(7 * id + i) % VOCAB_SIZE for i in range(prompt_sizes[id % len(prompt_sizes)])]
        warm.engine.submit(new_request(id, prompt, sampling=sampling))
    ends = []
    while warm.engine.has_work():
        ends += warm.engine.step().finished
    assert len(ends) == len(samplings)
    assert {end.reason for end in ends} <= {FinishReason.LENGTH, FinishReason.STOP}, ends
