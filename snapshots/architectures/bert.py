"""BERT encoders, as sentence-transformers and its descendants publish them."""

from snapshots.architectures.weights import Architecture, Dim, FusedTensor, Part

_LAYER = "encoder.layer.{i}"
_ATTENTION = f"{_LAYER}.attention"


def _tensors(
    name: str, *sources: str, rows: Dim, columns: Dim | None = None
) -> tuple[FusedTensor, ...]:
    """Return a weight and its bias; without columns both are vectors, as a norm's are."""
    shape = (rows,) if columns is None else (rows, columns)
    return tuple(
        FusedTensor(
            name=f"{name}.{kind}",
            parts=tuple(Part(name=f"{source}.{kind}", gguf="", shape=dims) for source in sources),
        )
        for kind, dims in (("weight", shape), ("bias", (rows,)))
    )


def _table(name: str, source: str, rows: Dim) -> FusedTensor:
    part = Part(name=f"embeddings.{source}.weight", gguf="", shape=(rows, Dim.HIDDEN))
    return FusedTensor(name=f"{name}.weight", parts=(part,))


BERT = Architecture(
    name="bert",
    classes=("BertModel",),
    activations=("gelu",),
    gguf_name=None,
    embedding=(
        _table("embed_tokens", "word_embeddings", Dim.VOCABULARY),
        _table("embed_positions", "position_embeddings", Dim.POSITION),
        _table("embed_types", "token_type_embeddings", Dim.TOKEN_TYPE),
        *_tensors("embed_norm", "embeddings.LayerNorm", rows=Dim.HIDDEN),
    ),
    layer=(
        *_tensors(
            "layers.{i}.attention.qkv",
            f"{_ATTENTION}.self.query",
            f"{_ATTENTION}.self.key",
            f"{_ATTENTION}.self.value",
            rows=Dim.HIDDEN,
            columns=Dim.HIDDEN,
        ),
        *_tensors(
            "layers.{i}.attention.output",
            f"{_ATTENTION}.output.dense",
            rows=Dim.HIDDEN,
            columns=Dim.HIDDEN,
        ),
        *_tensors("layers.{i}.attention_norm", f"{_ATTENTION}.output.LayerNorm", rows=Dim.HIDDEN),
        *_tensors(
            "layers.{i}.mlp.up",
            f"{_LAYER}.intermediate.dense",
            rows=Dim.INTERMEDIATE,
            columns=Dim.HIDDEN,
        ),
        *_tensors(
            "layers.{i}.mlp.down",
            f"{_LAYER}.output.dense",
            rows=Dim.HIDDEN,
            columns=Dim.INTERMEDIATE,
        ),
        *_tensors("layers.{i}.mlp_norm", f"{_LAYER}.output.LayerNorm", rows=Dim.HIDDEN),
    ),
    final=(),
    head=None,
    # The pooler is a head for sentence pairs, which no embedding passes through.
    ignored=(r"embeddings\.position_ids", r"pooler\.dense\.(weight|bias)"),
)
