import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controller.batches.spool import Answer, Spool


def answer(custom_id: str, *, is_error: bool = False) -> Answer:
    line = json.dumps({"custom_id": custom_id, "response": "Zürich " * 3}) + "\n"
    return Answer(custom_id=custom_id, line=line.encode(), is_error=is_error)


def open_in(directory: Path) -> Spool:
    return Spool.open(directory / "s" / "output", directory / "s" / "errors")


def ids(path: Path) -> list[str]:
    return [json.loads(line)["custom_id"] for line in path.read_bytes().splitlines()]


def test_answers_and_errors_are_apart_and_survive(tmp_path: Path) -> None:
    spool = open_in(tmp_path)
    spool.append([answer("a"), answer("b", is_error=True), answer("c")])
    spool.sync()
    spool.close()
    again = open_in(tmp_path)
    assert again.done == {"a", "b", "c"}
    assert (again.num_completed, again.num_failed) == (2, 1)
    again.append([answer("d"), answer("a"), answer("b")])
    again.close()
    assert ids(tmp_path / "s" / "output") == ["a", "c", "d"]
    assert ids(tmp_path / "s" / "errors") == ["b"]


@given(cut=st.integers(0, 200), before=st.integers(0, 3))
@settings(max_examples=60)
def test_wherever_it_is_cut_off_every_answer_is_there_once(
    tmp_path_factory: pytest.TempPathFactory, cut: int, before: int
) -> None:
    directory = tmp_path_factory.mktemp("spool")
    wanted = [f"id-{number}" for number in range(5)]
    spool = open_in(directory)
    spool.append([answer(name) for name in wanted[: before + 1]])
    spool.close()
    path = directory / "s" / "output"
    content = path.read_bytes()
    path.write_bytes(content[: max(len(content) - cut, 0)])  # what a crash may leave
    again = open_in(directory)
    whole = ids(path)
    assert sorted(again.done) == whole
    again.append([answer(name) for name in wanted if name not in again.done])
    again.close()
    assert sorted(ids(path)) == wanted


def test_full_disk_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = open_in(tmp_path)
    spool.append([answer("a")])
    output = spool._outputs

    class Full:
        """A file on a disk with room for ten more bytes."""

        room = 10

        def write(self, data: memoryview) -> int:
            if not self.room:
                raise OSError(28, "No space left on device")
            written = output.write(data[: self.room])
            self.room -= written
            return written

        def __getattr__(self, name: str) -> object:
            return getattr(output, name)

    monkeypatch.setattr(spool, "_outputs", Full())
    with pytest.raises(OSError, match="No space"):
        spool.append([answer("b")])
    assert "b" not in spool.done
    monkeypatch.setattr(spool, "_outputs", output)
    spool.append([answer("b")])
    spool.close()
    assert ids(tmp_path / "s" / "output") == ["a", "b"]


def test_writing_after_the_end_harms_nobody(tmp_path: Path) -> None:
    spool = open_in(tmp_path)
    spool.close()
    with pytest.raises(ValueError, match="closed"):
        spool.append([answer("late")])
