"""The admin API under /api/v1: deploy, inspect and steer functions, and read the books."""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from datetime import datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

from fastapi import APIRouter, Query, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from controller.clock import Clock
from controller.errors import InvalidRequest, InvalidSpec
from controller.gateway.bodies import JsonRoute
from controller.gateway.failures import ERROR_RESPONSES
from functions.loader import SpecError, load_object
from functions.spec import is_local_source
from functions.units import parse_duration

MAX_LOG_LINES = 10_000
MAX_COLD_STARTS = 1_000
MAX_KEY_LIFE_S = 100 * 365 * 86_400
Name = str
Json = dict[str, Any]


class Group(StrEnum):
    """What a row of a cost report stands for."""

    FUNCTION = "function"
    DAY = "day"
    DEVICE = "device"


TEXT_RESPONSE: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/plain": {"schema": {"type": "string"}}}}
}


LEFT_RESPONSE: dict[int | str, dict[str, Any]] = {
    202: {
        "description": "Accepted; what is left is removed as soon as its backend answers.",
        "content": {"application/json": {"schema": {"type": "object"}}},
    }
}


class Plane(Protocol):
    """The operations on functions; see controller.scaling.plane."""

    async def deploy(self, spec: Any, backend: str) -> bool:
        """Accept a spec; says whether the function is new."""

    async def delete(self, name: str) -> Json | None:
        """Forget a function; returns what is left of it if not all can be removed now."""

    async def warm(self, name: str) -> None:
        """Bring a replica up."""

    async def park(self, name: str) -> None:
        """Park the idle replicas."""

    async def stop_function(self, name: str) -> Json | None:
        """Remove the replicas; returns the function if not all can be removed now."""

    async def profile(self, name: str) -> Json:
        """Keep what a replica has learned, and return it."""

    def logs(self, name: str, *, tail: int, follow: bool) -> AsyncIterator[str]:
        """Return log lines of the function's replicas, or raise why there are none."""

    def view(self, name: str) -> Json:
        """Return one function."""

    def views(self) -> list[Json]:
        """Return all functions."""

    async def status(self) -> Json:
        """Return the node."""


class History(Protocol):
    """What the store remembers."""

    async def cold_starts(self, *, function: str | None, limit: int) -> list[Json]:
        """Return the latest cold starts, newest first."""

    async def cost(self, *, since: datetime, until: datetime, by: str) -> Json:
        """Return a cost report."""


class Keys(Protocol):
    """Where API keys are kept."""

    async def create_key(self, name: str, *, expires_in_s: float | None) -> Json:
        """Make a key; its secret is in the answer and nowhere else."""

    async def keys(self) -> list[Json]:
        """Return all keys without their secrets."""

    async def revoke_key(self, key_id: str) -> None:
        """Make a key useless, or raise NotFound."""


class DeployBody(BaseModel):
    """A function to deploy."""

    model_config = ConfigDict(extra="forbid")

    spec: Json = Field(description="The function spec, as in its YAML file.")
    backend: str = Field(default="process", description="Name of the backend that runs it.")


class KeyBody(BaseModel):
    """A key to create."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(min_length=1, max_length=100)
    expires_in_s: float | None = Field(default=None, gt=0, le=MAX_KEY_LIFE_S, allow_inf_nan=False)


def admin_router(plane: Plane, history: History, keys: Keys, clock: Clock) -> APIRouter:
    """Return the endpoints under /api/v1."""
    router = APIRouter(
        prefix="/api/v1", route_class=JsonRoute, tags=["admin"], responses=ERROR_RESPONSES
    )
    _add_functions(router, plane)
    _add_books(router, plane, history, clock)
    _add_keys(router, keys)
    return router


def _add_functions(router: APIRouter, plane: Plane) -> None:
    @router.get("/functions")
    async def list_functions() -> Json:
        """List all functions."""
        return {"functions": plane.views()}

    @router.get("/functions/{name}")
    async def get_function(name: Name) -> Json:
        """Describe one function."""
        return plane.view(name)

    @router.put("/functions/{name}")
    async def deploy(name: Name, body: DeployBody) -> Response:
        """Deploy a function, or change nothing if this revision is deployed already."""
        try:
            spec = load_object(body.spec)
        except SpecError as error:
            raise InvalidSpec(str(error), param="spec") from error
        if spec.name != name:
            raise InvalidSpec(
                f"the path names {name!r} and the spec {spec.name!r}; use one name", param="name"
            )
        _check_source(spec.model.source)
        is_new = await plane.deploy(spec, body.backend)
        return JSONResponse(plane.view(name), status_code=201 if is_new else 200)

    @router.delete("/functions/{name}", status_code=204, responses=LEFT_RESPONSE)
    async def delete(name: Name) -> Response:
        """Remove a function; running requests get the drain timeout."""
        left = await plane.delete(name)
        return Response(status_code=204) if left is None else JSONResponse(left, status_code=202)

    @router.post("/functions/{name}/profile")
    async def profile(name: Name) -> Json:
        """Record what a replica has learned beside its snapshot, for later starts."""
        return await plane.profile(name)

    @router.post("/functions/{name}/{operation}", responses=LEFT_RESPONSE)
    async def operate(
        name: Name, operation: Literal["warm", "park", "stop"], response: Response
    ) -> Json:
        """Warm, park or stop a function and return it when that is done."""
        operations: dict[str, Callable[[str], Awaitable[Json | None]]] = {
            "warm": plane.warm,
            "park": plane.park,
            "stop": plane.stop_function,
        }
        left = await operations[operation](name)
        if left is None:
            return plane.view(name)
        response.status_code = 202
        return left

    @router.get("/functions/{name}/logs", responses=TEXT_RESPONSE)
    async def logs(
        name: Name,
        tail: Annotated[int, Query(ge=0, le=MAX_LOG_LINES)] = 100,
        follow: bool = False,
    ) -> StreamingResponse:
        """Stream the log lines of a function's replicas as text."""
        lines = plane.logs(name, tail=tail, follow=follow)
        return StreamingResponse(_with_line_ends(lines), media_type="text/plain; charset=utf-8")


def _add_books(router: APIRouter, plane: Plane, history: History, clock: Clock) -> None:
    @router.get("/status")
    async def status() -> Json:
        """Describe the node: version, devices, counts."""
        return await plane.status()

    @router.get("/cold-starts")
    async def cold_starts(
        function: str | None = None,
        limit: Annotated[int, Query(ge=1, le=MAX_COLD_STARTS)] = 50,
    ) -> Json:
        """List the latest cold starts with their phases, newest first."""
        return {"cold_starts": await history.cold_starts(function=function, limit=limit)}

    @router.get("/cost")
    async def cost(since: str = "24h", by: Group = Group.FUNCTION) -> Json:
        """Report device seconds and money, idle beside active."""
        until = clock.now()
        return await history.cost(since=_moment(since, until), until=until, by=by.value)


def _add_keys(router: APIRouter, keys: Keys) -> None:
    @router.post("/keys", status_code=201)
    async def create_key(body: KeyBody) -> Json:
        """Create an API key; its secret is shown once."""
        return await keys.create_key(body.name, expires_in_s=body.expires_in_s)

    @router.get("/keys")
    async def list_keys() -> Mapping[str, list[Json]]:
        """List API keys without their secrets."""
        return {"keys": await keys.keys()}

    @router.delete("/keys/{key_id}", status_code=204)
    async def revoke_key(key_id: str) -> None:
        """Revoke an API key at once."""
        await keys.revoke_key(key_id)


def _check_source(source: str) -> None:
    """Refuse a path that means one thing to the client and another to the controller."""
    if is_local_source(source) and not Path(source).is_absolute():
        raise InvalidSpec(
            f"model.source is {source!r}, a path from some directory; send an absolute one, "
            "as `coldspark deploy` does",
            param="spec.model.source",
        )


def _moment(text: str, now: datetime) -> datetime:
    """Read a duration back from now, or an ISO time with its zone."""
    try:
        return now - timedelta(seconds=parse_duration(text))
    except (ValueError, OverflowError):
        pass
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        moment = None
    if moment is None or moment.tzinfo is None:
        raise InvalidRequest(
            f"since is {text!r}; give a duration such as 24h or an ISO time with its zone",
            param="since",
        )
    return moment


async def _with_line_ends(lines: AsyncIterator[str]) -> AsyncIterator[str]:
    async for line in lines:
        yield line + "\n"
