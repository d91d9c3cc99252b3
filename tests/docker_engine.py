"""The Docker Engine of the tests that need one: they are skipped without, or fail where CI is set.

The images are named by TEST_DOCKER_BASE_IMAGE, which has an interpreter, and
TEST_DOCKER_RUNTIME_IMAGE, which is what `make image` builds.
"""

import os
from typing import NoReturn

import pytest
from docker.errors import DockerException, ImageNotFound

from controller.backends.docker_engine import connect_from_environment


def base_image() -> str:
    """Return an image with python3 in it, or skip the test."""
    return _present(os.environ.get("TEST_DOCKER_BASE_IMAGE", "coldspark-base:bookworm"))


def runtime_image() -> str:
    """Return the runtime's image, or skip the test."""
    return _present(os.environ.get("TEST_DOCKER_RUNTIME_IMAGE", "coldspark-runtime:latest"))


def _present(image: str) -> str:
    try:
        client = connect_from_environment()
    except (DockerException, OSError) as error:
        _give_up(f"no Docker Engine answers: {error}")
    try:
        client.images.get(image)
    except ImageNotFound:
        _give_up(f"the Docker Engine has no image {image!r}; .ci/images makes it")
    finally:
        client.close()
    return image


def _give_up(reason: str) -> NoReturn:
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)
