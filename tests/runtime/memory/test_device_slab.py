"""Slabs over a driver that only counts what it has given out."""

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

GRANULARITY = 2 << 20
ADDRESS = 1 << 40
SUCCESS, OUT_OF_MEMORY, UNKNOWN = 0, 2, 999


class FakeDriver:
    """The driver's virtual memory: reservations, allocations, mappings.

    `failing` names the calls that fail, with which answer.
    """

    def __init__(self) -> None:
        self.failing: dict[str, int] = {}
        self.reserved: set[int] = set()
        self.taken: list[int] = []
        self.handles: set[int] = set()
        self.mapped: dict[int, int] = {}
        self.accessible: set[int] = set()

    def module(self) -> Any:
        """Return what stands for `cuda.bindings.driver`."""
        module: Any = ModuleType("cuda.bindings.driver")
        module.CUresult = SimpleNamespace(
            CUDA_SUCCESS=SUCCESS, CUDA_ERROR_OUT_OF_MEMORY=OUT_OF_MEMORY
        )
        module.CUmemAllocationProp = lambda: SimpleNamespace(location=SimpleNamespace())
        module.CUmemAccessDesc = SimpleNamespace
        for name, member in {
            "CUmemAllocationType": "CU_MEM_ALLOCATION_TYPE_PINNED",
            "CUmemLocationType": "CU_MEM_LOCATION_TYPE_DEVICE",
            "CUmemAccess_flags": "CU_MEM_ACCESS_FLAGS_PROT_READWRITE",
            "CUmemAllocationGranularity_flags": "CU_MEM_ALLOC_GRANULARITY_RECOMMENDED",
        }.items():
            setattr(module, name, SimpleNamespace(**{member: 1}))
        for name in dir(self):
            if name.startswith("cu"):
                setattr(module, name, self._call(name))
        return module

    def _call(self, name: str) -> Any:
        def call(*arguments: Any) -> tuple[Any, ...]:
            if name in self.failing:
                return (self.failing[name], b"")
            return (SUCCESS, getattr(self, name)(*arguments))

        return call

    def cuGetErrorName(self, error: int) -> bytes:  # the driver's names
        return f"CUDA_ERROR_{error}".encode()

    def cuMemGetAllocationGranularity(self, _properties: Any, _flags: Any) -> int:
        return GRANULARITY

    def cuMemAddressReserve(self, num_bytes: int, *_: Any) -> int:
        assert num_bytes % GRANULARITY == 0
        self.reserved.add(ADDRESS)
        return ADDRESS

    def cuMemAddressFree(self, address: int, _num_bytes: int) -> None:
        assert address not in self.mapped, "addresses that are still in use"
        self.reserved.remove(address)

    def cuMemCreate(self, num_bytes: int, *_: Any) -> int:
        self.taken.append(num_bytes)
        handle = len(self.handles) + 1
        self.handles.add(handle)
        return handle

    def cuMemRelease(self, handle: int) -> None:
        assert handle not in self.mapped.values(), "the memory stays until it is unmapped"
        self.handles.remove(handle)

    def cuMemMap(
        self, address: int, _num_bytes: int, _offset: int, handle: int, _flags: int
    ) -> None:
        assert address in self.reserved
        self.mapped[address] = handle

    def cuMemSetAccess(self, address: int, *_: Any) -> None:
        self.accessible.add(self.mapped[address])

    def cuMemUnmap(self, address: int, _num_bytes: int) -> None:
        self.mapped.pop(address, None)


@pytest.fixture
def driver() -> FakeDriver:
    return FakeDriver()


@pytest.fixture
def slab_class(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """`DeviceSlab`, imported over the fake driver."""
    packages: dict[str, Any] = {"cuda": ModuleType("cuda"), "cuda.bindings": ModuleType("bindings")}
    packages["cuda.bindings"].driver = packages["cuda.bindings.driver"] = driver.module()
    for name, module in packages.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "runtime.memory.device_slab", raising=False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (5, 7))
    monkeypatch.setattr(torch, "as_tensor", lambda *_, **__: torch.empty(0))
    yield importlib.import_module("runtime.memory.device_slab").DeviceSlab
    del sys.modules["runtime.memory.device_slab"]


def test_a_slab_gives_back_all_it_took(driver: FakeDriver, slab_class: Any) -> None:
    slab = slab_class(3 << 20)
    assert driver.accessible == driver.handles != set()
    slab.unmap()
    assert (driver.handles, driver.mapped, driver.reserved) == (set(), {}, {ADDRESS})
    slab.map()
    slab.release()
    assert (driver.handles, driver.mapped, driver.reserved) == (set(), {}, set())


@pytest.mark.parametrize("call", ["cuMemCreate", "cuMemMap", "cuMemSetAccess"])
def test_memory_that_cannot_be_mapped_is_given_back(
    driver: FakeDriver, slab_class: Any, call: str
) -> None:
    slab = slab_class(GRANULARITY)
    slab.unmap()
    driver.failing = {call: UNKNOWN}
    with pytest.raises(RuntimeError, match="CUDA_ERROR_999"):
        slab.map()
    assert (driver.handles, driver.mapped) == (set(), {})
    assert not slab.is_mapped
    driver.failing = {}
    slab.map()
    assert slab.is_mapped


@pytest.mark.parametrize(
    ("call", "answer", "message"),
    [
        ("cuMemCreate", OUT_OF_MEMORY, "5 of 7 bytes free"),
        ("cuMemMap", UNKNOWN, "CUDA_ERROR_999"),
        ("cuMemSetAccess", UNKNOWN, "CUDA_ERROR_999"),
    ],
)
def test_a_slab_that_cannot_be_made_leaves_nothing(
    driver: FakeDriver, slab_class: Any, call: str, answer: int, message: str
) -> None:
    driver.failing = {call: answer}
    with pytest.raises(Exception, match=message):
        slab_class(GRANULARITY)
    assert (driver.handles, driver.mapped, driver.reserved) == (set(), {}, set())


def test_settling_leaves_nothing_taken(driver: FakeDriver, slab_class: Any) -> None:
    settle_freed = sys.modules[slab_class.__module__].settle_freed
    settle_freed()
    assert (driver.taken, driver.handles) == ([GRANULARITY], set())
    driver.failing = {"cuMemCreate": OUT_OF_MEMORY}
    settle_freed()
    assert driver.handles == set(), "whoever has the memory now has it settled"
