"""Many mixed requests with random cancels, and a count of everything that could leak.

    python -m benchmarks.soak [--requests 20000] [--layers 8] [--concurrency 256] [--tokenizer DIR]
    python -m benchmarks.soak --snapshot DIR --requests 300 --concurrency 24

One engine on one GPU with the 8B shape's layers, few of them so that it takes minutes; or on the
CPU with a snapshot's model. Prompts, lengths, sampling, seeds, stop tokens, shared prefixes, cancels
and, given a tokenizer, grammars are random. Now and then a wave of short prompts with long answers
comes, which all begin and then outgrow the KV cache, so that sequences are preempted. Every few
requests comes a canary: greedy, and it must get the tokens that it got when it ran alone, up to
where the two likeliest are so close that rounding may decide. Exits with 1 if a request is lost,
fails, ends twice or leaves its grammar, a canary gets something else, a block is not given back,
memory of the host or the GPU has grown after the first tenth, a kernel was compiled, or nothing was
preempted. `benchmarks.soak_product` does the like through the whole product.
"""

import argparse
import gc
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

# As in the runtime: threads that spin take the core another one needs.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import psutil
import torch
from llguidance import LLMatcher

from benchmarks.shapes import LLAMA_3_1_8B, RandomWeights
from runtime.config import EngineConfig
from runtime.cpu.runner import CpuRunner
from runtime.engine.engine import Engine
from runtime.engine.grammars import GrammarCompiler
from runtime.engine.sequence import (
    FinishReason,
    SamplingParams,
    SequenceKey,
    SequenceRequest,
)
from runtime.gpu.runner import GpuRunner
from runtime.model.config import ModelConfig
from runtime.model.description import read_model

CANCEL_SHARE = 0.2
HOST_GROWTH_BYTES = 64 << 20
MAX_LEN = 2048
KV_TOKENS_EACH = 150
"""Room in the KV cache, on average."""
WAVE_SHARE, WAVES_APART = 1 / 64, 8
"""Share of the requests in a wave, and how many times as many there are until the next."""
CANARY_EVERY, NUM_CANARIES, CANARY_TOKENS = 10, 6, 24
NEAR_TIE = 0.1
"""Difference of log-probabilities that rounding may turn round."""
EOS = 2
GRAMMARS = (
    LLMatcher.grammar_from_regex("[a-f]{3,60}"),
    LLMatcher.grammar_from_json_schema(
        {
            "type": "object",
            "properties": {"warm": {"type": "boolean"}, "name": {"type": "string"}},
            "required": ["warm", "name"],
            "additionalProperties": False,
        }
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A request that is under way.

    Attributes:
        expected: What its answer must begin with: not empty for a canary.
        token_ids: Its answer so far.
    """

    request: SequenceRequest
    expected: Sequence[int] = ()
    token_ids: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Soak:
    """What was asked, and what came of it.

    Attributes:
        open: Requests under way.
        cancelled: Requests whose cancel was asked for before they ended.
        ends: How requests ended.
        faults: What must not happen, in words.
    """

    open: dict[SequenceKey, Asked] = field(default_factory=dict)
    cancelled: set[SequenceKey] = field(default_factory=set)
    ends: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    num_tokens: int = 0
    num_canary_tokens: int = 0
    num_constrained: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What requests are run on; without grammars none asks for one."""

    engine: Engine
    runner: GpuRunner | CpuRunner
    grammars: GrammarCompiler | None
    concurrency: int

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        return self.runner.vocab_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--concurrency", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer", type=Path, help="its directory, for grammars on the GPU")
    parser.add_argument("--snapshot", type=Path, help="of a small model, to run on the CPU")
    arguments = parser.parse_args()
    bench = open_bench(arguments)
    engine, runner = bench.engine, bench.runner
    rng = random.Random(arguments.seed)
    run_widest(bench)
    canaries = [make_canary(bench, 20 + 9 * index, rng) for index in range(NUM_CANARIES)]
    first = run(bench, arguments.requests // 10, canaries, rng)
    before = _memory()
    began = time.perf_counter()
    rest = arguments.requests - arguments.requests // 10
    second = run(bench, rest, canaries, rng)
    after = _memory()
    faults = first.faults + second.faults
    if runner.num_late_compilations:
        faults.append(f"{runner.num_late_compilations} kernels were compiled late")
    if after["gpu_bytes"] > before["gpu_bytes"]:
        faults.append(f"GPU memory grew from {before['gpu_bytes']} to {after['gpu_bytes']}")
    if after["host_bytes"] > before["host_bytes"] + HOST_GROWTH_BYTES:
        faults.append(f"host memory grew from {before['host_bytes']} to {after['host_bytes']}")
    figures = engine.figures()
    if not figures.num_preemptions:
        faults.append("no sequence was preempted")
    print(
        json.dumps(
            {
                "requests": arguments.requests,
                "ends": first.ends + second.ends,
                "tokens": first.num_tokens + second.num_tokens,
                "canary_tokens": first.num_canary_tokens + second.num_canary_tokens,
                "constrained": first.num_constrained + second.num_constrained,
                "seconds": round(time.perf_counter() - began, 1),
                "preemptions": figures.num_preemptions,
                "cached_prompt_tokens": figures.num_cached_prompt_tokens,
                "memory_before": before,
                "memory_after": after,
                "faults": faults,
            }
        )
    )
    if faults:
        sys.exit(1)


def open_bench(arguments: argparse.Namespace) -> Bench:
    """Return an engine that is warm."""
    if arguments.snapshot is None:
        shape = ModelConfig.from_hf(LLAMA_3_1_8B | {"num_hidden_layers": arguments.layers})
    else:
        shape = read_model(arguments.snapshot).config
    itemsize = 2 if arguments.snapshot is None else 4
    kv_tokens = arguments.concurrency * KV_TOKENS_EACH
    config = EngineConfig(
        max_model_len=MAX_LEN,
        max_num_seqs=arguments.concurrency,
        block_size=64 if arguments.snapshot is None else 16,
        kv_cache_bytes=kv_tokens * shape.kv_elements_per_token * itemsize,
    )
    runner: GpuRunner | CpuRunner
    if arguments.snapshot is None:
        runner = GpuRunner(shape, config, RandomWeights(shape))
    else:
        runner = CpuRunner.open(arguments.snapshot, config)
    runner.load_weights()
    runner.allocate_kv()
    runner.warm_up()
    tokenizer_dir = arguments.snapshot or arguments.tokenizer
    grammars = tokenizer_dir and GrammarCompiler(
        (tokenizer_dir / "tokenizer.json").read_text,
        vocab_size=runner.vocab_size,
        eos_token_ids=frozenset({EOS}),
    )
    engine = Engine(config, runner, frozenset({EOS}), grammars)
    while engine.use_idle_time():
        pass
    return Bench(engine=engine, runner=runner, grammars=grammars, concurrency=arguments.concurrency)


def run_widest(bench: Bench) -> None:
    """Run as many sequences as fit, all with log-probabilities, which take the most memory."""
    sampling = SamplingParams(num_logprobs=20, max_tokens=32, ignore_eos=True)
    for id in range(bench.concurrency):
        prompt = [id % bench.vocab_size]
        key = SequenceKey(1, id)
        bench.engine.submit(SequenceRequest(key=key, prompt_token_ids=prompt, sampling=sampling))
    while bench.engine.has_work():
        bench.engine.step()


def make_canary(bench: Bench, num_prompt_tokens: int, rng: random.Random) -> Asked:
    """Run a canary alone; return it with what its answer must begin with."""
    request = SequenceRequest(
        key=SequenceKey(2, num_prompt_tokens),
        prompt_token_ids=[rng.randrange(bench.vocab_size) for _ in range(num_prompt_tokens)],
        sampling=SamplingParams(
            temperature=0.0, max_tokens=CANARY_TOKENS, ignore_eos=True, num_logprobs=2
        ),
    )
    bench.engine.submit(request)
    expected: list[int] = []
    is_clear = True
    while bench.engine.has_work():
        result = bench.engine.step()
        for key, token_id in result.tokens:
            likeliest, second = result.logprobs[key].top_logprobs
            is_clear &= likeliest - second >= NEAR_TIE
            expected += [token_id] * is_clear
    return Asked(request=request, expected=expected)


def run(bench: Bench, num_requests: int, canaries: Sequence[Asked], rng: random.Random) -> Soak:
    """Send requests, cancel some, and run until all are over; an idle engine is left idle."""
    soak = Soak()
    engine, vocab_size = bench.engine, bench.vocab_size
    prefixes = [[rng.randrange(vocab_size) for _ in range(n)] for n in (64, 200, 600)]
    first_id = engine.figures().num_steps  # ids of an earlier run are not used again
    wave = max(1, int(num_requests * WAVE_SHARE))
    num_sent = 0
    while num_sent < num_requests or engine.has_work():
        while num_sent < num_requests and len(soak.open) < bench.concurrency * 5 // 4:
            key = SequenceKey(0, first_id * 100_000 + num_sent)
            if num_sent % CANARY_EVERY == 0:
                canary = rng.choice(canaries)
                asked = replace(canary, request=replace(canary.request, key=key), token_ids=[])
            elif num_sent // wave % WAVES_APART == 0:
                asked = Asked(request=long_answer(key, vocab_size, rng))
            else:
                has_grammars = bench.grammars is not None
                request = random_request(key, prefixes, vocab_size, rng, has_grammars=has_grammars)
                asked = Asked(request=request)
            engine.submit(asked.request)
            soak.open[key] = asked
            num_sent += 1
        if rng.random() < CANCEL_SHARE and soak.open:
            key = rng.choice(list(soak.open))
            engine.cancel(key)
            soak.cancelled.add(key)
        _take(bench, soak)
    if soak.open:
        soak.faults.append(f"{len(soak.open)} requests were lost")
    figures = engine.figures()
    if figures.num_free_kv_blocks != figures.num_kv_blocks:
        soak.faults.append(f"{figures.num_kv_blocks - figures.num_free_kv_blocks} blocks are held")
    return soak


def random_request(
    key: SequenceKey,
    prefixes: list[list[int]],
    vocab_size: int,
    rng: random.Random,
    *,
    has_grammars: bool,
) -> SequenceRequest:
    """Return a request of any kind that clients send."""
    prompt = [rng.randrange(vocab_size) for _ in range(int(rng.expovariate(1 / 150)) + 1)]
    if rng.random() < 0.3:
        prompt = rng.choice(prefixes) + prompt
    max_tokens = int(rng.expovariate(1 / 80)) + 1
    is_greedy, is_filtered = rng.random() < 0.3, rng.random() < 0.5
    has_penalties, has_logprobs = rng.random() < 0.2, rng.random() < 0.1
    sampling = SamplingParams(
        temperature=0.0 if is_greedy else rng.uniform(0.1, 2.0),
        top_p=rng.uniform(0.1, 1.0) if is_filtered else 1.0,
        top_k=rng.choice((0, 1, 20, 1000)) if is_filtered else 0,
        min_p=rng.choice((0.0, 0.05)) if is_filtered else 0.0,
        repetition_penalty=rng.uniform(0.8, 1.5) if has_penalties else 1.0,
        frequency_penalty=rng.uniform(-1.0, 1.0) if has_penalties else 0.0,
        presence_penalty=rng.uniform(-1.0, 1.0) if has_penalties else 0.0,
        logit_bias={rng.randrange(vocab_size): 5.0} if rng.random() < 0.1 else {},
        num_logprobs=rng.randrange(20) if has_logprobs else None,
        seed=rng.randrange(1 << 60) if rng.random() < 0.5 else None,
        max_tokens=min(max_tokens, MAX_LEN // 2),
        stop_token_ids=frozenset(rng.randrange(vocab_size) for _ in range(rng.choice((0, 0, 50)))),
        ignore_eos=rng.random() < 0.5,
        num_prompt_logprobs=rng.randrange(20) if rng.random() < 0.05 else None,
        grammar=rng.choice(GRAMMARS) if has_grammars and rng.random() < 0.2 else "",
    )
    return SequenceRequest(key=key, prompt_token_ids=prompt[: MAX_LEN // 2], sampling=sampling)


def long_answer(key: SequenceKey, vocab_size: int, rng: random.Random) -> SequenceRequest:
    """Return a request that needs little of the KV cache at first and much at last."""
    prompt = [rng.randrange(vocab_size) for _ in range(16)]
    sampling = SamplingParams(max_tokens=320, ignore_eos=True)
    return SequenceRequest(key=key, prompt_token_ids=prompt, sampling=sampling)


def _take(bench: Bench, soak: Soak) -> None:
    result = bench.engine.step()
    for key, token_id in result.tokens:
        asked = soak.open.get(key)
        if asked is None or len(asked.token_ids) == asked.request.sampling.max_tokens:
            soak.faults.append(f"{key} got a token after its end")
            continue
        asked.token_ids.append(token_id)
        soak.num_tokens += 1
    for finished in result.finished:
        asked = soak.open.pop(finished.key, None)
        if asked is None:
            soak.faults.append(f"{finished.key} ended twice")
            continue
        if finished.reason in (FinishReason.ERROR, FinishReason.REFUSED):
            soak.faults.append(f"{finished.key} failed: {finished.error}")
        if finished.reason is not FinishReason.CANCELLED:
            _check_answer(bench, soak, asked)
        elif finished.key not in soak.cancelled:
            soak.faults.append(f"{finished.key} was cancelled by nobody")
        soak.ends[finished.reason.value] += 1


def _check_answer(bench: Bench, soak: Soak, asked: Asked) -> None:
    key, token_ids = asked.request.key, asked.token_ids
    begun = token_ids[: len(asked.expected)]
    soak.num_canary_tokens += len(begun)
    if begun != list(asked.expected):
        soak.faults.append(f"{key}, a canary, got {begun}, alone it got {asked.expected}")
    grammar = asked.request.sampling.grammar
    if grammar:
        assert bench.grammars is not None, "else none is asked for"
        matcher = bench.grammars.compile(grammar).result().deep_copy()
        num_matching = matcher.try_consume_tokens(token_ids)
        soak.num_constrained += 1
        if num_matching != len(token_ids):
            soak.faults.append(f"{key} left its grammar after {num_matching} of {token_ids}")


def _memory() -> dict[str, int]:
    gc.collect()
    if not torch.cuda.is_available():
        return {"gpu_bytes": 0, "host_bytes": psutil.Process().memory_info().rss}
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return {"gpu_bytes": total - free, "host_bytes": psutil.Process().memory_info().rss}


if __name__ == "__main__":
    main()
