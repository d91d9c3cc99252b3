"""Llama, with or without biases of the attention projections."""

from dataclasses import replace

from snapshots.architectures.weights import Architecture, Dim, FusedTensor, Part

_ATTENTION = "model.layers.{i}.self_attn"
_MLP = "model.layers.{i}.mlp"

_INPUT_NORM = FusedTensor(
    name="layers.{i}.input_layernorm.weight",
    parts=(
        Part(
            name="model.layers.{i}.input_layernorm.weight",
            gguf="blk.{i}.attn_norm.weight",
            shape=(Dim.HIDDEN,),
        ),
    ),
)
_QKV = FusedTensor(
    name="layers.{i}.self_attn.qkv_proj.weight",
    parts=(
        Part(
            name=f"{_ATTENTION}.q_proj.weight",
            gguf="blk.{i}.attn_q.weight",
            shape=(Dim.QUERY, Dim.HIDDEN),
            is_rotary=True,
        ),
        Part(
            name=f"{_ATTENTION}.k_proj.weight",
            gguf="blk.{i}.attn_k.weight",
            shape=(Dim.KEY_VALUE, Dim.HIDDEN),
            is_rotary=True,
        ),
        Part(
            name=f"{_ATTENTION}.v_proj.weight",
            gguf="blk.{i}.attn_v.weight",
            shape=(Dim.KEY_VALUE, Dim.HIDDEN),
        ),
    ),
    shard_axis=0,
)
_QKV_BIAS = FusedTensor(
    name="layers.{i}.self_attn.qkv_proj.bias",
    parts=tuple(
        replace(
            part,
            name=part.name.replace(".weight", ".bias"),
            gguf=part.gguf.replace(".weight", ".bias"),
            shape=part.shape[:1],
        )
        for part in _QKV.parts
    ),
    shard_axis=0,
)
_OUTPUT = FusedTensor(
    name="layers.{i}.self_attn.o_proj.weight",
    parts=(
        Part(
            name=f"{_ATTENTION}.o_proj.weight",
            gguf="blk.{i}.attn_output.weight",
            shape=(Dim.HIDDEN, Dim.QUERY),
        ),
    ),
    shard_axis=1,
)
_POST_NORM = FusedTensor(
    name="layers.{i}.post_attention_layernorm.weight",
    parts=(
        Part(
            name="model.layers.{i}.post_attention_layernorm.weight",
            gguf="blk.{i}.ffn_norm.weight",
            shape=(Dim.HIDDEN,),
        ),
    ),
)
_GATE_UP = FusedTensor(
    name="layers.{i}.mlp.gate_up_proj.weight",
    parts=(
        Part(
            name=f"{_MLP}.gate_proj.weight",
            gguf="blk.{i}.ffn_gate.weight",
            shape=(Dim.INTERMEDIATE, Dim.HIDDEN),
        ),
        Part(
            name=f"{_MLP}.up_proj.weight",
            gguf="blk.{i}.ffn_up.weight",
            shape=(Dim.INTERMEDIATE, Dim.HIDDEN),
        ),
    ),
    shard_axis=0,
)
_DOWN = FusedTensor(
    name="layers.{i}.mlp.down_proj.weight",
    parts=(
        Part(
            name=f"{_MLP}.down_proj.weight",
            gguf="blk.{i}.ffn_down.weight",
            shape=(Dim.HIDDEN, Dim.INTERMEDIATE),
        ),
    ),
    shard_axis=1,
)

LLAMA = Architecture(
    name="llama",
    classes=("LlamaForCausalLM",),
    activations=("silu", "swish"),
    gguf_name="llama",
    embedding=(
        FusedTensor(
            name="embed_tokens.weight",
            parts=(
                Part(
                    name="model.embed_tokens.weight",
                    gguf="token_embd.weight",
                    shape=(Dim.VOCABULARY, Dim.HIDDEN),
                ),
            ),
            shard_axis=0,
        ),
    ),
    layer=(
        _INPUT_NORM,
        _QKV,
        replace(_QKV_BIAS, is_optional=True),
        _OUTPUT,
        _POST_NORM,
        _GATE_UP,
        _DOWN,
    ),
    final=(
        FusedTensor(
            name="norm.weight",
            parts=(Part(name="model.norm.weight", gguf="output_norm.weight", shape=(Dim.HIDDEN,)),),
        ),
    ),
    head=FusedTensor(
        name="lm_head.weight",
        parts=(
            Part(name="lm_head.weight", gguf="output.weight", shape=(Dim.VOCABULARY, Dim.HIDDEN)),
        ),
        shard_axis=0,
    ),
    ignored=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
    has_interleaved_gguf=True,
)
