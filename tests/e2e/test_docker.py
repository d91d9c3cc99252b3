"""A function in a container, as `coldspark deploy --backend docker` runs it."""

from collections.abc import Iterator
from typing import Any

import docker
import pytest

from tests.conftest import REPOSITORY
from tests.docker_engine import runtime_image
from tests.e2e.conftest import Node, wait_for
from tests.e2e.test_life import PARIS, settled_in

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.model,
    pytest.mark.docker,
    pytest.mark.timeout(240),
]
YAML = REPOSITORY / "functions" / "smollm2.yaml"


@pytest.fixture
def containers() -> Iterator[Any]:
    """The Docker Engine's containers; none of ours is left at the end."""
    runtime_image()  # skips where there is no engine
    client = docker.from_env()
    yield client.containers
    for container in client.containers.list(
        all=True, filters={"label": "io.coldspark.cluster=e2e"}
    ):
        container.remove(force=True)
    client.close()


def test_a_function_lives_its_whole_life_in_a_locked_down_container(
    node: Node, containers: Any
) -> None:
    node.terminate()
    node.environment |= {
        "COLDSPARK_DOCKER_IMAGE": runtime_image(),
        "COLDSPARK_CLUSTER": "e2e",
    }
    node.start()
    node.coldspark("deploy", "-f", str(YAML), "--backend", "docker")
    assert node.ask() == PARIS
    (container,) = containers.list(filters={"label": "io.coldspark.cluster=e2e"})
    host = container.attrs["HostConfig"]
    assert container.attrs["Config"]["User"].split(":")[0] not in ("", "0", "root")
    assert host["ReadonlyRootfs"]
    assert host["NetworkMode"] == "none"
    assert host["CapDrop"] == ["ALL"]
    assert any("no-new-privileges" in option for option in host["SecurityOpt"])
    assert node.operate("park")["tier"] == "parked"
    assert node.ask() == PARIS
    node.kill()
    node.start()
    assert wait_for(lambda: settled_in(node, "ready"), "adoption")
    assert node.ask() == PARIS
    container.kill()
    assert node.ask() == PARIS, "a new container takes over"
    node.coldspark("delete", "smollm2")
    assert not containers.list(all=True, filters={"label": "io.coldspark.cluster=e2e"})
