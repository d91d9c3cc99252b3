"""/v1/files: upload, list, retrieve, content, delete."""

from typing import Annotated, Literal, Protocol

from fastapi import APIRouter, Query, Request, Response
from starlette.responses import FileResponse
from starlette.types import Receive, Scope, Send

from controller.batches.files import FileStore
from controller.clock import Clock, unix_us
from controller.errors import InvalidRequest
from controller.gateway.failures import ERROR_RESPONSES
from controller.gateway.schemas.files import FORM, PURPOSES, FileDeleted, FileList, FileObject
from controller.gateway.uploads import ClientDisconnect, Form, read_form
from controller.settings import Settings
from controller.store.files import StoredFile

MIN_EXPIRY_S, MAX_EXPIRY_S = 3600, 30 * 86_400
MAX_FILENAME_CHARS = 255
Limit = Annotated[int, Query(ge=1, le=10_000)]
Order = Literal["asc", "desc"]


class FileUsers(Protocol):
    """Who may still need a file."""

    def check_unused(self, file_id: str) -> None:
        """Raise Conflict if something reads it."""


def files_router(files: FileStore, users: FileUsers, settings: Settings, clock: Clock) -> APIRouter:
    """Return the endpoints of files."""
    router = APIRouter(tags=["openai"], responses=ERROR_RESPONSES)

    @router.post("/v1/files", openapi_extra=FORM, response_model=FileObject)
    async def upload_file(request: Request) -> Response:
        """Store a file, streamed to the disk."""
        state = request.scope["state"]
        async with files.receive() as (file_id, upload):
            try:
                form = await read_form(request, upload, timeout_s=settings.body_timeout_s)
            except ClientDisconnect:
                return _Nothing()
            created_us = unix_us(clock.now())
            stored = StoredFile(
                id=file_id,
                key_id=state["key_id"],
                filename=_filename(form),
                purpose=_purpose(form),
                num_bytes=upload.num_bytes,
                created_us=created_us,
                expires_us=_expires_us(form, created_us),
            )
            await upload.finish()
            await files.keep(stored)
        return Response(_view(stored).model_dump_json(), media_type="application/json")

    @router.get("/v1/files")
    async def list_files(
        request: Request,
        purpose: str | None = None,
        after: str | None = None,
        limit: Limit = 10_000,
        order: Order = "desc",
    ) -> FileList:
        """List the caller's files by the time they were made."""
        found = await files.list(
            key_id=request.scope["state"]["key_id"],
            purpose=purpose,
            after=after,
            limit=limit + 1,
            is_ascending=order == "asc",
        )
        page = [_view(file) for file in found[:limit]]
        return FileList(
            data=page,
            first_id=page[0].id if page else None,
            last_id=page[-1].id if page else None,
            has_more=len(found) > limit,
        )

    @router.get("/v1/files/{file_id}")
    async def get_file(file_id: str, request: Request) -> FileObject:
        """Describe one file."""
        return _view(await files.get(file_id, key_id=request.scope["state"]["key_id"]))

    @router.get("/v1/files/{file_id}/content", response_class=FileResponse)
    async def get_file_content(file_id: str, request: Request) -> FileResponse:
        """Send what is in a file, in pieces."""
        file = await files.get(file_id, key_id=request.scope["state"]["key_id"])
        await files.check_content(file)
        # Never shown by a browser as what it claims to be: anybody may have uploaded it.
        return FileResponse(
            files.path(file.id),
            media_type="application/octet-stream",
            filename=file.filename,
            headers={"x-content-type-options": "nosniff"},
        )

    @router.delete("/v1/files/{file_id}")
    async def delete_file(file_id: str, request: Request) -> FileDeleted:
        """Delete a file that nothing reads any more."""
        file = await files.get(file_id, key_id=request.scope["state"]["key_id"])
        users.check_unused(file.id)
        await files.delete(file.id)
        return FileDeleted(id=file.id)

    return router


class _Nothing(Response):
    """An answer to nobody: the client has left."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send nothing."""


def _view(file: StoredFile) -> FileObject:
    return FileObject(
        id=file.id,
        bytes=file.num_bytes,
        created_at=file.created_us // 1_000_000,
        expires_at=None if file.expires_us is None else file.expires_us // 1_000_000,
        filename=file.filename,
        purpose=file.purpose,
    )


def _filename(form: Form) -> str:
    name = (form.filename or "").replace("\\", "/").rpartition("/")[2]
    printable = "".join(char for char in name if char.isprintable())
    return printable[:MAX_FILENAME_CHARS] or "file"


def _purpose(form: Form) -> str:
    purpose = form.fields.get("purpose")
    if purpose not in PURPOSES:
        raise InvalidRequest(
            f"purpose: must be one of {', '.join(PURPOSES)}, got {str(purpose)[:64]!r}",
            param="purpose",
        )
    return purpose


def _expires_us(form: Form, created_us: int) -> int | None:
    known = {"purpose", "expires_after[anchor]", "expires_after[seconds]"}
    for name in form.fields:
        if name not in known:
            raise InvalidRequest(f"{name[:64]}: unknown field; remove it", param=name[:64])
    anchor = form.fields.get("expires_after[anchor]")
    seconds = form.fields.get("expires_after[seconds]")
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at":
        raise InvalidRequest("expires_after.anchor: must be 'created_at'", param="expires_after")
    if not (seconds or "").isdecimal() or not MIN_EXPIRY_S <= int(seconds or 0) <= MAX_EXPIRY_S:
        raise InvalidRequest(
            f"expires_after.seconds: must be {MIN_EXPIRY_S} to {MAX_EXPIRY_S}",
            param="expires_after",
        )
    return created_us + int(seconds or 0) * 1_000_000
