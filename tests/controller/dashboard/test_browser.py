"""The dashboard in a real browser, served over HTTP."""

import json
import shutil
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.wait import WebDriverWait

from controller.dashboard.views import dashboard_router
from controller.store.errors import DatabaseUnavailable
from tests.fakes.clock import FakeClock
from tests.fakes.dashboard import FROM_PARKED, FakeHouse, cold_start, function

pytestmark = [pytest.mark.browser, pytest.mark.timeout(120)]

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
WIDE, PHONE = (1280, 900), (390, 844)
WAIT_S = 20


class _Server(uvicorn.Server):
    """Says when it listens, and on which port."""

    def __init__(self, app: FastAPI) -> None:
        super().__init__(
            uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", lifespan="off")
        )
        self.listens = threading.Event()

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        self.listens.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.servers[0].sockets[0].getsockname()[1]}"


@pytest.fixture
def house() -> FakeHouse:
    return FakeHouse()


@pytest.fixture
def server(house: FakeHouse) -> Iterator[_Server]:
    app = FastAPI()
    app.include_router(dashboard_router(house, house, FakeClock()))
    running = _Server(app)
    thread = threading.Thread(target=running.run, name="dashboard")
    thread.start()
    assert running.listens.wait(WAIT_S)
    yield running
    running.should_exit = True
    thread.join(WAIT_S)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    if CHROMIUM is None or DRIVER is None:
        pytest.fail("install chromium and chromium-driver", pytrace=False)
    options = ChromeOptions()
    options.binary_location = CHROMIUM
    profile = tmp_path_factory.mktemp("chromium")
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


class Page:
    """The dashboard in the browser."""

    def __init__(self, driver: Chrome, server: _Server) -> None:
        self._driver = driver
        self._server = server
        self._log("browser")
        self._log("performance")

    def open(
        self, path: str = "/", *, size: tuple[int, int] = WIDE, scheme: str = "light"
    ) -> "Page":
        width, height = size
        self._command(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": scheme}],
        )
        self._command(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=size == PHONE,
        )
        self._driver.get(self._server.url + path)
        self.wait_for(lambda: self.text("#refresh-state") == "Live")
        return self

    def _command(self, name: str, **parameters: object) -> None:
        self._driver.execute_cdp_cmd(name, parameters)

    def run(self, script: str) -> Any:
        return self._driver.execute_script(script)

    def text(self, selector: str) -> str:
        # In one step: a refresh may replace the element between finding and reading it.
        return str(self.run(f"return document.querySelector({json.dumps(selector)}).innerText"))

    def count(self, selector: str) -> int:
        return int(self.run(f"return document.querySelectorAll({json.dumps(selector)}).length"))

    def click(self, selector: str) -> None:
        self.run(
            f"const one = document.querySelector({json.dumps(selector)}); one.focus(); one.click()"
        )

    def wait_for(self, condition: Any) -> None:
        WebDriverWait(self._driver, WAIT_S, 0.05).until(lambda _: condition())

    def background(self) -> str:
        return str(self.run("return getComputedStyle(document.body).backgroundColor"))

    def _log(self, name: str) -> list[str]:
        """Take the messages since the last time."""
        entries = self._driver.get_log(name)  # type: ignore[no-untyped-call]
        return [str(entry["message"]) for entry in entries]

    def console(self) -> list[str]:
        return self._log("browser")

    def requested(self) -> set[str]:
        """Every address that the page asked for."""
        messages = (json.loads(entry)["message"] for entry in self._log("performance"))
        return {
            message["params"]["request"]["url"]
            for message in messages
            if message["method"] == "Network.requestWillBeSent"
        }


@pytest.fixture
def page(chromium: Chrome, server: _Server) -> Page:
    return Page(chromium, server)


def test_page_shows_the_node_without_an_error_in_the_console(page: Page) -> None:
    page.open()
    assert "smollm2" in page.text("#functions")
    assert "$19.68" in page.text("#tiles")
    assert page.count("#cold-starts .waterfall") == 4
    assert page.console() == []


def test_nothing_is_fetched_from_anywhere_else(page: Page, server: _Server) -> None:
    page.open()
    live = "/dashboard/live?window=24h&by=function"
    fetched = "return performance.getEntriesByType('resource').map((one) => one.name).join(' ')"
    page.wait_for(lambda: live in page.run(fetched))
    requested = page.requested()
    assert server.url + live in requested
    assert not {address for address in requested if not address.startswith(server.url)}


def test_changes_appear_without_a_reload(page: Page, house: FakeHouse) -> None:
    page.open()
    page.run("window.sameDocument = true")
    house.functions = [function("newcomer", "ready", in_flight=7)]
    house.starts = [cold_start(9, "newcomer", FROM_PARKED)]
    page.wait_for(lambda: "newcomer" in page.text("#functions"))
    assert "newcomer" in page.text("#cold-starts")
    assert page.run("return window.sameDocument")


def test_opened_figures_stay_open_and_focused_over_a_refresh(page: Page, house: FakeHouse) -> None:
    page.open()
    page.click("#cost-summary")
    house.hours = {"smollm2": (5.0, 5.0)}
    page.wait_for(lambda: "5 h 00 m" in page.text("#cost-table"))
    assert page.run("return document.getElementById('cost-table').open")
    assert page.run("return document.activeElement.id") == "cost-summary"


def test_refresh_can_be_paused(page: Page, house: FakeHouse) -> None:
    page.open()
    page.click("#refresh-toggle")
    assert page.text("#refresh-state") == "Paused"
    house.functions = [function("newcomer", "ready")]
    before = page.run("return performance.getEntriesByType('resource').length")
    page.run("document.dispatchEvent(new Event('visibilitychange'))")
    assert page.run("return performance.getEntriesByType('resource').length") == before
    page.click("#refresh-toggle")
    page.wait_for(lambda: "newcomer" in page.text("#functions"))


def test_lost_connection_is_said_and_the_last_state_stays(page: Page, server: _Server) -> None:
    page.open()
    page.run("window.fetch = () => Promise.reject(new TypeError('gone'))")
    page.wait_for(lambda: "No connection" in page.text("#refresh-state"))
    assert "smollm2" in page.text("#functions")


def test_books_that_are_away_are_said_and_come_back(page: Page, house: FakeHouse) -> None:
    house.failure = DatabaseUnavailable("the disk is full")
    page.open()
    assert "the disk is full" in page.text("#problem")
    assert page.count("#cold-starts .waterfall") == 0
    house.failure = None
    page.wait_for(lambda: page.count("#cold-starts .waterfall") == 4)
    assert page.text("#problem") == ""


def test_page_follows_light_and_dark(page: Page) -> None:
    light = page.open(scheme="light").background()
    dark = page.open(scheme="dark").background()
    assert (light, dark) == ("rgb(245, 246, 248)", "rgb(13, 17, 23)")


@pytest.mark.parametrize("size", [WIDE, PHONE, (320, 640), (768, 1024)])
def test_nothing_is_wider_than_the_screen(
    page: Page, house: FakeHouse, size: tuple[int, int]
) -> None:
    long_name = "a" * 63
    house.functions = [function(long_name, "ready", source="/" + "x" * 200, last_error="e" * 300)]
    house.hours = {long_name: (3.0, 1.0)}
    house.starts = [cold_start(1, long_name, FROM_PARKED)]
    page.open(size=size)
    page.click("#cost-summary")
    assert page.run("return document.documentElement.scrollWidth") <= size[0]


def test_phone_shows_each_figure_with_its_name(page: Page) -> None:
    page.open(size=PHONE)
    label = "return getComputedStyle(document.querySelector('#functions td.number'), '::before').content"
    assert page.run(label) == '"In flight"'
    assert page.run("return getComputedStyle(document.querySelector('.wide')).display") == "none"


def test_bars_take_their_colours_from_the_stylesheet(page: Page) -> None:
    page.open()
    fill = "return getComputedStyle(document.querySelector('.wide .series.{} rect')).fill"
    assert page.run(fill.format("active")) == "rgb(242, 107, 33)"
    assert page.run(fill.format("idle")) == 'url("#hatch-idle")'
    assert page.run(fill.format("always-on")) == "rgb(180, 188, 198)"


def test_hostile_names_are_only_text(page: Page, house: FakeHouse) -> None:
    evil = "<img src=x onerror=\"document.title='owned'\">"
    house.functions = [function(evil, "ready", source=evil, last_error=evil)]
    house.hours = {evil: (1.0, 1.0)}
    house.starts = [cold_start(1, evil, [(evil, 1.0)], from_tier=evil, outcome=evil)]
    page.open()
    assert evil in page.text("#functions")
    assert page.count("main img") == 0
    assert page.run("return document.title") == "Coldspark"
    assert page.console() == []


def test_everything_that_can_be_pressed_has_a_name_and_can_be_reached_by_keyboard(
    page: Page,
) -> None:
    page.open()
    unnamed = """
        return [...document.querySelectorAll('a, button, summary, [tabindex], meter, progress, nav')]
            .filter((one) => !(one.textContent.trim() || one.getAttribute('aria-label')))
            .map((one) => one.outerHTML)
    """
    assert page.run(unnamed) == []
    unreachable = "return [...document.querySelectorAll('a, button, summary')].filter((one) => one.tabIndex < 0).length"
    assert page.run(unreachable) == 0
    assert page.run("return [...document.querySelectorAll('svg[role=img] > title')].length") >= 8


def test_window_can_be_chosen(page: Page) -> None:
    page.open()
    page.click('nav[aria-label="Time window"] a:nth-child(3)')
    page.wait_for(lambda: page.text('nav[aria-label="Time window"] a[aria-current]') == "7d")
    assert "7 days" in page.text("#functions")
