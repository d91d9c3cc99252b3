import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.gateway.reasoning import ReasoningParser, Thought, is_opened_by


def read(*pieces: str, is_open: bool = False) -> Thought:
    parser = ReasoningParser(is_open=is_open)
    parts = [*map(parser.feed, pieces), parser.finish()]
    return Thought("".join(one.reasoning for one in parts), "".join(one.content for one in parts))


@pytest.mark.parametrize(
    ("text", "is_open", "expected"),
    [
        ("<think>\nHm.\n</think>\n\nYes.", False, ("Hm.", "Yes.")),
        ("\nHm.\n</think>\n\nYes. ", True, ("Hm.", "Yes. ")),
        ("<think>Hm.</think>Yes.", True, ("Hm.", "Yes.")),
        ("<think></think>Yes.", False, ("", "Yes.")),
        ("Yes.", False, ("", "Yes.")),
        ("  Yes <think>no</think>", False, ("", "  Yes <think>no</think>")),
        ("Hm, and so on", True, ("Hm, and so on", "")),
        ("<think>Hm </thin", False, ("Hm </thin", "")),
        ("<thin", False, ("", "<thin")),
    ],
)
def test_thought_and_content(text: str, is_open: bool, expected: tuple[str, str]) -> None:
    assert read(text, is_open=is_open) == expected
    assert read(*text, is_open=is_open) == expected


@given(
    st.lists(st.sampled_from(["<think>", "</think>", "a", " ", "\n", "<", "</", "think>"])),
    st.lists(st.integers(0, 60)),
    st.booleans(),
)
def test_is_the_same_however_it_is_cut(parts: list[str], places: list[int], is_open: bool) -> None:
    text = "".join(parts)
    ends = sorted({min(place, len(text)) for place in places} | {len(text)})
    pieces = [text[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    assert read(*pieces, is_open=is_open) == read(text, is_open=is_open)


def test_tag_that_the_prompt_opened() -> None:
    assert is_opened_by("<|im_start|>assistant\n<think>\n")
    assert not is_opened_by("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert not is_opened_by("<|im_start|>assistant\n")
