"""GET /v1/models and /v1/models/{id}."""

from dataclasses import asdict
from pathlib import Path

from fastapi import APIRouter

from controller.gateway.calls import GatewayDependency
from controller.gateway.failures import ERROR_RESPONSES
from controller.gateway.schemas.models import Model, ModelLimits, ModelList, SamplingFigures
from controller.scaling.generation import ServedFunction
from functions.spec import FunctionSpec, SourceKind

router = APIRouter(tags=["openai"], responses=ERROR_RESPONSES)


@router.get("/v1/models")
async def list_models(gateway: GatewayDependency) -> ModelList:
    """List every served name."""
    functions = gateway.registry.served()
    return ModelList(
        data=[_model(function, name) for function in functions for name in function.served_names]
    )


@router.get("/v1/models/{name:path}")
async def get_model(name: str, gateway: GatewayDependency) -> Model:
    """Describe one served name."""
    function = gateway.registry.resolve(name)
    model = _model(function, name)
    if function.pooling is None:
        text = await gateway.texts.get(function.snapshot_path)
        defaults = text.defaults_of(function.spec)
        model.sampling_defaults = SamplingFigures(**asdict(defaults))
    return model


def _model(function: ServedFunction, name: str) -> Model:
    spec = function.spec
    return Model(
        id=name,
        created=function.created,
        root=_root(spec),
        max_model_len=function.max_model_len,
        function=function.name,
        tier=function.tier,
        task="generate" if function.pooling is None else "embed",
        embedding_size=None if function.pooling is None else function.pooling.size,
        limits=ModelLimits(
            max_concurrency=spec.scaling.max_concurrency,
            max_replicas=spec.scaling.max_replicas,
            max_queued_requests=spec.queue.max_requests,
        ),
    )


def _root(spec: FunctionSpec) -> str:
    """Return where a model comes from, without telling directories of this machine."""
    model = spec.model
    return model.location if model.kind is SourceKind.HUB else Path(model.location).name
