"""Bodies of /v1/models."""

from typing import Literal

from pydantic import BaseModel


class ModelLimits(BaseModel):
    """What a function does for its callers at once."""

    max_concurrency: int
    max_replicas: int
    max_queued_requests: int


class SamplingFigures(BaseModel):
    """What sampling fields that a request leaves out are set to."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float


class Model(BaseModel):
    """A name that can be asked for.

    `root` is the hub id, or the last part of the path, that the model comes from;
    `sampling_defaults` is told of a single model that generates.
    """

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["coldspark"] = "coldspark"
    root: str
    parent: None = None
    permission: list[dict[str, str]] = []
    max_model_len: int
    function: str
    tier: str
    task: Literal["generate", "embed"]
    embedding_size: int | None = None
    limits: ModelLimits
    sampling_defaults: SamplingFigures | None = None


class ModelList(BaseModel):
    """Every name that can be asked for."""

    object: Literal["list"] = "list"
    data: list[Model]
