"""Streams join to the whole, on the real tokenizer, however their tokens arrive."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from controller.gateway.detokenizer import Detokenizer, StopFilter, TokenTexts
from controller.gateway.pieces import Piece
from controller.gateway.reader import AnswerReader
from controller.scaling.generation import TokenChunk

pytestmark = pytest.mark.model

TEXTS = [
    "The spark was cold until somebody asked for it.",
    "Zürich liegt am See; 東京 🔥🔥 naïve café \N{MUSICAL SYMBOL G CLEF}",
    'def wake(function):\n    return {"a": [1, 2.5e-3], "b": "\\n"}\n',
]


@pytest.fixture(scope="module")
def texts(smollm2_snapshot: Path) -> TokenTexts:
    return TokenTexts(Tokenizer.from_file(str(smollm2_snapshot / "tokenizer.json")))


def special_ids(texts: TokenTexts) -> set[int]:
    added = texts.tokenizer.get_added_tokens_decoder()
    return {id for id, token in added.items() if token.special}


def read(
    texts: TokenTexts,
    chunks: Sequence[Sequence[int]],
    *,
    stops: Sequence[str],
    is_kept: bool,
    min_tokens: int,
) -> list[Piece]:
    reader = AnswerReader(
        Detokenizer(texts, special_ids(texts)),
        StopFilter(stops, is_kept=is_kept),
        min_tokens=min_tokens,
        reports_tokens=True,
    )
    pieces = []
    for chunk in [*(TokenChunk(ids) for ids in chunks), TokenChunk([], finish_reason="length")]:
        pieces.append(reader.read(chunk))
        if pieces[-1].finish_reason is not None:
            return pieces
    raise AssertionError("the last chunk ends the answer")


@settings(max_examples=300)
@given(data=st.data())
def test_pieces_join_to_the_whole_however_tokens_arrive(
    texts: TokenTexts, data: st.DataObject
) -> None:
    tokenizer = texts.tokenizer
    written = tokenizer.encode(data.draw(st.sampled_from(TEXTS) | st.text(max_size=30))).ids
    anything = data.draw(st.lists(st.integers(0, tokenizer.get_vocab_size() + 5), max_size=8))
    ids = data.draw(st.permutations([*written, *anything]) | st.just([*written, *anything]))
    text = tokenizer.decode([id for id in ids if id > 2])
    parts = [text[at : at + size] for at in range(len(text)) for size in (1, 2, 5)]
    stop = st.sampled_from(parts) if parts else st.text(min_size=1, max_size=3)
    stops = data.draw(st.lists(stop | st.text(min_size=1, max_size=3), max_size=3))
    is_kept, min_tokens = data.draw(st.booleans()), data.draw(st.integers(0, 3))
    read_in = partial(read, texts, stops=stops, is_kept=is_kept, min_tokens=min_tokens)
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(ids) - 1)))))
    chunks = [ids[a:b] for a, b in zip([0, *cuts], [*cuts, len(ids)], strict=True)]

    one_by_one = read_in([[id] for id in ids])
    in_chunks = read_in(chunks)
    whole = read_in([ids])
    for pieces in (one_by_one, in_chunks):
        assert "".join(piece.text for piece in pieces) == "".join(piece.text for piece in whole)
        assert pieces[-1][1:3] == whole[-1][1:3]
        tokens = [token for piece in pieces for token in piece.tokens]
        assert tokens == [token for piece in whole for token in piece.tokens]
    detokenizer = Detokenizer(texts, special_ids(texts))
    num_passed = sum(len(detokenizer.feed(id)) for id in ids[:min_tokens])
    assert "".join(piece.text for piece in whole) == _cut(text, stops, is_kept, num_passed)


def _cut(text: str, stops: Sequence[str], is_kept: bool, num_passed: int) -> str:
    """Return a text up to the stop string that is complete first after so many characters."""
    for end in range(num_passed + 1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[:end] if is_kept else text[: end - len(max(found, key=len))]
    return text
