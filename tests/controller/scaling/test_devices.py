import asyncio
import threading

import pynvml
import pytest

from controller.scaling import devices
from controller.scaling.devices import measure
from controller.scaling.placement import Device, DeviceKind


async def test_a_driver_that_is_slow_to_answer_keeps_nobody_else_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    has_answered = threading.Event()

    def init() -> None:
        assert has_answered.wait(10)
        raise pynvml.NVMLError(pynvml.NVML_ERROR_UNKNOWN)

    monkeypatch.setattr(pynvml, "nvmlInit", init)
    gpu = Device(id="GPU-0", kind=DeviceKind.GPU, memory_bytes=1 << 30)
    measuring = asyncio.create_task(measure(gpu))
    await asyncio.sleep(0)  # blocks for 10 s if the loop is held
    assert not measuring.done()
    has_answered.set()
    assert await measuring is None


async def test_a_driver_that_never_answers_is_asked_once_and_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    may_answer, num_asked = threading.Event(), 0

    def init() -> None:
        nonlocal num_asked
        num_asked += 1
        may_answer.wait(30)
        raise pynvml.NVMLError(pynvml.NVML_ERROR_UNKNOWN)

    monkeypatch.setattr(pynvml, "nvmlInit", init)
    monkeypatch.setattr(devices, "ANSWER_TIMEOUT_S", 0.1)
    gpu = Device(id="GPU-1", kind=DeviceKind.GPU, memory_bytes=1 << 30)
    assert await asyncio.gather(*(measure(gpu) for _ in range(40))) == [None] * 40
    assert await measure(gpu) is None
    assert num_asked == 1
    async with asyncio.timeout(10.0):
        await asyncio.to_thread(lambda: None)  # as every start and removal does
    may_answer.set()
    await asyncio.wrap_future(devices._asked[gpu.id])
    assert await measure(gpu) is None
    assert num_asked == 2, "it answers again"
