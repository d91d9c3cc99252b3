"""What is said about a function's replicas, on loop time."""

import pytest

from controller.scaling.views import function_view
from tests.fakes.runtime import FakeRuntime
from tests.fakes.world import World, collect

pytestmark = pytest.mark.looptime


async def test_a_parked_replica_says_what_it_still_holds() -> None:
    world = World(make_runtime=lambda: FakeRuntime(context_bytes=5 << 20))
    async with world.function() as function:
        await collect(function)
        await function.park()
        (replica,) = function_view(function)["replicas"]
    assert (replica["state"], replica["memory"]["weights_bytes"]) == ("parked", 0)
    assert replica["memory"]["kept_bytes"] == 5 << 20
