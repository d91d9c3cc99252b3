import asyncio

import pytest

from controller.backends.serial import SerialOperations


async def test_operations_on_one_id_take_turns_and_others_do_not_wait() -> None:
    serial, begun, gate, order = SerialOperations(), asyncio.Event(), asyncio.Event(), []

    async def operation(name: str, *, waits: bool = False) -> str:
        order.append(f"{name} begins")
        begun.set()
        if waits:
            await gate.wait()
        order.append(f"{name} ends")
        return name

    first = asyncio.create_task(serial.run("a", operation("first", waits=True)))
    second = asyncio.create_task(serial.run("a", operation("second")))
    await asyncio.wait_for(begun.wait(), 1.0)
    assert await serial.run("b", operation("other")) == "other"
    assert order == ["first begins", "other begins", "other ends"]
    gate.set()
    assert [await first, await second] == ["first", "second"]
    assert order[3:] == ["first ends", "second begins", "second ends"]
    assert not serial.is_busy("a")


async def test_an_operation_outlives_its_caller() -> None:
    serial, gate, ended = SerialOperations(), asyncio.Event(), []

    async def operation(name: str) -> None:
        await gate.wait()
        ended.append(name)

    caller = asyncio.create_task(serial.run("a", operation("first")))
    await asyncio.sleep(0)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert serial.is_busy("a")
    gate.set()
    await serial.run("a", operation("second"))
    assert ended == ["first", "second"]


async def test_a_failure_reaches_the_caller_and_frees_the_id() -> None:
    serial = SerialOperations()

    async def fail() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await serial.run("a", fail())
    assert not serial.is_busy("a")


async def test_closing_waits_for_what_nobody_waits_for() -> None:
    serial, ended = SerialOperations(), []

    async def operation() -> None:
        await asyncio.sleep(0)
        ended.append("done")

    serial.begin("a", operation())
    await serial.close()
    assert ended == ["done"]
