"""Tiny GGUF files, written the way llama.cpp's converter writes a Llama."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from transformers import LlamaForCausalLM

from tests.checkpoints import CHAT_TEMPLATE, tiny_tokenizer

NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}
OUTER_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def write_gguf(
    path: Path,
    model: LlamaForCausalLM,
    *,
    quantization: GGMLQuantizationType = GGMLQuantizationType.Q8_0,
    rope_factors: list[float] | None = None,
    rope_metadata: Mapping[str, str | float] = MappingProxyType({}),
    num_parts: int = 1,
    architecture: str = "llama",
) -> None:
    """Write a model with the tokenizer of `tests.checkpoints`; vectors stay float32."""
    config = model.config
    head_dim = model.model.layers[0].self_attn.head_dim
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads or config.num_attention_heads)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(config.vocab_size)
    for key, value in rope_metadata.items():
        if isinstance(value, str):
            writer.add_string(f"{architecture}.rope.{key}", value)
        else:
            writer.add_float32(f"{architecture}.rope.{key}", value)
    if num_parts > 1:
        writer.add_uint16("split.count", num_parts)
    _add_tokenizer(writer, config.vocab_size)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = _interleaved(name, tensor, head_dim).float().numpy()
        kind = quantization if values.ndim > 1 else GGMLQuantizationType.F32
        writer.add_tensor(_gguf_name(name), gguf.quants.quantize(values, kind), raw_dtype=kind)
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", np.array(rope_factors, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_name(name: str) -> str:
    if name in OUTER_NAMES:
        return OUTER_NAMES[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{NAMES[rest]}"


def _interleaved(name: str, tensor: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Reorder the rows of rotary projections as llama.cpp's kernels want them."""
    if ".q_proj." not in name and ".k_proj." not in name:
        return tensor
    rows, columns = tensor.shape
    halves = tensor.reshape(rows // head_dim, 2, head_dim // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns).contiguous()


def _add_tokenizer(writer: gguf.GGUFWriter, vocab_size: int) -> None:
    vocabulary = tiny_tokenizer().get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    tokens += ["ab", "cd"]
    tokens += [f"<unused{i}>" for i in range(vocab_size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_merges(["a b", "c d"])
    writer.add_token_types([3] * 3 + [1] * (vocab_size - 3))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template(CHAT_TEMPLATE)
