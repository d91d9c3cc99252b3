"""Bodies of /v1/models."""

from typing import Literal

from pydantic import BaseModel


class Model(BaseModel):
    """A name that can be asked for."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["coldspark"] = "coldspark"
    max_model_len: int
    function: str
    tier: str


class ModelList(BaseModel):
    """Every name that can be asked for."""

    object: Literal["list"] = "list"
    data: list[Model]
