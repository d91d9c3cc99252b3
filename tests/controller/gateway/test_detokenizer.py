import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from controller.gateway.detokenizer import Detokenizer, StopFilter, TokenTexts
from tests.fakes.tokenizers import byte_fallback_tokenizer, byte_level_tokenizer

BYTE_LEVEL = byte_level_tokenizer()
BYTE_FALLBACK = byte_fallback_tokenizer()
BOTH = pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, BYTE_FALLBACK], ids=["bytes", "fallback"])
TEXTS = ["the hall  is low", " leading space", "Zürich, 東京!", "🔥🔥", "naïve café", "日本語"]


def special_ids(tokenizer: Tokenizer) -> frozenset[int]:
    added = tokenizer.get_added_tokens_decoder()
    return frozenset(token_id for token_id, token in added.items() if token.special)


def id_of(tokenizer: Tokenizer, token: str) -> int:
    token_id = tokenizer.token_to_id(token)
    assert token_id is not None
    return token_id


def pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(TokenTexts(tokenizer), special_ids(tokenizer))
    return [*(detokenizer.feed(token_id) for token_id in ids), detokenizer.finish()]


@BOTH
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_decoded_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text).ids
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids) == text


@BOTH
def test_no_piece_holds_half_a_character(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("日🔥").ids
    assert len(ids) >= 4
    assert [piece for piece in pieces(tokenizer, ids) if piece.strip()] == ["日", "🔥"]


@settings(max_examples=300)
@given(st.lists(st.integers(0, BYTE_LEVEL.get_vocab_size() + 3), max_size=40))
def test_any_byte_level_tokens_join_to_the_decoded_text(ids: list[int]) -> None:
    assert "".join(pieces(BYTE_LEVEL, ids)) == BYTE_LEVEL.decode(ids)


@settings(max_examples=300)
@given(st.lists(st.integers(259, BYTE_FALLBACK.get_vocab_size() + 3), max_size=40))
def test_any_sentencepiece_tokens_join_to_the_decoded_text(ids: list[int]) -> None:
    assert "".join(pieces(BYTE_FALLBACK, ids)) == BYTE_FALLBACK.decode(ids)


@settings(max_examples=100)
@given(st.text(alphabet="the low Hall東é日🔥\n", max_size=30))
def test_sentencepiece_text_with_byte_fallback_survives(text: str) -> None:
    ids = BYTE_FALLBACK.encode(text).ids
    assert "".join(pieces(BYTE_FALLBACK, ids)) == BYTE_FALLBACK.decode(ids)


def test_endless_broken_bytes_are_let_go_in_bounded_pieces() -> None:
    broken = id_of(BYTE_FALLBACK, "<0xFF>")
    found = pieces(BYTE_FALLBACK, [broken] * 100)
    assert "".join(found) == "\N{REPLACEMENT CHARACTER}" * 100
    assert max(map(len, found)) <= 16


def test_special_tokens_between_words_do_not_eat_the_space() -> None:
    the, end = id_of(BYTE_FALLBACK, "▁the"), id_of(BYTE_FALLBACK, "</s>")
    assert "".join(pieces(BYTE_FALLBACK, [the, end, the, end, end, the])) == "the the the"


def filtered(stops: list[str], parts: list[str]) -> tuple[str, bool]:
    stop_filter = StopFilter(stops)
    found = []
    for part in parts:
        found.append(stop_filter.feed(part))
        if stop_filter.is_hit:
            return "".join(found), True
    return "".join([*found, stop_filter.finish()]), False


def test_text_that_could_begin_a_stop_string_is_held_back() -> None:
    stop_filter = StopFilter(["\n\nUser:"])
    assert stop_filter.feed("fine\n") == "fine"
    assert stop_filter.feed("\nUs") == ""
    assert stop_filter.feed("ed") == "\n\nUsed"
    assert stop_filter.feed("\n\nUser: no") == ""
    assert stop_filter.is_hit


def test_stop_string_that_begins_in_text_passed_over_is_cut_off_whole() -> None:
    stop_filter = StopFilter(["END"])
    assert [stop_filter.pass_over(part) for part in ("x", "E")] == ["x", ""]
    assert [stop_filter.feed(part) for part in ("N", "D y")] == ["", ""]
    assert stop_filter.hit == "END"


def test_stop_string_that_ends_in_text_passed_over_does_not_count() -> None:
    stop_filter = StopFilter(["END", "xENDyz"])
    assert stop_filter.pass_over("an END, xEND") == "an END, "
    assert stop_filter.feed("y") == ""
    assert stop_filter.feed(".") == "xENDy."
    assert not stop_filter.is_hit


def test_nothing_is_held_back_that_cannot_begin_a_stop_string() -> None:
    stop_filter = StopFilter(["STOP", "halt"])
    assert stop_filter.feed("some text S") == "some text "
    assert stop_filter.finish() == "S"


@settings(max_examples=500)
@given(
    st.lists(st.text(alphabet="ab", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.text(alphabet="abc", max_size=5), max_size=12),
)
def test_stops_cut_the_same_however_the_text_arrives(stops: list[str], parts: list[str]) -> None:
    whole = "".join(parts)
    found, is_hit = filtered(stops, parts)
    assert (found, is_hit) == filtered(stops, [whole]) == filtered(stops, list(whole))
    assert is_hit == any(stop in whole for stop in stops)
    if is_hit:
        ends = [
            (whole.index(stop) + len(stop), whole.index(stop)) for stop in stops if stop in whole
        ]
        assert found == whole[: min(ends)[1]]
    else:
        assert found == whole
