"""Builds the HTTP application from its parts."""

from collections.abc import Callable, Iterable
from typing import Any

from fastapi import APIRouter, FastAPI
from starlette.middleware import Middleware

from controller.clock import Clock
from controller.gateway.auth import ApiKeys, KeyStore
from controller.gateway.calls import Gateway
from controller.gateway.failures import add_error_handlers
from controller.gateway.middleware import BodyGate, RequestContext
from controller.gateway.origin import OriginGate
from controller.gateway.routes import chat, completions, embeddings, health, models, tokens
from controller.gateway.text import ModelTexts
from controller.metrics import Metrics
from controller.scaling.generation import FunctionRegistry
from controller.settings import Settings


def create_app(
    registry: FunctionRegistry,
    key_store: KeyStore,
    settings: Settings,
    clock: Clock,
    *,
    metrics: Metrics,
    is_ready: Callable[[], bool] = lambda: True,
    texts: ModelTexts | None = None,
    extra_routers: Iterable[APIRouter] = (),
    lifespan: Callable[[FastAPI], Any] | None = None,
) -> FastAPI:
    """Return the application; calls of the OpenAI API end when their client leaves.

    Args:
        registry: The deployed functions.
        key_store: Asked only if the settings require API keys.
        settings: Limits and switches.
        clock: For durations and dates.
        metrics: Filled here and by whoever scales the functions.
        is_ready: Answers /readyz.
        texts: Tokenizers in use; None for the application's own.
        extra_routers: More endpoints, behind the same keys and limits.
        lifespan: As FastAPI takes it.
    """
    middleware = [
        Middleware(RequestContext, metrics=metrics, clock=clock),
        Middleware(OriginGate, is_local_only=not settings.require_api_keys),
        Middleware(
            BodyGate,
            max_body_bytes=settings.max_body_bytes,
            max_unread_bytes=settings.max_unread_bytes,
            body_timeout_s=settings.body_timeout_s,
        ),
    ]
    if settings.require_api_keys:
        middleware.insert(2, Middleware(ApiKeys, key_store=key_store, clock=clock))
    app = FastAPI(
        title="Coldspark",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        middleware=middleware,
        lifespan=lifespan,
    )
    app.state.gateway = Gateway(
        registry=registry,
        settings=settings,
        clock=clock,
        metrics=metrics,
        texts=texts or ModelTexts(clock),
        is_ready=is_ready,
    )
    add_error_handlers(app)
    openai = (chat, completions, embeddings, models, tokens)
    for router in (*(one.router for one in openai), health.router, *extra_routers):
        app.include_router(router)
    return app
