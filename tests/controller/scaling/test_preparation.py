"""The build process as the controller hears it, with stand-ins for the builder."""

import sys
from pathlib import Path

import pytest

from controller.scaling import preparation
from controller.scaling.preparation import BuildProgress, PreparationFailed, build_snapshot
from tests.fakes.world import spec_of


def run_instead(monkeypatch: pytest.MonkeyPatch, *command: str) -> None:
    monkeypatch.setattr(preparation, "_command", lambda spec, store: list(command))


def no_report(progress: BuildProgress) -> None:
    raise AssertionError("there is no progress")


async def test_what_a_library_prints_does_not_end_the_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [
        "downloading…",
        "[1]",
        '{"event": "progress"}',
        '{"event": "built", "snapshot": "x@1"}',
    ]
    run_instead(monkeypatch, sys.executable, "-c", f"print({chr(10).join(lines)!r})")
    assert await build_snapshot(spec_of(), tmp_path, no_report) == "x@1"


async def test_a_builder_that_cannot_be_started_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_instead(monkeypatch, str(tmp_path / "nothing"))
    with pytest.raises(PreparationFailed, match="cannot start"):
        await build_snapshot(spec_of(), tmp_path, no_report)
