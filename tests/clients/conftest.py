"""Other people's clients in an environment of their own, and one controller for all of them."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from functions.loader import load_file
from tests.conftest import REPOSITORY
from tests.e2e.conftest import Node, home_directory, running_node

CLIENTS = REPOSITORY / ".venv-clients"


@pytest.fixture(scope="session")
def clients() -> Path:
    """Return the environment that `make clients` makes."""
    if not (CLIENTS / ".installed").is_file():
        missing = f"{CLIENTS} is missing: run `make clients`"
        if "CI" in os.environ:
            pytest.fail(missing, pytrace=False)
        pytest.skip(missing)
    return CLIENTS


@pytest.fixture(scope="session")
def warm_node(clients: Path, smollm2_snapshot: Path) -> Iterator[Node]:
    """A controller with the small real model ready on it."""
    with home_directory() as home:
        (home / "snapshots").symlink_to(smollm2_snapshot.parent)
        with running_node(home) as node:
            node.deploy(load_file(REPOSITORY / "functions" / "smollm2.yaml"))
            node.operate("warm")
            yield node
