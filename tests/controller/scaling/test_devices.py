import asyncio
import threading

import pynvml
import pytest

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
