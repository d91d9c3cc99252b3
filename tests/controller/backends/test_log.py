"""The capped log and its reader."""

import errno
import os
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.backends.lines import LineSplitter
from controller.backends.log_reader import LogReader
from controller.backends.log_writer import MAX_LINE_BYTES, CappedLog


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log"


def test_lines_are_cut_wherever_the_chunks_end(path: Path) -> None:
    log = CappedLog(str(path), max_line_bytes=4)
    for chunk in (b"ab", b"cd", b"ef\ngh", b"\n\n12345", b"6"):
        log.write(chunk)
    log.close()
    assert path.read_bytes() == b"abcd\ngh\n\n1234"


def test_a_full_log_becomes_the_previous_one(path: Path) -> None:
    log = CappedLog(str(path), max_file_bytes=8)
    for line in (b"one\n", b"two\n", b"three\n", b"four\n"):
        log.write(line)
    log.close()
    assert (path.with_name("log.1").read_bytes(), path.read_bytes()) == (b"three\n", b"four\n")


def test_a_log_is_continued(path: Path) -> None:
    for line in (b"one\n", b"two\n"):
        log = CappedLog(str(path))
        log.write(line)
        log.close()
    assert path.read_bytes() == b"one\ntwo\n"


def test_a_full_disk_loses_lines_and_nothing_else(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "no space")

    log = CappedLog(str(path))
    log.write(b"one\n")
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        log.write(b"lost\n")
    log.write(b"two\n")
    log.close()
    assert path.read_bytes() == b"one\ntwo\n"


@given(
    lines=st.lists(st.binary(max_size=20).filter(lambda line: b"\n" not in line), max_size=30),
    cuts=st.lists(st.integers(0, 600), max_size=8),
)
def test_splitting_does_not_depend_on_the_chunks(lines: list[bytes], cuts: list[int]) -> None:
    data = b"".join(line + b"\n" for line in lines)
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    splitter = LineSplitter()
    split = [text for begin, end in pairwise(edges) for text in splitter.feed(data[begin:end])]
    assert split == [line.decode(errors="replace").rstrip("\r") for line in lines]
    assert splitter.rest() == []


def test_a_line_without_end_is_kept_up_to_the_limit() -> None:
    splitter = LineSplitter()
    for _ in range(3):
        assert splitter.feed(b"x" * MAX_LINE_BYTES) == []
    assert splitter.rest() == ["x" * MAX_LINE_BYTES]


def test_the_tail_reaches_into_the_previous_log(path: Path) -> None:
    path.with_name("log.1").write_text("one\ntwo\n")
    path.write_text("three\nfour\n")
    for num_lines, expected in ((3, ["two", "three", "four"]), (1, ["four"]), (0, [])):
        reader = LogReader(path)
        assert reader.tail(num_lines, is_over=True) == expected
        reader.close()


def test_a_line_without_end_is_read_when_all_is_over(path: Path) -> None:
    path.write_text("one\ntw")
    reader = LogReader(path)
    assert reader.tail(9, is_over=False) == ["one"]
    assert reader.rest() == ["tw"]
    reader.close()


def test_a_reader_goes_on_in_the_log_s_successor(path: Path) -> None:
    log = CappedLog(str(path), max_file_bytes=8)
    reader = LogReader(path)
    assert reader.tail(9, is_over=False) == []
    seen = []
    for line in (b"one\n", b"two\n", b"three\n", b"four\n"):
        log.write(line)
        seen += reader.new_lines()
    assert seen == ["one", "two", "three", "four"]
    log.close()
    reader.close()
