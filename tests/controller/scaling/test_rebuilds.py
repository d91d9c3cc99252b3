"""Snapshots that runtimes cannot load: quarantined, built anew once, and their functions held."""

import asyncio
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from controller.errors import ActivationFailed
from controller.scaling.plane import ControlPlane
from controller.scaling.preparation import BuildProgress
from controller.scaling.rebuilds import REBUILD_WINDOW_S
from functions.spec import FunctionSpec
from tests.controller.scaling.test_plane import Machine, until_built
from tests.fakes.runtime import FakeRuntime
from tests.fakes.world import collect, spec_of

pytestmark = [pytest.mark.looptime, pytest.mark.model]

DAMAGE = "chunk 3: was read with wrong bytes"


class DamagedMachine(Machine):
    """A machine with a snapshot of its own, whose runtimes find it damaged."""

    def __init__(self, original: Path, store: Path) -> None:
        self.original = original
        self.num_builds = 0
        super().__init__(self._copy_to(store))

    def _copy_to(self, store: Path) -> Path:
        return Path(
            shutil.copytree(self.original, store / self.original.name, copy_function=os.link)
        )

    async def build(
        self, spec: FunctionSpec, store: Path, on_progress: Callable[[BuildProgress], None]
    ) -> str:
        """Make the snapshot again if it is gone."""
        self.num_builds += 1
        ref = await super().build(spec, store, on_progress)
        if not self.snapshot.exists():
            self._copy_to(store)
        return ref

    def damage(self, reason: str = DAMAGE) -> None:
        """Have every runtime, those that come included, find the snapshot damaged."""
        self.world.make_runtime = lambda: FakeRuntime(damage=reason)
        for runtime in self.world.runtimes.values():
            runtime.damage = reason

    def is_quarantined(self) -> bool:
        """Whether it lies aside, with the reason."""
        note = self.snapshot.parent / ".quarantine" / self.snapshot.name / "quarantine.txt"
        return note.exists() and DAMAGE in note.read_text()


@pytest.fixture
async def machine(smollm2_snapshot: Path, tmp_path: Path) -> DamagedMachine:
    return DamagedMachine(smollm2_snapshot, tmp_path)


async def deployed(plane: ControlPlane, name: str = "tiny") -> None:
    await plane.deploy(spec_of(name=name), "fake")
    await until_built(plane, name)


async def test_a_damaged_snapshot_is_put_aside_and_built_anew(machine: DamagedMachine) -> None:
    async with machine.controller() as plane:
        await deployed(plane)
        machine.damage()
        machine.may_build.clear()
        with pytest.raises(ActivationFailed, match="is being built anew") as told:
            await collect(plane.resolve("tiny"))
        assert DAMAGE in str(told.value)
        assert told.value.retry_after_s is not None
        await asyncio.sleep(1.0)
        assert machine.is_quarantined()
        assert plane.view("tiny")["snapshot_state"] == "building"
        assert DAMAGE in plane.view("tiny")["last_error"]
        with pytest.raises(ActivationFailed, match="is being built anew"):
            await collect(plane.resolve("tiny"))
        machine.damage("")
        machine.may_build.set()
        assert (await until_built(plane))["snapshot_state"] == "ready"
        assert await collect(plane.resolve("tiny")) == [3, 4, 5, 6]
        assert machine.num_builds == 2


async def test_one_damaged_twice_is_given_up_until_the_next_deploy(
    machine: DamagedMachine,
) -> None:
    async with machine.controller() as plane:
        await deployed(plane)
        machine.damage()
        for _ in range(2):
            with pytest.raises(ActivationFailed):
                await collect(plane.resolve("tiny"))
            await asyncio.sleep(1.0)
            await until_built(plane)
        assert plane.view("tiny")["snapshot_state"] == "failed"
        assert "check the disk" in plane.view("tiny")["last_error"]
        with pytest.raises(ActivationFailed, match="check the disk"):
            await collect(plane.resolve("tiny"))
        assert machine.num_builds == 2
        machine.damage("")
        await deployed(plane)
        assert await collect(plane.resolve("tiny")) == [3, 4, 5, 6]


async def test_one_damaged_twice_over_a_long_time_is_built_anew_each_time(
    machine: DamagedMachine,
) -> None:
    async with machine.controller() as plane:
        await deployed(plane)
        for _ in range(2):
            machine.damage()
            with pytest.raises(ActivationFailed):
                await collect(plane.resolve("tiny"))
            machine.damage("")
            await asyncio.sleep(REBUILD_WINDOW_S + 1.0)
        assert await collect(plane.resolve("tiny")) == [3, 4, 5, 6]
        assert machine.num_builds == 3


async def test_a_build_that_fails_is_told_to_those_who_wait_for_it(
    machine: DamagedMachine,
) -> None:
    async with machine.controller() as plane:
        await deployed(plane)
        machine.damage()
        machine.build_error = "no such directory './model'"
        with pytest.raises(ActivationFailed, match="is being built anew"):
            await collect(plane.resolve("tiny"))
        await asyncio.sleep(1.0)
        assert (await until_built(plane))["snapshot_state"] == "failed"
        with pytest.raises(ActivationFailed, match="no such directory"):
            await collect(plane.resolve("tiny"))


async def test_a_replica_that_is_up_serves_on(machine: DamagedMachine) -> None:
    async with machine.controller() as plane:
        await plane.deploy(spec_of(), "fake")
        await plane.deploy(spec_of(name="other"), "fake")
        await until_built(plane)
        await until_built(plane, "other")
        assert await collect(plane.resolve("tiny")) == [3, 4, 5, 6]
        machine.damage()
        machine.may_build.clear()
        with pytest.raises(ActivationFailed, match="is being built anew"):
            await collect(plane.resolve("other"))
        assert await collect(plane.resolve("tiny")) == [3, 4, 5, 6]
        machine.damage("")
        machine.may_build.set()
        await until_built(plane, "other")
        assert await collect(plane.resolve("other")) == [3, 4, 5, 6]


async def test_damage_found_when_waking_is_no_other_damage(machine: DamagedMachine) -> None:
    async with machine.controller() as plane:
        await deployed(plane)
        await collect(plane.resolve("tiny"))
        await plane.park("tiny")
        await asyncio.sleep(1.0)
        machine.damage()
        with pytest.raises(ActivationFailed, match="is being built anew"):
            await collect(plane.resolve("tiny"))
        machine.damage("")
        await asyncio.sleep(1.0)
        await until_built(plane)
        assert machine.is_quarantined()
        assert await collect(plane.resolve("tiny")) == [3, 4, 5, 6]
