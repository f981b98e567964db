"""create_app: the ASGI application over one or more engines."""

from __future__ import annotations

import hmac
from collections.abc import Callable, Mapping

from fastapi import Depends, FastAPI
from starlette.requests import Request

from elbowroom import __version__
from elbowroom.engine.async_llm import AsyncLLM
from elbowroom.serve.chat import chat_router
from elbowroom.serve.completions import completions_router
from elbowroom.serve.context import ServerContext
from elbowroom.serve.errors import Unauthorized, install_error_handlers
from elbowroom.serve.limits import ServerLimits
from elbowroom.serve.metrics import CountRequests, ServerMetrics
from elbowroom.serve.served import ServedModels
from elbowroom.serve.system import models_router, status_router


def create_app(engines: Mapping[str, AsyncLLM], limits: ServerLimits | None = None) -> FastAPI:
    """Return an app that serves each engine under its name.

    Args:
        engines: name that clients use -> engine. They are not closed with the app.
        limits: by default those of ``ServerLimits()``.
    """
    limits = limits or ServerLimits()
    context = ServerContext(ServedModels(engines, limits), limits, ServerMetrics())
    app = FastAPI(title="Elbowroom", version=__version__, redirect_slashes=False)
    protected = [] if limits.api_key is None else [Depends(_check_key(limits.api_key))]
    for router in (completions_router(context), chat_router(context), models_router(context)):
        app.include_router(router, dependencies=protected)
    app.include_router(status_router(context))
    install_error_handlers(app, limits.retry_after_s)
    app.add_middleware(CountRequests, metrics=context.metrics)
    return app


def _check_key(api_key: str) -> Callable[[Request], None]:
    expected = f"Bearer {api_key}".encode()

    def check(request: Request) -> None:
        given = request.headers.get("authorization", "").encode()
        if not hmac.compare_digest(given, expected):
            raise Unauthorized("the API key is missing or wrong", "send Authorization: Bearer <key of --api-key>")

    return check
