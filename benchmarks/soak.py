"""Many mixed requests with random cancels, and a count of everything that could leak.

    python -m benchmarks.soak [--requests 20000] [--layers 8] [--concurrency 256]

One engine on one GPU with the 8B shape's layers, few of them so that it takes minutes. Prompts,
lengths, sampling, seeds, stop tokens, shared prefixes and cancels are random. Now and then a wave
of short prompts with long answers comes, which all begin and then outgrow the KV cache, so that
sequences are preempted. Exits with 1 if a request is lost or ends twice, a block is not given back,
memory of the host or the GPU has grown after the first tenth, a kernel was compiled, or nothing was
preempted. What torch takes for log-probabilities it keeps, so a batch full of them comes first.
"""

import argparse
import gc
import json
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field

import psutil
import torch

from benchmarks.shapes import LLAMA_3_1_8B, RandomWeights
from runtime.config import EngineConfig
from runtime.engine.engine import Engine
from runtime.engine.sequence import (
    FinishReason,
    SamplingParams,
    SequenceKey,
    SequenceRequest,
)
from runtime.gpu.runner import GpuRunner
from runtime.model.config import ModelConfig

CANCEL_SHARE = 0.2
HOST_GROWTH_BYTES = 64 << 20
MAX_LEN = 2048
KV_TOKENS_EACH = 150
"""Room in the KV cache, on average."""
WAVE, WAVES_APART = 300, 8
"""Requests of a wave, and how many times as many there are until the next."""


@dataclass(slots=True)
class Soak:
    """What was asked, and what came of it.

    Attributes:
        open: Tokens still allowed, by request.
        cancelled: Requests whose cancel was asked for before they ended.
        ends: How requests ended.
        faults: What must not happen, in words.
    """

    open: dict[SequenceKey, int] = field(default_factory=dict)
    cancelled: set[SequenceKey] = field(default_factory=set)
    ends: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    num_tokens: int = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--concurrency", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    shape = ModelConfig.from_hf(LLAMA_3_1_8B | {"num_hidden_layers": arguments.layers})
    config = EngineConfig(
        max_model_len=MAX_LEN,
        max_num_seqs=arguments.concurrency,
        block_size=64,
        kv_cache_bytes=arguments.concurrency * KV_TOKENS_EACH * shape.kv_elements_per_token * 2,
    )
    runner = GpuRunner(shape, config, RandomWeights(shape))
    runner.load_weights()
    runner.allocate_kv()
    runner.warm_up()
    engine = Engine(config, runner, frozenset({2}))
    while engine.use_idle_time():
        pass
    rng = random.Random(arguments.seed)
    run_widest(engine, arguments.concurrency, shape.vocab_size)
    first = run(engine, arguments.requests // 10, arguments.concurrency, shape.vocab_size, rng)
    before = _memory()
    began = time.perf_counter()
    rest = arguments.requests - arguments.requests // 10
    second = run(engine, rest, arguments.concurrency, shape.vocab_size, rng)
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


def run_widest(engine: Engine, concurrency: int, vocab_size: int) -> None:
    """Run as many sequences as fit, all with log-probabilities, which take the most memory."""
    sampling = SamplingParams(num_logprobs=20, max_tokens=32, ignore_eos=True)
    for id in range(concurrency):
        prompt = [id % vocab_size]
        key = SequenceKey(1, id)
        engine.submit(SequenceRequest(key=key, prompt_token_ids=prompt, sampling=sampling))
    while engine.has_work():
        engine.step()


def run(
    engine: Engine, num_requests: int, concurrency: int, vocab_size: int, rng: random.Random
) -> Soak:
    """Send requests, cancel some, and run until all are over; an idle engine is left idle."""
    soak = Soak()
    prefixes = [[rng.randrange(vocab_size) for _ in range(n)] for n in (64, 200, 600)]
    first_id = engine.figures().num_steps  # ids of an earlier run are not used again
    num_sent = 0
    while num_sent < num_requests or engine.has_work():
        while num_sent < num_requests and len(soak.open) < concurrency * 5 // 4:
            key = SequenceKey(0, first_id * 100_000 + num_sent)
            is_wave = num_sent // WAVE % WAVES_APART == 0
            request = (
                long_answer(key, vocab_size, rng)
                if is_wave
                else random_request(key, prefixes, vocab_size, rng)
            )
            engine.submit(request)
            soak.open[key] = request.sampling.max_tokens
            num_sent += 1
        if rng.random() < CANCEL_SHARE and soak.open:
            key = rng.choice(list(soak.open))
            engine.cancel(key)
            soak.cancelled.add(key)
        _take(engine, soak)
    if soak.open:
        soak.faults.append(f"{len(soak.open)} requests were lost")
    figures = engine.figures()
    if figures.num_free_kv_blocks != figures.num_kv_blocks:
        soak.faults.append(f"{figures.num_kv_blocks - figures.num_free_kv_blocks} blocks are held")
    return soak


def random_request(
    key: SequenceKey, prefixes: list[list[int]], vocab_size: int, rng: random.Random
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
    )
    return SequenceRequest(key=key, prompt_token_ids=prompt[: MAX_LEN // 2], sampling=sampling)


def long_answer(key: SequenceKey, vocab_size: int, rng: random.Random) -> SequenceRequest:
    """Return a request that needs little of the KV cache at first and much at last."""
    prompt = [rng.randrange(vocab_size) for _ in range(16)]
    sampling = SamplingParams(max_tokens=320, ignore_eos=True)
    return SequenceRequest(key=key, prompt_token_ids=prompt, sampling=sampling)


def _take(engine: Engine, soak: Soak) -> None:
    result = engine.step()
    for key, _ in result.tokens:
        if key not in soak.open or soak.open[key] == 0:
            soak.faults.append(f"{key} got a token after its end")
            continue
        soak.open[key] -= 1
        soak.num_tokens += 1
    for finished in result.finished:
        if soak.open.pop(finished.key, None) is None:
            soak.faults.append(f"{finished.key} ended twice")
        if finished.reason is FinishReason.ERROR:
            soak.faults.append(f"{finished.key} failed: {finished.error}")
        if finished.reason is FinishReason.CANCELLED and finished.key not in soak.cancelled:
            soak.faults.append(f"{finished.key} was cancelled by nobody")
        soak.ends[finished.reason.value] += 1


def _memory() -> dict[str, int]:
    gc.collect()
    if not torch.cuda.is_available():
        return {"gpu_bytes": 0, "host_bytes": psutil.Process().memory_info().rss}
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return {"gpu_bytes": total - free, "host_bytes": psutil.Process().memory_info().rss}


if __name__ == "__main__":
    main()
