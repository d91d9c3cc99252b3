"""Models that embed: token ids of whole texts to hidden states of their last layer.

Plain torch over fused tensors; the same code runs on the CPU and on a GPU.
"""

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from runtime.cpu.builder import PartBuilder
from runtime.cpu.linear import PackedLinear
from runtime.model.bert_config import BertConfig
from runtime.model.config import ModelConfig
from runtime.model.rope import Rope, rotate
from runtime.pooling.packed import PackedTexts, attend


class TextModel(Protocol):
    """What a runner needs of a model."""

    @property
    def embedding(self) -> Tensor:
        """The table of tokens [padded vocabulary, hidden_size]."""

    @property
    def packables(self) -> list[list[PackedLinear]]:
        """What can be packed, in groups of one layer."""

    def forward(self, texts: PackedTexts) -> Tensor:
        """Return hidden states [num_tokens, hidden_size]."""


class Bert:
    """The encoder of Devlin et al.: every token sees its whole text; norms come after."""

    def __init__(self, config: BertConfig, builder: PartBuilder) -> None:
        self.embedding = builder.tensor("embed_tokens.weight")
        self._dtype = builder.dtype_of(self.embedding)
        self._positions = builder.tensor("embed_positions.weight")
        self._type = builder.tensor("embed_types.weight")[0]  # one text, no pairs
        self._norm = builder.layer_norm("embed_norm", config.layer_norm_eps)
        self._layers = []
        self.packables: list[list[PackedLinear]] = []
        for index in range(config.num_layers):
            self._layers.append(_BertLayer(config, builder, f"layers.{index}"))
            self.packables.append(builder.take_packables())

    def forward(self, texts: PackedTexts) -> Tensor:
        """See `TextModel`."""
        hidden = F.embedding(texts.token_ids, self.embedding).to(self._dtype)
        hidden = hidden + F.embedding(texts.positions, self._positions) + self._type
        hidden = self._norm(hidden)
        for layer in self._layers:
            hidden = layer(hidden, texts)
        return hidden


class _BertLayer:
    def __init__(self, config: BertConfig, builder: PartBuilder, name: str) -> None:
        eps = config.layer_norm_eps
        self._num_heads = config.num_heads
        self._head_dim = config.hidden_size // config.num_heads
        self._qkv = builder.linear(f"{name}.attention.qkv")
        self._output = builder.linear(f"{name}.attention.output")
        self._attention_norm = builder.layer_norm(f"{name}.attention_norm", eps)
        self._up = builder.linear(f"{name}.mlp.up")
        self._down = builder.linear(f"{name}.mlp.down")
        self._mlp_norm = builder.layer_norm(f"{name}.mlp_norm", eps)

    def __call__(self, hidden: Tensor, texts: PackedTexts) -> Tensor:
        qkv = self._qkv(hidden).view(len(hidden), -1, self._head_dim)
        attended = attend(qkv, texts, self._num_heads, is_causal=False)
        hidden = self._attention_norm(hidden + self._output(attended))
        return self._mlp_norm(hidden + self._down(F.gelu(self._up(hidden))))


class LlamaEmbedder:
    """A Llama decoder without its head: a token sees what is before it, and the last one all."""

    def __init__(self, config: ModelConfig, builder: PartBuilder) -> None:
        self.embedding = builder.tensor("embed_tokens.weight")
        self._dtype = builder.dtype_of(self.embedding)
        self._rope = Rope(config.rope, config.head_dim)
        self._norm = builder.rms_norm("norm", config.rms_norm_eps)
        self._layers = []
        self.packables: list[list[PackedLinear]] = []
        for index in range(config.num_layers):
            self._layers.append(_LlamaLayer(config, builder, f"layers.{index}"))
            self.packables.append(builder.take_packables())

    def forward(self, texts: PackedTexts) -> Tensor:
        """See `TextModel`."""
        hidden = F.embedding(texts.token_ids, self.embedding).to(self._dtype)
        cos, sin = self._rope.rotation(texts.positions.cpu(), hidden.dtype)
        rotation = (cos.to(hidden.device), sin.to(hidden.device))
        for layer in self._layers:
            layer(hidden, rotation, texts)
        return self._norm(hidden)


class _LlamaLayer:
    """Attention and MLP, each added to the residual stream, which is updated in place."""

    def __init__(self, config: ModelConfig, builder: PartBuilder, name: str) -> None:
        self._num_heads = config.num_heads
        self._num_kv_heads = config.num_kv_heads
        self._head_dim = config.head_dim
        self._input_norm = builder.rms_norm(f"{name}.input_layernorm", config.rms_norm_eps)
        self._qkv = builder.linear(f"{name}.self_attn.qkv_proj")
        self._output = builder.linear(f"{name}.self_attn.o_proj")
        self._mlp_norm = builder.rms_norm(f"{name}.post_attention_layernorm", config.rms_norm_eps)
        self._gate_up = builder.linear(f"{name}.mlp.gate_up_proj")
        self._down = builder.linear(f"{name}.mlp.down_proj")

    def __call__(self, hidden: Tensor, rotation: tuple[Tensor, Tensor], texts: PackedTexts) -> None:
        qkv = self._qkv(self._input_norm(hidden)).view(len(hidden), -1, self._head_dim)
        rotate(qkv[:, : self._num_heads + self._num_kv_heads], rotation)
        hidden.add_(self._output(attend(qkv, texts, self._num_heads, is_causal=True)))
        gate, up = self._gate_up(self._mlp_norm(hidden)).chunk(2, dim=-1)
        hidden.add_(self._down(F.silu(gate).mul_(up)))
