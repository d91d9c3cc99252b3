"""The dashboard's pages. Read only; everything it needs comes with the package.

`/` is the whole page, `/dashboard/live` the part of it that a small script fetches again and again.
"""

import asyncio
import hashlib
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Protocol

import structlog
from fastapi import APIRouter, Query, Response
from fastapi.responses import HTMLResponse
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from controller.clock import Clock
from controller.dashboard.charts import HATCH_ID
from controller.dashboard.format import human_seconds
from controller.dashboard.money import Grouping, charts, cost_lines
from controller.dashboard.page import Books, Window, device_lines, function_lines, tiles
from controller.dashboard.waterfall import cold_start_lines
from controller.errors import NotFound
from controller.store.errors import StoreError

log = structlog.get_logger(__name__)

Json = dict[str, Any]

NUM_COLD_STARTS = 20
REFRESH_MS = 3000
CHART_WIDTHS = (560, 340)  # for wide and narrow screens; the stylesheet shows one
HERE = Path(__file__).parent
MEDIA_TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; "
    "img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
ASSET_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "public, max-age=31536000, immutable",  # the address has a hash of the content
}


class LiveSource(Protocol):
    """What runs now, as the admin API gives it."""

    def views(self) -> list[Json]:
        """Return every function's view."""

    async def status(self) -> Json:
        """Return the node."""


class HistorySource(Protocol):
    """What the store remembers, as the admin API gives it."""

    async def cold_starts(self, *, function: str | None, limit: int) -> list[Json]:
        """Return the latest cold starts, newest first."""

    async def cost(self, *, since: datetime, until: datetime, by: str) -> Json:
        """Return a cost report."""


def dashboard_router(live: LiveSource, history: HistorySource, clock: Clock) -> APIRouter:
    """Return the routes of the dashboard."""
    router = APIRouter(include_in_schema=False)
    dashboard = _Dashboard(live, history, clock)

    @router.get("/")
    async def page(
        window: Annotated[Window, Query()] = Window.DAY,
        by: Annotated[Grouping, Query()] = Grouping.FUNCTION,
    ) -> HTMLResponse:
        """Show the whole page."""
        return await dashboard.respond("page.html", window, by)

    @router.get("/dashboard/live")
    async def live_part(
        window: Annotated[Window, Query()] = Window.DAY,
        by: Annotated[Grouping, Query()] = Grouping.FUNCTION,
    ) -> HTMLResponse:
        """Show the part that changes."""
        return await dashboard.respond("live.html", window, by)

    @router.get("/dashboard/static/{name}")
    async def asset(name: str) -> Response:
        """Send a file of ours."""
        return dashboard.asset(name)

    return router


class _Dashboard:
    """Gathers what the page says and renders it."""

    def __init__(self, live: LiveSource, history: HistorySource, clock: Clock) -> None:
        self._live = live
        self._history = history
        self._clock = clock
        self._assets = {path.name: path.read_bytes() for path in (HERE / "static").iterdir()}
        self._templates = Environment(
            loader=FileSystemLoader(HERE / "templates"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._templates.globals.update(
            asset=self._asset_path,
            hatch_id=HATCH_ID,
            chart_widths=CHART_WIDTHS,
            refresh_ms=REFRESH_MS,
            windows=tuple(Window),
            groupings=tuple(Grouping),
        )

    async def respond(self, template: str, window: Window, by: Grouping) -> HTMLResponse:
        """Render a template for a window and a grouping."""
        now = self._clock.now()
        costs: Mapping[str, Json] = {}
        books, problem = None, ""
        try:
            report = await self._cost(window, Grouping.FUNCTION, now)
            costs = {row["group"]: row for row in report["rows"] if row["group"]}
            books = await self._books(report, window, by, now)
        except StoreError as error:
            log.warning("no books for the dashboard", error=str(error))
            problem = str(error)
        status = await self._live.status()
        values = {
            "window": window,
            "by": by,
            "now": now,
            "version": status["version"],
            "uptime": human_seconds(float(status["uptime_s"])),
            "devices": device_lines(status["devices"]),
            "functions": function_lines(self._live.views(), costs),
            "books": books,
            "problem": problem,
        }
        # Charts take milliseconds to draw, and streams of tokens share the event loop.
        html = await asyncio.to_thread(self._templates.get_template(template).render, values)
        return HTMLResponse(html, headers=HEADERS)

    async def _books(self, report: Json, window: Window, by: Grouping, now: datetime) -> Books:
        starts: Sequence[Json] = await self._history.cold_starts(
            function=None, limit=NUM_COLD_STARTS
        )
        grouped = report if by is Grouping.FUNCTION else await self._cost(window, by, now)
        drawn, num_hidden = charts(grouped, by)
        return Books(
            tiles=tiles(report["total"], starts, window),
            charts=drawn,
            num_hidden=num_hidden,
            costs=cost_lines(grouped),
            cold_starts=cold_start_lines(starts, now),
        )

    async def _cost(self, window: Window, by: Grouping, now: datetime) -> Json:
        return await self._history.cost(since=now - window.duration, until=now, by=str(by))

    def asset(self, name: str) -> Response:
        """Return a static file.

        Raises:
            NotFound: There is none of this name.
        """
        content = self._assets.get(name)
        if content is None:
            raise NotFound(f"no dashboard file is called {name!r}")
        media_type = MEDIA_TYPES[Path(name).suffix]
        return Response(content, media_type=media_type, headers=ASSET_HEADERS)

    def _asset_path(self, name: str) -> str:
        digest = hashlib.sha256(self._assets[name]).hexdigest()[:12]
        return f"/dashboard/static/{name}?v={digest}"
