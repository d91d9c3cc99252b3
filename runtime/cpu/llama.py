"""The Llama decoder: RMSNorm, rotary grouped-query attention, gated SiLU MLP.

Plain objects over fused tensors, no modules: a forward pass at one token is mostly Python, and
every call saved in a layer is saved thirty times.
"""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from runtime.cpu.attention import AttentionPlan, paged_attention
from runtime.cpu.builder import PartBuilder
from runtime.model.config import ModelConfig
from runtime.model.rope import Rope, rotate


class Llama:
    """Token ids to hidden states to logits, over a paged KV cache.

    Args:
        config: The model's shape.
        weights: Fused tensors under the snapshot's names; kept, not copied.
        is_packed: Compute in fp32 with packed weights instead of in the weights' dtype.

    Attributes:
        dtype: Of activations and of the KV cache.
        embedding: [padded vocabulary, hidden_size].
        packables: What `pack_all` makes faster, in groups of about one layer; the head first,
            since it is the slowest unpacked.
    """

    def __init__(
        self, config: ModelConfig, weights: Mapping[str, Tensor], *, is_packed: bool
    ) -> None:
        builder = PartBuilder(weights, is_packed=is_packed)
        self.config = config
        self.embedding = builder.tensor("embed_tokens.weight")
        self.dtype = builder.dtype_of(self.embedding)
        self._rope = Rope(config.rope, config.head_dim)
        self._norm = builder.rms_norm("norm", config.rms_norm_eps)
        self._head = builder.linear("embed_tokens" if config.tie_word_embeddings else "lm_head")
        head_packables = builder.take_packables()
        self.packables = [head_packables] if head_packables else []
        self._layers = []
        for index in range(config.num_layers):
            self._layers.append(_Layer(config, builder, f"layers.{index}"))
            self.packables.append(builder.take_packables())

    def forward(self, token_ids: Tensor, kv_cache: Tensor, plan: AttentionPlan) -> Tensor:
        """Run a batch through all layers.

        Args:
            token_ids: int64 [num_tokens].
            kv_cache: [num_layers, num_blocks, block_size, 2, num_kv_heads, head_dim]; written.
            plan: Where the tokens are in the cache.

        Returns:
            Hidden states before the last norm [num_tokens, hidden_size].
        """
        hidden = F.embedding(token_ids, self.embedding).to(self.dtype)
        rotation = self._rope.rotation(plan.positions, self.dtype)
        for layer, layer_cache in zip(self._layers, kv_cache.unbind(), strict=True):
            layer(hidden, rotation, layer_cache, plan)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits, fp32 [num_rows, vocab_size], of hidden states [num_rows, hidden_size]."""
        return self._head(self._norm(hidden))[:, : self.config.vocab_size].float()


class _Layer:
    """Attention and MLP, each added to the residual stream, which is updated in place."""

    def __init__(self, config: ModelConfig, builder: PartBuilder, name: str) -> None:
        self._head_dim = config.head_dim
        self._num_heads = config.num_heads
        self._q_size = config.num_heads * config.head_dim
        self._num_qk_heads = config.num_heads + config.num_kv_heads
        self._input_norm = builder.rms_norm(f"{name}.input_layernorm", config.rms_norm_eps)
        self._qkv = builder.linear(f"{name}.self_attn.qkv_proj")
        self._output = builder.linear(f"{name}.self_attn.o_proj")
        self._mlp_norm = builder.rms_norm(f"{name}.post_attention_layernorm", config.rms_norm_eps)
        self._gate_up = builder.linear(f"{name}.mlp.gate_up_proj")
        self._down = builder.linear(f"{name}.mlp.down_proj")

    def __call__(
        self,
        hidden: Tensor,
        rotation: tuple[Tensor, Tensor],
        kv_cache: Tensor,
        plan: AttentionPlan,
    ) -> None:
        qkv = self._qkv(self._input_norm(hidden))
        heads = qkv.view(len(qkv), -1, self._head_dim)
        rotate(heads[:, : self._num_qk_heads], rotation)
        q = heads[:, : self._num_heads]
        attended = paged_attention(q, qkv[:, self._q_size :], kv_cache, plan)
        hidden.add_(self._output(attended))
        gate, up = self._gate_up(self._mlp_norm(hidden)).chunk(2, dim=-1)
        hidden.add_(self._down(F.silu(gate).mul_(up)))
