"""Probes and figures of the controller itself."""

from typing import Any

from fastapi import APIRouter, Response
from starlette.responses import JSONResponse

from controller.gateway.calls import GatewayDependency
from controller.metrics import CONTENT_TYPE

router = APIRouter(tags=["health"])


@router.get("/healthz", response_model=dict[str, str])
async def get_health() -> JSONResponse:
    """Answer as long as the process does."""
    return JSONResponse({"status": "ok"})


_NOT_READY: dict[int | str, dict[str, Any]] = {
    503: {"model": dict[str, str], "description": "Starting or stopping."}
}


@router.get("/readyz", response_model=dict[str, str], responses=_NOT_READY)
@router.get("/health", response_model=dict[str, str], responses=_NOT_READY)
@router.get("/ping", response_model=dict[str, str], responses=_NOT_READY)
async def get_readiness(gateway: GatewayDependency) -> JSONResponse:
    """Say whether calls should be sent here; two names are those that vLLM has for it."""
    if gateway.is_ready():
        return JSONResponse({"status": "ready"})
    return JSONResponse({"status": "not ready"}, status_code=503)


@router.get("/metrics", response_class=Response)
async def get_metrics(gateway: GatewayDependency) -> Response:
    """Export all series in Prometheus' text format."""
    return Response(gateway.metrics.render(), headers={"content-type": CONTENT_TYPE})
