"""create_app: the ASGI application over one or more engines."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fastapi import Depends, FastAPI
from fastapi.security import HTTPBearer
from starlette.requests import Request

from elbowroom import __version__
from elbowroom.engine.async_llm import AsyncLLM
from elbowroom.serve.chat import chat_router
from elbowroom.serve.completions import completions_router
from elbowroom.serve.context import ServerContext
from elbowroom.serve.errors import ERROR_RESPONSES, install_error_handlers
from elbowroom.serve.limits import ServerLimits
from elbowroom.serve.metrics import CountRequests, ServerMetrics
from elbowroom.serve.open_requests import HoldRequests, OpenRequests
from elbowroom.serve.served import ServedModels
from elbowroom.serve.system import debug_router, models_router, status_router
from elbowroom.serve.tenants import Tenants


def create_app(engines: Mapping[str, AsyncLLM], limits: ServerLimits | None = None) -> FastAPI:
    """Return an app that serves each engine under its name.

    Args:
        engines: name that clients use -> engine. They are not closed with the app.
        limits: by default those of ``ServerLimits()``.

    ``app.state.requests`` is its OpenRequests.

    Raises:
        RequestError: keys or tenants are malformed.
    """
    limits = limits or ServerLimits()
    context = ServerContext(
        ServedModels(engines, limits), limits, ServerMetrics(), OpenRequests(limits.max_open_requests)
    )
    app = FastAPI(title="Elbowroom", version=__version__, redirect_slashes=False)
    tenants = Tenants(limits.api_key, limits.api_key_file, limits.tenant_header)
    protected = [Depends(_names_tenant(tenants))]
    if tenants.has_keys:
        protected.append(Depends(HTTPBearer(auto_error=False)))  # described only; the check above decides
    for router in (completions_router(context), chat_router(context), models_router(context)):
        app.include_router(router, dependencies=protected, responses=ERROR_RESPONSES)
    app.include_router(status_router(context))
    if limits.debug_routes:
        app.include_router(debug_router(context), dependencies=protected, responses=ERROR_RESPONSES)
    install_error_handlers(app)
    app.state.requests = context.requests
    app.add_middleware(HoldRequests, requests=context.requests)
    app.add_middleware(CountRequests, metrics=context.metrics)
    return app


def _names_tenant(tenants: Tenants) -> Callable[[Request], None]:
    def check(request: Request) -> None:
        request.state.tenant = tenants.of(request)

    return check
