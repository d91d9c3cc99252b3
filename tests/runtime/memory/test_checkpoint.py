"""Checkpoints through a fake driver that keeps the real one's state machine."""

from typing import Any

import pytest

from runtime.memory.checkpoint import LOCK_TIMEOUT_MS, CheckpointFailed, ProcessCheckpoints
from tests.fakes.checkpoints import (
    CHECKPOINTED,
    ILLEGAL_STATE,
    NOT_SUPPORTED,
    OUT_OF_MEMORY,
    RUNNING,
    FakeDriver,
)

PID = 4711


@pytest.fixture
def driver() -> FakeDriver:
    driver = FakeDriver()
    driver.states[PID] = RUNNING
    return driver


@pytest.fixture
def checkpoints(driver: FakeDriver) -> ProcessCheckpoints:
    return ProcessCheckpoints.open(lambda _: driver)


def test_a_process_is_taken_off_its_gpus_and_put_back(
    driver: FakeDriver, checkpoints: ProcessCheckpoints
) -> None:
    names = [phase.name for phase in checkpoints.suspend(PID)]
    assert names == ["lock", "checkpoint"]
    assert driver.states[PID] == CHECKPOINTED
    assert driver.lock_timeout_ms == LOCK_TIMEOUT_MS
    assert [phase.name for phase in checkpoints.resume(PID)] == ["restore", "unlock"]
    assert driver.states[PID] == RUNNING


def test_a_process_that_cannot_be_locked_goes_on(
    driver: FakeDriver, checkpoints: ProcessCheckpoints
) -> None:
    driver.answers["Lock"] = NOT_SUPPORTED
    with pytest.raises(CheckpointFailed, match=r"Lock of process 4711: not supported") as raised:
        checkpoints.suspend(PID)
    assert not raised.value.is_fatal
    assert driver.states[PID] == RUNNING


def test_a_process_that_cannot_be_checkpointed_is_unlocked(
    driver: FakeDriver, checkpoints: ProcessCheckpoints
) -> None:
    driver.answers["Checkpoint"] = OUT_OF_MEMORY
    with pytest.raises(CheckpointFailed, match=r"Checkpoint of .*: out of memory") as raised:
        checkpoints.suspend(PID)
    assert not raised.value.is_fatal
    assert driver.states[PID] == RUNNING


def test_a_process_that_stays_locked_is_lost(
    driver: FakeDriver, checkpoints: ProcessCheckpoints
) -> None:
    driver.answers |= {"Checkpoint": OUT_OF_MEMORY, "Unlock": ILLEGAL_STATE}
    with pytest.raises(CheckpointFailed, match=r"out of memory .*and then .*Unlock") as raised:
        checkpoints.suspend(PID)
    assert raised.value.is_fatal


@pytest.mark.parametrize("name", ["Restore", "Unlock"])
def test_a_process_that_cannot_be_restored_is_lost(
    driver: FakeDriver, checkpoints: ProcessCheckpoints, name: str
) -> None:
    checkpoints.suspend(PID)
    driver.answers[name] = OUT_OF_MEMORY
    with pytest.raises(CheckpointFailed, match=f"{name} of process") as raised:
        checkpoints.resume(PID)
    assert raised.value.is_fatal


def test_an_unknown_process_is_refused(checkpoints: ProcessCheckpoints) -> None:
    with pytest.raises(CheckpointFailed, match="is the process gone"):
        checkpoints.suspend(PID + 1)


def test_without_a_driver_it_says_so() -> None:
    def load(name: str) -> Any:
        raise OSError(f"{name}: cannot open shared object file")

    with pytest.raises(CheckpointFailed, match=r"there is no CUDA driver: libcuda\.so\.1"):
        ProcessCheckpoints.open(load)


def test_an_old_driver_is_told_from_a_new_one() -> None:
    class OldDriver:
        def cuInit(self, _flags: int) -> int:  # the driver's name
            return 0

    with pytest.raises(CheckpointFailed, match="older than 570"):
        ProcessCheckpoints.open(lambda _: OldDriver())


def test_a_driver_without_a_gpu_says_so(driver: FakeDriver) -> None:
    driver.answers["cuInit"] = 100
    with pytest.raises(CheckpointFailed, match=r"cuInit: no device \(100\)"):
        ProcessCheckpoints.open(lambda _: driver)
