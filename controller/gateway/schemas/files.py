"""Bodies of /v1/files."""

from typing import Literal

from pydantic import BaseModel

PURPOSES = ("batch", "user_data")
FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": list(PURPOSES)},
                        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
                        "expires_after[seconds]": {"type": "integer", "minimum": 3600},
                    },
                }
            }
        },
    }
}


class FileObject(BaseModel):
    """A file; `status` is always `processed`, as clients expect it."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"
    status_details: None = None


class FileList(BaseModel):
    """Some of a caller's files, in order."""

    object: Literal["list"] = "list"
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileDeleted(BaseModel):
    """That a file is gone."""

    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True
