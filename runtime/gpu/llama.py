"""The Llama decoder on the GPU: four matrix products and four to six small kernels a layer.

Every intermediate result has its place in buffers made once, so that a forward pass allocates
nothing and a CUDA graph of it stays valid. The residual is added by the matrix products. What comes
after the last layer's attention concerns no other token, so it is left to those that are sampled.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from runtime.gpu.device import SideStream
from runtime.gpu.limits import BatchLimits
from runtime.gpu.linear import GpuGatedLinear, GpuLinear, named_tensor
from runtime.gpu.memory import WorkMemory
from runtime.kernels.batch_inputs import ModelInputs
from runtime.kernels.chunk_attention import chunk_attention
from runtime.kernels.decode_attention import SplitWorkspace, decode_attention
from runtime.kernels.norm import rms_norm
from runtime.kernels.rope import rope_and_cache
from runtime.model.config import ModelConfig
from runtime.model.rope import inverse_frequencies


def activation_bytes(
    config: ModelConfig, limits: BatchLimits, dtype: torch.dtype, max_model_len: int
) -> int:
    """Return the size of the buffers of a model, angles of all positions included."""
    widths = sum(_widths(config).values())
    q_size = config.num_heads * config.head_dim
    sampled = (config.hidden_size + q_size) * dtype.itemsize + 4 * (config.vocab_size + 64)
    angles = 4 * max_model_len * config.head_dim
    return limits.num_tokens * widths * dtype.itemsize + limits.num_seqs * sampled + angles


class Unfinished(NamedTuple):
    """A batch after the last layer's attention; what is left to do is each token's own.

    Attributes:
        hidden: The residual stream [num_tokens, hidden_size].
        attended: What the attention found [num_tokens, num_heads * head_dim].
    """

    hidden: Tensor
    attended: Tensor


class GpuLlama:
    """Token ids to logits, over a paged KV cache.

    Args:
        config: The model's shape.
        weights: Fused tensors under the snapshot's names; kept, not copied.
        limits: Of the batches.
        max_model_len: Positions are below this.
        work: Holds the buffers.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Tensor],
        *,
        limits: BatchLimits,
        max_model_len: int,
        work: WorkMemory,
    ) -> None:
        self._config = config
        self._embedding = named_tensor(weights, "embed_tokens.weight")
        self._norm = named_tensor(weights, "norm.weight")
        head = "embed_tokens" if config.tie_word_embeddings else "lm_head"
        self._head = GpuLinear(weights, head)
        self._layers = [_Layer(weights, f"layers.{i}") for i in range(config.num_layers)]
        device, dtype = self._embedding.device, self._embedding.dtype
        self._angles = _angles(config, max_model_len, device)
        # Zeros, since rows that pad a batch are computed on, if for nobody.
        self._buffers = {
            name: work.zeros(limits.num_tokens, width, dtype=dtype)
            for name, width in _widths(config).items()
        }
        self._sampled = Unfinished(
            work.zeros(limits.num_seqs, config.hidden_size, dtype=dtype),
            work.zeros(limits.num_seqs, config.num_heads * config.head_dim, dtype=dtype),
        )
        self._logits = work.zeros(limits.num_seqs, self._head.num_outputs, dtype=torch.float32)
        self._side = SideStream(device.type)
        self._workspace = SplitWorkspace(
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            device=device,
        )

    def forward(
        self,
        inputs: ModelInputs,
        kv_cache: Tensor,
        block_tables: Tensor,
        *,
        num_tokens: int,
        max_decodes: int,
        num_decodes: Tensor,
        tiles: Tensor | None,
    ) -> Unfinished:
        """Run a batch up to where tokens stop to concern each other.

        Args:
            inputs: Filled.
            kv_cache: [num_layers, num_blocks, 2, num_kv_heads, block_size, head_dim]; written.
            block_tables: int32 [num_rows, max_blocks].
            num_tokens: Tokens of the batch, padding included.
            max_decodes: There are no more sequences with one token than this.
            num_decodes: int32 [1], how many leading sequences have one token each.
            tiles: Of the others, for the chunk attention; None if there are none.

        Returns:
            What `logits` finishes, valid until the next call.
        """
        hidden, normed, qkv, attended = (
            self._buffers[name][:num_tokens] for name in ("hidden", "normed", "qkv", "attended")
        )
        positions, slots = inputs.positions[:num_tokens], inputs.slots[:num_tokens]
        rows, seq_lens = inputs.rows[:max_decodes], inputs.seq_lens[:max_decodes]
        eps = self._config.rms_norm_eps
        torch.index_select(self._embedding, 0, inputs.token_ids[:num_tokens], out=hidden)
        for index, (layer, layer_cache) in enumerate(
            zip(self._layers, kv_cache.unbind(), strict=False)
        ):
            if index:
                self._finish_layer(self._layers[index - 1], hidden, attended)
            rms_norm(hidden, layer.input_norm, eps, normed)
            layer.qkv(normed, qkv)
            rope_and_cache(qkv, layer_cache, positions, slots, self._angles)
            if tiles is not None:  # computes much and reads little, decodes the other way round
                with self._side.forked():
                    chunk_attention(
                        qkv,
                        layer_cache,
                        attended,
                        tiles=tiles,
                        block_tables=block_tables,
                    )
            decode_attention(
                qkv,
                layer_cache,
                attended[:max_decodes],
                block_tables=block_tables,
                rows=rows,
                seq_lens=seq_lens,
                num_decodes=num_decodes,
                workspace=self._workspace,
            )
            if tiles is not None:
                self._side.join()
        return Unfinished(hidden, attended)

    def _finish_layer(self, layer: "_Layer", hidden: Tensor, attended: Tensor) -> None:
        normed, gate_up, gated = (
            self._buffers[name][: len(hidden)] for name in ("normed", "gate_up", "gated")
        )
        layer.output.add(attended, hidden)
        rms_norm(hidden, layer.mlp_norm, self._config.rms_norm_eps, normed)
        layer.gate(normed, gate_up, gated)
        layer.down.add(gated, hidden)

    @contextmanager
    def shortened(self) -> Iterator[None]:
        """Run only the first layer, which uses every kernel that the others do."""
        layers, self._layers = self._layers, self._layers[:1]
        try:
            yield
        finally:
            self._layers = layers

    def compile_products(self) -> None:
        """Compile kernels of matrix products that a batch of some size may need."""
        self._layers[0].gate.compile(self._buffers["normed"], self._buffers["gated"])

    def run_products(self, num_tokens: int) -> None:
        """Run a layer's products, those that cuBLAS computes; what is in the buffers is lost."""
        hidden, normed, qkv, attended, gate_up, gated = (
            self._buffers[name][:num_tokens] for name in _widths(self._config)
        )
        layer = self._layers[0]
        layer.qkv(normed, qkv)
        layer.output.add(attended, hidden)
        layer.gate.run_product(normed, gate_up)
        layer.down.add(gated, hidden)

    def logits(self, batch: Unfinished, rows: Tensor | None) -> Tensor:
        """Finish some tokens of a batch.

        Args:
            batch: Of the last `forward`; it stays as it is only if `rows` are given.
            rows: int32 [num_rows], which tokens, at most as many as a batch has sequences; None
                takes all.

        Returns:
            fp32 [num_rows, padded vocabulary], valid until the next call.
        """
        hidden, attended = batch
        if rows is not None:
            hidden, attended = (buffer[: len(rows)] for buffer in self._sampled)
            torch.index_select(batch.hidden, 0, rows, out=hidden)
            torch.index_select(batch.attended, 0, rows, out=attended)
        logits = self._logits[: len(hidden)]
        if not len(hidden):
            return logits
        self._finish_layer(self._layers[-1], hidden, attended)
        normed = self._buffers["normed"][: len(hidden)]
        rms_norm(hidden, self._norm, self._config.rms_norm_eps, normed)
        self._head(normed, logits)
        return logits


class _Layer:
    """One layer's weights."""

    def __init__(self, weights: Mapping[str, Tensor], name: str) -> None:
        self.input_norm = named_tensor(weights, f"{name}.input_layernorm.weight")
        self.qkv = GpuLinear(weights, f"{name}.self_attn.qkv_proj")
        self.output = GpuLinear(weights, f"{name}.self_attn.o_proj")
        self.mlp_norm = named_tensor(weights, f"{name}.post_attention_layernorm.weight")
        self.gate = GpuGatedLinear(weights, f"{name}.mlp.gate_up_proj")
        self.down = GpuLinear(weights, f"{name}.mlp.down_proj")


def _widths(config: ModelConfig) -> dict[str, int]:
    """Return what a token takes in each buffer, in elements."""
    q_size = config.num_heads * config.head_dim
    return {
        "hidden": config.hidden_size,
        "normed": config.hidden_size,
        "qkv": q_size + 2 * config.num_kv_heads * config.head_dim,
        "attended": q_size,
        "gate_up": 2 * config.intermediate_size,
        "gated": config.intermediate_size,
    }


def _angles(config: ModelConfig, max_model_len: int, device: torch.device) -> Tensor:
    """Return cosines and sines of every position, fp32 [max_model_len, 2, head_dim / 2]."""
    frequencies = inverse_frequencies(config.rope, config.head_dim).to(device)
    radians = torch.outer(torch.arange(max_model_len, device=device).float(), frequencies)
    return torch.stack((radians.cos(), radians.sin()), 1)
