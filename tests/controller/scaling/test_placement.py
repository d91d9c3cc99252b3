"""Which devices a replica gets."""

import pytest

from controller.scaling.placement import (
    CPU_DEVICE_ID,
    Device,
    DeviceKind,
    DevicePool,
    Unschedulable,
)


class Releases:
    def __init__(self) -> None:
        self.num = 0

    def __call__(self) -> None:
        self.num += 1


def pool_of(num_gpus: int, releases: Releases | None = None) -> DevicePool:
    gpus = [
        Device(id=f"GPU-{index}", kind=DeviceKind.GPU, memory_bytes=1 << 30)
        for index in range(num_gpus)
    ]
    cpu = Device(id=CPU_DEVICE_ID, kind=DeviceKind.CPU, memory_bytes=1 << 30)
    pool = DevicePool([*gpus, cpu])
    if releases is not None:
        pool.on_release(releases)
    return pool


def test_a_gpu_serves_one_replica_until_it_is_released() -> None:
    releases = Releases()
    pool = pool_of(1, releases)
    assert pool.reserve("a", 1) == ("GPU-0",)
    assert pool.reserve("b", 1) is None
    pool.release("a")
    assert releases.num == 1
    assert pool.reserve("b", 1) == ("GPU-0",)


def test_the_processor_is_shared() -> None:
    pool = pool_of(0)
    assert pool.reserve("a", 0) == pool.reserve("b", 0) == (CPU_DEVICE_ID,)


def test_several_gpus_are_given_together_or_not_at_all() -> None:
    pool = pool_of(3)
    assert pool.reserve("a", 2) == ("GPU-0", "GPU-1")
    assert pool.reserve("b", 2) is None
    assert pool.reserve("c", 1) == ("GPU-2",)


def test_a_waking_replica_takes_its_own_gpus_back_only_when_they_are_free() -> None:
    pool = pool_of(2)
    assert pool.reserve("a", 2) is not None
    pool.release("a")
    assert pool.reserve("b", 1) == ("GPU-0",)
    assert not pool.claim("a", ["GPU-0", "GPU-1"])
    assert pool.reserve("c", 1) == ("GPU-1",), "a refused claim must hold nothing"
    pool.release("b")
    pool.release("c")
    assert pool.claim("a", ["GPU-0", "GPU-1"])
    assert pool.claim("a", ["GPU-0", "GPU-1"]), "claiming what one holds is no conflict"


def test_releasing_nothing_tells_nobody() -> None:
    releases = Releases()
    pool_of(1, releases).release("stranger")
    assert releases.num == 0


def test_what_the_machine_can_never_hold_is_said_at_once() -> None:
    pool = pool_of(1)
    pool.check(1)
    with pytest.raises(Unschedulable, match=r"resources.gpus is 2 and this machine has 1"):
        pool.check(2)
