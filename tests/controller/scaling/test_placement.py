"""Who is promised which device's memory."""

import pytest

from controller.scaling.placement import (
    CPU_DEVICE_ID,
    ENGINE_OVERHEAD_BYTES,
    Demand,
    Device,
    DeviceKind,
    MemoryLedger,
    Unschedulable,
    demand_of,
)
from tests.fakes.world import spec_of

GIB = 1 << 30
WHOLE = Demand(num_gpus=1, memory_share=0.9)
HALF = Demand(num_gpus=1, memory_share=0.5)


class Releases:
    def __init__(self) -> None:
        self.num = 0

    def __call__(self) -> None:
        self.num += 1


def ledger_of(num_gpus: int, releases: Releases | None = None) -> MemoryLedger:
    gpus = [
        Device(id=f"GPU-{index}", kind=DeviceKind.GPU, memory_bytes=10 * GIB)
        for index in range(num_gpus)
    ]
    cpu = Device(id=CPU_DEVICE_ID, kind=DeviceKind.CPU, memory_bytes=4 * GIB)
    ledger = MemoryLedger([*gpus, cpu])
    if releases is not None:
        ledger.on_release(releases)
    return ledger


def test_a_gpus_memory_is_promised_once() -> None:
    releases = Releases()
    ledger = ledger_of(1, releases)
    assert ledger.place("a", WHOLE) == ("GPU-0",)
    assert ledger.place("b", WHOLE) is None
    ledger.release("a")
    assert releases.num == 1
    assert ledger.place("b", WHOLE) == ("GPU-0",)


def test_small_ones_share_a_gpu_as_long_as_there_is_room() -> None:
    ledger = ledger_of(1)
    assert ledger.place("a", HALF) == ledger.place("b", HALF) == ("GPU-0",)
    assert ledger.free_bytes("GPU-0") == 0
    assert ledger.place("c", Demand(num_gpus=1, memory_bytes=1)) is None
    assert dict(ledger.held("GPU-0")) == {"a": 5 * GIB, "b": 5 * GIB}


def test_the_gpu_with_the_most_room_is_taken() -> None:
    ledger = ledger_of(2)
    assert ledger.place("a", HALF) == ("GPU-0",)
    assert ledger.place("b", HALF) == ("GPU-1",)


def test_a_replica_is_placed_among_those_it_may_have() -> None:
    ledger = ledger_of(2)
    assert ledger.place("a", HALF, among=("GPU-1",)) == ("GPU-1",)
    assert ledger.place("b", HALF, among=()) is None


def test_the_processors_memory_is_promised_too() -> None:
    ledger = ledger_of(0)
    most = Demand(num_gpus=0, memory_bytes=3 * GIB)
    assert ledger.place("a", most) == (CPU_DEVICE_ID,)
    assert ledger.place("b", most) is None
    assert ledger.place("c", Demand(num_gpus=0, memory_bytes=0)) == (CPU_DEVICE_ID,)


def test_several_gpus_are_given_together_or_not_at_all() -> None:
    ledger = ledger_of(3)
    two = Demand(num_gpus=2, memory_share=0.9)
    assert ledger.place("a", two) == ("GPU-0", "GPU-1")
    assert ledger.place("b", two) is None
    assert ledger.place("c", WHOLE) == ("GPU-2",)


def test_a_parked_replica_holds_what_it_keeps_and_no_more() -> None:
    ledger = ledger_of(1)
    ledger.place("a", WHOLE)
    ledger.keep("a", ["GPU-0"], 2 * GIB)
    assert ledger.free_bytes("GPU-0") == 8 * GIB
    assert ledger.place("b", WHOLE) is None, "the 9 GiB are not there"
    assert ledger.place("b", HALF) is not None


def test_a_waking_replica_takes_its_own_gpus_back_only_when_there_is_room() -> None:
    ledger = ledger_of(2)
    both = Demand(num_gpus=2, memory_share=0.9)
    assert ledger.place("a", both) is not None
    ledger.keep("a", ["GPU-0", "GPU-1"], GIB)
    assert ledger.place("b", Demand(num_gpus=1, memory_share=0.2)) == ("GPU-0",)
    assert not ledger.claim("a", ["GPU-0", "GPU-1"], both)
    assert ledger.free_bytes("GPU-1") == 9 * GIB, "a refused claim must hold nothing more"
    ledger.release("b")
    assert ledger.claim("a", ["GPU-0", "GPU-1"], both), "what it kept counts as its own"
    assert ledger.claim("a", ["GPU-0", "GPU-1"], both), "claiming what one holds is no conflict"
    assert ledger.free_bytes("GPU-1") == GIB


def test_what_others_hold_is_promised_to_nobody() -> None:
    ledger = ledger_of(2)
    ledger.set_foreign("GPU-0", 6 * GIB)
    assert ledger.place("a", HALF) == ("GPU-1",)
    assert ledger.place("b", HALF) == ("GPU-1",)
    assert ledger.place("c", HALF) is None
    assert ledger.place("d", Demand(num_gpus=1, memory_bytes=4 * GIB)) == ("GPU-0",)
    assert ledger.promised_bytes("GPU-0") == 4 * GIB


def test_what_others_hold_is_an_obstacle_only_if_it_alone_leaves_too_little() -> None:
    ledger = ledger_of(2)
    assert ledger.obstacle(WHOLE) == ""
    ledger.set_foreign("GPU-0", 8 * GIB)
    assert ledger.obstacle(WHOLE) == ""
    ledger.set_foreign("GPU-1", 5 * GIB // 2)
    assert ledger.obstacle(HALF) == ""
    assert ledger.obstacle(WHOLE) == (
        "8.0 GiB of GPU-0, 2.5 GiB of GPU-1 are held by processes that are not Coldspark's"
    )


def test_what_others_give_back_is_told() -> None:
    releases = Releases()
    ledger = ledger_of(1, releases)
    for num_bytes in (GIB, 2 * GIB, 2 * GIB, GIB, None):
        ledger.set_foreign("GPU-0", num_bytes)
    assert releases.num == 2


def test_releasing_nothing_tells_nobody() -> None:
    releases = Releases()
    ledger_of(1, releases).release("stranger")
    assert releases.num == 0


@pytest.mark.parametrize(
    ("demand", "param", "message"),
    [
        (Demand(num_gpus=2), "resources.gpus", "is 2 and this machine has 1"),
        (
            Demand(num_gpus=1, memory_bytes=11 * GIB),
            "engine.kv_cache_memory_bytes",
            "a GPU has 10737418240",
        ),
        (Demand(num_gpus=0, memory_bytes=5 * GIB), "resources.memory", "this machine has 42949"),
    ],
)
def test_what_the_machine_can_never_hold_is_said_at_once(
    demand: Demand, param: str, message: str
) -> None:
    with pytest.raises(Unschedulable, match=message) as raised:
        ledger_of(1).check(demand)
    assert raised.value.param == param


def test_a_functions_demand_is_its_share_or_what_its_sizes_add_up_to() -> None:
    def weights() -> int:
        return 3 * GIB

    share = spec_of(resources={"gpus": 1}, engine={"gpu_memory_utilization": 0.4})
    assert demand_of(share, weights) == Demand(num_gpus=1, memory_share=0.4)
    sized = spec_of(resources={"gpus": 1}, engine={"kv_cache_memory_bytes": "1Gi"})
    needed = 3 * GIB + GIB + ENGINE_OVERHEAD_BYTES
    assert demand_of(sized, weights) == Demand(num_gpus=1, memory_bytes=needed)
    on_cpu = spec_of(resources={"gpus": 0, "memory": "2Gi"})
    assert demand_of(on_cpu, weights) == Demand(num_gpus=0, memory_bytes=2 * GIB)
    assert demand_of(spec_of(), weights).memory_bytes == 0, "no limit, no promise"
