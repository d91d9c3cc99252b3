from collections.abc import AsyncIterator
from xml.etree import ElementTree

import httpx
import pytest
from fastapi import FastAPI, Request, Response

from controller.dashboard.views import dashboard_router
from controller.errors import ApiError
from controller.store.errors import DatabaseUnavailable
from tests.fakes.clock import FakeClock
from tests.fakes.dashboard import FakeHouse, cold_start, function


@pytest.fixture
def house() -> FakeHouse:
    return FakeHouse()


@pytest.fixture
async def client(house: FakeHouse) -> AsyncIterator[httpx.AsyncClient]:
    app = FastAPI()
    app.include_router(dashboard_router(house, house, FakeClock()))

    @app.exception_handler(ApiError)
    async def refuse(request: Request, error: ApiError) -> Response:
        return Response(error.message, status_code=error.status)

    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://node") as opened:
        yield opened


async def test_page_shows_functions_money_and_cold_starts(client: httpx.AsyncClient) -> None:
    page = await client.get("/")
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    for text in ("smollm2", "parked", "769 MiB", "$160.32", "runtime import", "cpu:0"):
        assert text in page.text


async def test_live_part_is_the_page_without_its_frame(client: httpx.AsyncClient) -> None:
    page = (await client.get("/")).text
    part = (await client.get("/dashboard/live")).text
    assert part in page
    assert "<html" not in part


async def test_window_and_grouping_are_kept_in_the_links(client: httpx.AsyncClient) -> None:
    page = (await client.get("/?window=7d&by=day")).text
    assert 'data-src="/dashboard/live?window=7d&amp;by=day"' in page
    assert 'href="/?window=1h&amp;by=day"' in page
    assert "in the last 7 days" in page or "of the last 7 days" in page


@pytest.mark.parametrize("query", ["window=1y", "by=moon"])
async def test_unknown_choices_are_refused(client: httpx.AsyncClient, query: str) -> None:
    assert (await client.get(f"/?{query}")).status_code == 422


async def test_everything_is_escaped(client: httpx.AsyncClient, house: FakeHouse) -> None:
    evil = '<script>alert("x")</script>'
    house.functions = [function(evil, "ready", source=evil, backend=evil, last_error=evil)]
    house.hours = {evil: (1.0, 1.0)}
    house.starts = [cold_start(1, evil, [(evil, 1.0)], from_tier=evil)]
    for path in ("/", "/dashboard/live"):
        assert "<script>alert" not in (await client.get(path)).text


async def test_every_element_is_closed_and_every_id_unique(client: httpx.AsyncClient) -> None:
    part = (await client.get("/dashboard/live")).text
    root = ElementTree.fromstring(f"<main>{part}</main>")
    ids = [element.get("id") for element in root.iter() if element.get("id")]
    assert len(ids) == len(set(ids)) > 5


async def test_functions_are_shown_while_the_books_are_away(
    client: httpx.AsyncClient, house: FakeHouse
) -> None:
    house.failure = DatabaseUnavailable("the disk is full")
    page = await client.get("/")
    assert page.status_code == 200
    assert "the disk is full" in page.text
    assert "smollm2" in page.text
    assert "Spent" not in page.text


async def test_empty_node_says_what_to_do(client: httpx.AsyncClient, house: FakeHouse) -> None:
    house.functions, house.starts, house.hours = [], [], {}
    page = (await client.get("/")).text
    assert "coldspark deploy -f functions/smollm2.yaml" in page
    assert "No device time in the last 24 hours" in page
    assert "No function has been woken yet" in page


async def test_page_may_load_only_from_here_and_run_only_our_script(
    client: httpx.AsyncClient,
) -> None:
    headers = (await client.get("/")).headers
    policy = headers["content-security-policy"]
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy
    assert "http" not in policy
    assert headers["cache-control"] == "no-store"


async def test_assets_have_addresses_that_change_with_their_content(
    client: httpx.AsyncClient,
) -> None:
    page = (await client.get("/")).text
    for name, media_type in (
        ("dashboard.css", "text/css"),
        ("dashboard.js", "text/javascript"),
        ("icon.svg", "image/svg+xml"),
    ):
        address = page.partition(f"/dashboard/static/{name}?v=")[2][:12]
        asset = await client.get(f"/dashboard/static/{name}?v={address}")
        assert asset.status_code == 200
        assert asset.headers["content-type"].startswith(media_type)
        assert "immutable" in asset.headers["cache-control"]


@pytest.mark.parametrize("name", ["nothing.css", "..%2Fviews.py", "%2e%2e%2ftemplates%2fpage.html"])
async def test_other_files_are_not_served(client: httpx.AsyncClient, name: str) -> None:
    assert (await client.get(f"/dashboard/static/{name}")).status_code == 404


async def test_dashboard_is_not_in_the_api_schema(client: httpx.AsyncClient) -> None:
    assert (await client.get("/openapi.json")).json()["paths"] == {}
