"""/v1/batches: create, retrieve, list, cancel."""

from typing import Annotated

from fastapi import APIRouter, Query, Request

from controller.batches.service import BatchService
from controller.gateway.bodies import JsonRoute
from controller.gateway.failures import ERROR_RESPONSES
from controller.gateway.schemas.batches import (
    BatchErrors,
    BatchList,
    BatchObject,
    BatchRequest,
    RequestCounts,
)
from controller.store.batches import StoredBatch

Limit = Annotated[int, Query(ge=1, le=100)]


def batches_router(batches: BatchService) -> APIRouter:
    """Return the endpoints of batches."""
    router = APIRouter(route_class=JsonRoute, tags=["openai"], responses=ERROR_RESPONSES)

    @router.post("/v1/batches")
    async def create_batch(body: BatchRequest, request: Request) -> BatchObject:
        """Accept a batch; its requests run when a replica is up anyway, or in time."""
        batch = await batches.create(
            key_id=request.scope["state"]["key_id"],
            endpoint=body.endpoint,
            input_file_id=body.input_file_id,
            completion_window=body.completion_window,
            window_s=body.window_s,
            metadata=body.metadata,
        )
        return _view(batch)

    @router.get("/v1/batches")
    async def list_batches(
        request: Request, after: str | None = None, limit: Limit = 20
    ) -> BatchList:
        """List the caller's batches, newest first."""
        key_id = request.scope["state"]["key_id"]
        found = await batches.list(key_id=key_id, after=after, limit=limit + 1)
        page = [_view(batch) for batch in found[:limit]]
        return BatchList(
            data=page,
            first_id=page[0].id if page else None,
            last_id=page[-1].id if page else None,
            has_more=len(found) > limit,
        )

    @router.get("/v1/batches/{batch_id}")
    async def get_batch(batch_id: str, request: Request) -> BatchObject:
        """Describe one batch, with its progress."""
        return _view(await batches.get(batch_id, key_id=request.scope["state"]["key_id"]))

    @router.post("/v1/batches/{batch_id}/cancel")
    async def cancel_batch(batch_id: str, request: Request) -> BatchObject:
        """End a batch; answers that are there are kept."""
        return _view(await batches.cancel(batch_id, key_id=request.scope["state"]["key_id"]))

    return router


def _view(batch: StoredBatch) -> BatchObject:
    def at(status: str) -> int | None:
        moment_us = batch.moments.get(status)
        return None if moment_us is None else moment_us // 1_000_000

    return BatchObject(
        id=batch.id,
        endpoint=batch.endpoint,
        model=batch.model,
        errors=BatchErrors(data=[dict(error) for error in batch.errors]) if batch.errors else None,
        input_file_id=batch.input_file_id,
        completion_window=batch.completion_window,
        status=batch.status,
        output_file_id=batch.output_file_id,
        error_file_id=batch.error_file_id,
        created_at=batch.created_us // 1_000_000,
        in_progress_at=at("in_progress"),
        expires_at=batch.expires_us // 1_000_000,
        finalizing_at=at("finalizing"),
        completed_at=at("completed"),
        failed_at=at("failed"),
        expired_at=at("expired"),
        cancelling_at=at("cancelling"),
        cancelled_at=at("cancelled"),
        request_counts=RequestCounts(
            total=batch.num_total, completed=batch.num_completed, failed=batch.num_failed
        ),
        metadata=None if batch.metadata_ is None else dict(batch.metadata_),
    )
