"""What rounding to bfloat16 costs a Llama of random weights, by where it is done; on the CPU.

    python -m benchmarks.rounding [--layers 32] [--tokens 64]

One forward pass in fp32, rounded in some places only, beside one that is rounded nowhere: the
Kullback-Leibler divergence of the next token's probabilities, by position. A quarter of the 8B's
width, weights with the same gain. What no engine that stores activations in bfloat16 can be
better than is the line in which they alone are rounded.
"""

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, silu

HIDDEN, INTERMEDIATE, VOCAB = 1024, 3584, 8192
HEADS, KV_HEADS, HEAD_DIM = 8, 2, 128
STD = 0.02 * math.sqrt(4096 / HIDDEN)
ROPE_BASE = 500_000.0

Rounding = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Where it is rounded: the sums of the residual stream, what products read, all they write."""

    residual: bool = False
    inputs: bool = False
    outputs: bool = False


PLACES: Mapping[str, Places] = {
    "residual stream": Places(residual=True),
    "inputs of products": Places(inputs=True),
    "both, as we do": Places(residual=True, inputs=True),
    "outputs of products too": Places(residual=True, inputs=True, outputs=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    embeddings = to_bfloat16(torch.randn(VOCAB, HIDDEN) * 0.02)
    layers = [draw_layer() for _ in range(arguments.layers)]
    head = draw(VOCAB, HIDDEN)
    hidden = embeddings[torch.randint(0, VOCAB, (arguments.tokens,))]
    exact = (forward(hidden, layers, Places()) @ head.T).log_softmax(-1)
    print(f"{arguments.layers} layers, {arguments.tokens} tokens, torch {torch.__version__}")
    print(f"{'rounded to bfloat16':26} {'KL, mean':>9} {'most':>9}")
    for name, places in PLACES.items():
        rounded = (forward(hidden, layers, places) @ head.T).log_softmax(-1)
        divergence = (exact.exp() * (exact - rounded)).sum(-1)
        print(f"{name:26} {divergence.mean():9.5f} {divergence.max():9.5f}")


def to_bfloat16(x: Tensor) -> Tensor:
    return x.bfloat16().float()


def keep(x: Tensor) -> Tensor:
    return x


def draw(*shape: int) -> Tensor:
    return to_bfloat16(torch.randn(*shape) * STD)


def draw_layer() -> Mapping[str, Tensor]:
    return {
        "qkv": draw((HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN),
        "o": draw(HIDDEN, HEADS * HEAD_DIM),
        "gate_up": draw(2 * INTERMEDIATE, HIDDEN),
        "down": draw(HIDDEN, INTERMEDIATE),
    }


def forward(hidden: Tensor, layers: Sequence[Mapping[str, Tensor]], places: Places) -> Tensor:
    """Return the last norm's output, fp32 [num_tokens, HIDDEN]."""
    at_sum = to_bfloat16 if places.residual else keep
    at_input = to_bfloat16 if places.inputs else keep
    at_output = to_bfloat16 if places.outputs else keep
    for layer in layers:
        attended = attend(at_input(norm(hidden)), layer["qkv"], at_input)
        hidden = at_sum(hidden + at_output(attended @ layer["o"].T))
        gate, up = at_output(at_input(norm(hidden)) @ layer["gate_up"].T).chunk(2, -1)
        gated = at_input(at_output(silu(gate)) * up)
        hidden = at_sum(hidden + at_output(gated @ layer["down"].T))
    return at_input(norm(hidden))


def attend(normed: Tensor, qkv_weight: Tensor, at_input: Rounding) -> Tensor:
    """Return causal attention, [num_tokens, HEADS * HEAD_DIM]; its products are inputs of others."""
    num_tokens = len(normed)
    qkv = at_input(normed @ qkv_weight.T).view(num_tokens, -1, HEAD_DIM).transpose(0, 1)
    q, k, v = torch.split(qkv, [HEADS, KV_HEADS, KV_HEADS])
    attended = scaled_dot_product_attention(
        at_input(rotated(q)), at_input(rotated(k)), v, is_causal=True, enable_gqa=True
    )
    return at_input(attended.transpose(0, 1).reshape(num_tokens, -1))


def rotated(x: Tensor) -> Tensor:
    frequencies = ROPE_BASE ** -(torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angles = torch.arange(x.shape[1])[:, None] * frequencies
    first, second = x.chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def norm(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)


if __name__ == "__main__":
    main()
