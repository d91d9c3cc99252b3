import re
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import yaml
from fastapi import APIRouter
from fastapi.routing import APIRoute

from controller.cli.app import app
from controller.clock import SystemClock
from controller.gateway.routes import (
    admin,
    batches,
    chat,
    completions,
    embeddings,
    files,
    health,
    models,
    requests,
    responses,
    tokens,
)
from functions.loader import load_object

REPOSITORY = Path(__file__).parents[2]
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CHANGELOG.md", *REPOSITORY.glob("docs/**/*.md")]
LINK = re.compile(r"\]\((?!https?://)([^)#\s]*)(#[^)\s]*)?\)")


def ids(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def anchors_of(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_reference_pages_are_current() -> None:
    command = [sys.executable, "docs/generate_reference.py", "--check"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in LINK.findall(re.sub(r"`[^`\n]*`", "code", page.read_text())):
        path = (page.parent / target) if target else page
        assert path.exists(), f"{target} does not exist"
        if anchor:
            assert anchor[1:] in anchors_of(path), f"{path.name} has no {anchor}"


def routes() -> list[APIRoute]:
    nothing = cast("Any", None)
    routers: list[APIRouter] = [chat.router, completions.router, models.router, health.router]
    routers += [tokens.router, embeddings.router]
    routers += [files.files_router(*[nothing] * 4), batches.batches_router(nothing)]
    routers += [requests.requests_router(nothing), responses.response_making_router(nothing)]
    routers.append(responses.kept_responses_router(nothing, nothing))
    routers.append(admin.admin_router(nothing, nothing, nothing, SystemClock()))
    return [route for router in routers for route in router.routes if isinstance(route, APIRoute)]


def test_every_endpoint_is_described() -> None:
    page = (REPOSITORY / "docs/reference/http-api.md").read_text()
    described = set(re.findall(r"`([A-Z]+) (/[^`]*)`", page))
    generic = {(method, re.sub(r"{[^}]*}", "{}", path)) for method, path in described}
    for route in routes():
        for method in route.methods or ():
            assert (method, re.sub(r"{[^}]*}", "{}", route.path)) in generic, route.path


def test_tree_in_the_readme_names_what_exists() -> None:
    (block,) = re.findall(
        r"## Where things are\n\n```\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL
    )
    folder = ""
    for line in block.splitlines():
        name = line.split()[0]
        folder = "" if not line.startswith(" ") else folder
        assert (REPOSITORY / folder / name).exists(), f"{folder}{name}"
        folder = folder or name


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_specs_in_the_pages_are_valid(page: Path) -> None:
    for block in re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL):
        assert load_object(yaml.safe_load(block)).name


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_commands_in_the_pages_exist(page: Path) -> None:
    known = {command.name for command in app.registered_commands}
    known |= {group.name for group in app.registered_groups}
    for command in re.findall(r"(?:^|`)coldspark ([a-z]+)", page.read_text(), re.MULTILINE):
        assert command in known, f"coldspark {command}"
