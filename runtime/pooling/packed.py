"""Texts of a batch one after the other, and attention within each. Plain torch, on any device.

Products run over all tokens at once, without padding. For attention alone, texts of similar
length are padded to the longest of their group; what pads a text is its own first token, so that
no text's fault reaches another.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_STRETCH = 1.25  # of a text by padding
MIN_STRETCH_TOKENS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """Texts of similar length.

    Attributes:
        rows: Where each token is in the batch, int64 [num_texts, max_length].
        is_token: False where a text is padded, bool [num_texts, max_length]; None if none is.
    """

    rows: Tensor
    is_token: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedTexts:
    """A batch of texts on one device.

    Attributes:
        token_ids: int64 [num_tokens].
        positions: Of each token in its text, int64 [num_tokens].
        text_of: The text each token belongs to, int64 [num_tokens].
        starts: First token of each text, int64 [num_texts].
        lengths: int64 [num_texts].
    """

    token_ids: Tensor
    positions: Tensor
    text_of: Tensor
    starts: Tensor
    lengths: Tensor
    groups: tuple[_Group, ...]

    @classmethod
    def pack(cls, texts: Sequence[Sequence[int]], device: str) -> "PackedTexts":
        """Put texts, none of them empty, one after the other."""
        lengths = torch.tensor([len(text) for text in texts])
        starts = lengths.cumsum(0) - lengths
        text_of = torch.arange(len(texts)).repeat_interleave(lengths)
        positions = torch.arange(len(text_of)) - starts[text_of]
        token_ids = torch.tensor([token_id for text in texts for token_id in text])
        return cls(
            token_ids=token_ids.to(device),
            positions=positions.to(device),
            text_of=text_of.to(device),
            starts=starts.to(device),
            lengths=lengths.to(device),
            groups=tuple(
                _group(starts[numbers], lengths[numbers], device) for numbers in _by_length(lengths)
            ),
        )


def attend(qkv: Tensor, texts: PackedTexts, num_heads: int, *, is_causal: bool) -> Tensor:
    """Attend within each text.

    Args:
        qkv: [num_tokens, num_heads + 2 * num_kv_heads, head_dim].
        texts: Of this batch.
        num_heads: Of queries; key-value heads are shared by equal runs of them.
        is_causal: Whether a token sees only what is before it.

    Returns:
        [num_tokens, num_heads * head_dim].
    """
    num_tokens, num_all_heads, head_dim = qkv.shape
    num_kv_heads = (num_all_heads - num_heads) // 2
    output = qkv.new_empty(num_tokens, num_heads * head_dim)
    for group in texts.groups:
        heads = qkv[group.rows].transpose(1, 2)
        q, k, v = torch.split(heads, [num_heads, num_kv_heads, num_kv_heads], dim=1)
        if num_kv_heads != num_heads:
            k, v = (part.repeat_interleave(num_heads // num_kv_heads, 1) for part in (k, v))
        # Padding comes last: a causal mask hides it from every token of the text.
        mask = None
        if group.is_token is not None and not is_causal:
            mask = group.is_token[:, None, None]
        attended = F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal)
        attended = attended.transpose(1, 2).flatten(2)
        if group.is_token is None:
            output[group.rows] = attended
        else:
            output[group.rows[group.is_token]] = attended[group.is_token]
    return output


def _by_length(lengths: Tensor) -> list[Tensor]:
    """Return numbers of texts in groups of similar length."""
    order = lengths.argsort()
    groups: list[list[int]] = []
    limit = -1.0
    for number, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        if length > limit:
            groups.append([])
            limit = max(length * MAX_STRETCH, length + MIN_STRETCH_TOKENS)
        groups[-1].append(number)
    return [torch.tensor(group) for group in groups]


def _group(starts: Tensor, lengths: Tensor, device: str) -> _Group:
    offsets = torch.arange(int(lengths.max()))
    is_token = offsets < lengths[:, None]
    rows = starts[:, None] + torch.where(is_token, offsets, 0)
    return _Group(
        rows=rows.to(device), is_token=None if bool(is_token.all()) else is_token.to(device)
    )
