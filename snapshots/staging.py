"""The unfinished files of one build, and the journal that lets the next attempt continue.

A journal line is written only after the group it names is on disk, so what it says is true after
any kind of death; it is checked again all the same.
"""

import json
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from snapshots.checksums import EndedEarly, sha256_of
from snapshots.durable import remove_tree, sync
from snapshots.layout import RankLayout
from snapshots.store import JOURNAL_FILE


class Stage:
    """Rank files at their full size, filled group by group: `begin`, then enter.

    Args:
        directory: The build's own; `content` in it becomes the snapshot.
        layouts: Of all rank files.
        plan: Identifies source and layout; what another plan has left is thrown away.
    """

    def __init__(self, directory: Path, layouts: Sequence[RankLayout], plan: str) -> None:
        self.directory = directory
        self.content = directory / "content"
        self._layouts = layouts
        self._plan = plan
        self._journal = directory / JOURNAL_FILE
        self._stack = ExitStack()
        self.descriptors: list[int] = []

    def begin(self) -> None:
        """Make the directory, unless one of the same plan is there to be continued."""
        lines = self._lines()
        if not lines or lines[0] != {"plan": self._plan}:
            if self.directory.exists():
                remove_tree(self.directory)
            self.content.mkdir(parents=True)
            self._append({"plan": self._plan})

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self.descriptors = [self._open(layout, stack) for layout in self._layouts]
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    def completed(self) -> int:
        """Return how many groups are on disk as the journal has them."""
        count = 0
        for line in self._lines()[1:]:
            if line.get("group") != count or line.get("sha256") != self._digests(count):
                break
            count += 1
        return count

    def record(self, group: int) -> None:
        """Put a group on disk and note it."""
        for descriptor in self.descriptors:
            os.fsync(descriptor)
        self._append({"group": group, "sha256": self._digests(group)})

    def clear_after(self, num_groups: int) -> None:
        """Forget all but the first `num_groups` groups; what they had written becomes zeros."""
        lines = self._lines()[: num_groups + 1]
        self._journal.write_text("".join(json.dumps(line) + "\n" for line in lines))
        sync(self._journal)
        for layout, descriptor in zip(self._layouts, self.descriptors, strict=True):
            if num_groups < len(layout.groups):
                start = layout.groups[num_groups].span.start
                os.ftruncate(descriptor, len(layout.header) + start)
                _allocate(descriptor, layout.size_bytes)

    def _open(self, layout: RankLayout, stack: ExitStack) -> int:
        path = self.content / layout.path
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        stack.callback(os.close, descriptor)
        os.ftruncate(descriptor, layout.size_bytes)
        _allocate(descriptor, layout.size_bytes)
        write_at(descriptor, layout.header, 0)
        return descriptor

    def _digests(self, group: int) -> list[str]:
        digests = []
        for layout, descriptor in zip(self._layouts, self.descriptors, strict=True):
            if group >= len(layout.groups):
                return []
            start, stop = layout.groups[group].span
            try:
                digests.append(sha256_of(descriptor, len(layout.header) + start, stop - start))
            except EndedEarly:
                return []
        return digests

    def _lines(self) -> list[dict[str, Any]]:
        try:
            text = self._journal.read_text()
        except FileNotFoundError:
            return []
        lines = []
        for line in text.splitlines(keepends=True):
            try:
                content = json.loads(line)
            except ValueError:
                break
            if not line.endswith("\n") or not isinstance(content, dict):
                break  # the writer died within it
            lines.append(content)
        return lines

    def _append(self, line: dict[str, Any]) -> None:
        with self._journal.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _allocate(descriptor: int, num_bytes: int) -> None:
    """Reserve disk space, so that a full disk shows now and not in the middle of the weights."""
    os.posix_fallocate(descriptor, 0, num_bytes)


def write_at(descriptor: int, content: bytes | memoryview, offset: int) -> None:
    """Write all of `content` at a place in a file."""
    view = memoryview(content)
    while view:
        count = os.pwrite(descriptor, view, offset)
        view = view[count:]
        offset += count
