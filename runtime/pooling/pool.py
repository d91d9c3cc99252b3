"""From the vectors of a text's tokens to the text's own."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.engine.pooling import PoolingMode
from runtime.pooling.packed import PackedTexts


def pool(hidden: Tensor, texts: PackedTexts, mode: PoolingMode) -> Tensor:
    """Return one vector for each text, fp32 [num_texts, hidden_size].

    Args:
        hidden: After the last layer [num_tokens, hidden_size].
        texts: Of this batch.
        mode: How.
    """
    match mode:
        case PoolingMode.CLS:
            return hidden[texts.starts].float()
        case PoolingMode.LAST:
            return hidden[texts.starts + texts.lengths - 1].float()
        case PoolingMode.MEAN:
            sums = hidden.new_zeros(len(texts.lengths), hidden.shape[1], dtype=torch.float32)
            return sums.index_add_(0, texts.text_of, hidden.float()) / texts.lengths[:, None]


def finish(pooled: Tensor, dimensions: Sequence[int], *, normalize: bool) -> list[Tensor]:
    """Cut vectors to their leading numbers and scale what is left to length 1.

    Args:
        pooled: [num_texts, hidden_size].
        dimensions: Of each text; 0 keeps all.
        normalize: Whether to scale.
    """
    vectors = [
        vector[: count or len(vector)] for vector, count in zip(pooled, dimensions, strict=True)
    ]
    return [F.normalize(vector, dim=0) for vector in vectors] if normalize else vectors
