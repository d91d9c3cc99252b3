import asyncio

from structlog.testing import capture_logs

from controller.scaling.reaper import Reaper
from controller.store.errors import DatabaseUnavailable


async def test_a_fault_from_outside_is_told_once_and_its_end_too() -> None:
    faults: list[Exception | None] = [DatabaseUnavailable("disk full")] * 3
    faults += [DatabaseUnavailable("locked"), None, None, ValueError("a defect"), None]
    left = iter(faults)
    is_over = asyncio.Event()

    async def job() -> None:
        fault = next(left, is_over)
        if fault is is_over:
            is_over.set()
        elif isinstance(fault, Exception):
            raise fault

    reaper = Reaper(expected=DatabaseUnavailable)
    with capture_logs() as logs:
        reaper.start()
        reaper.every(0.01, "flush", job)
        await is_over.wait()
        reaper.stop()
    told = [(line["log_level"], line.get("error", "")) for line in logs if line["job"] == "flush"]
    assert told == [("warning", "disk full"), ("warning", "locked"), ("info", ""), ("error", "")]
