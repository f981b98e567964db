"""Routes about the server: /v1/models, /health, /ready, /metrics, /version, and /debug/reset where asked for."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from fastapi import APIRouter, Path
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import PlainTextResponse, Response

from elbowroom import __version__
from elbowroom.engine.engine import Engine
from elbowroom.serve.context import ServerContext
from elbowroom.serve.engine_metrics import render, snapshot
from elbowroom.serve.openapi import answer_schema
from elbowroom.serve.responses import ModelCard, ModelList, Schema
from elbowroom.serve.served import ServedModel

_NOT_WELL: dict[int | str, dict[str, Any]] = {503: {"description": "The same, where it is not so"}}


def models_router(context: ServerContext) -> APIRouter:
    """Return the routes that list models."""
    router = APIRouter(tags=["models"])
    served = Path(examples=[model.name for model in context.models])

    @router.get("/v1/models", responses=answer_schema(ModelList))
    async def list_models() -> Response:
        """List the served models."""
        return _json(ModelList(object="list", data=[model.card for model in context.models]))

    @router.get("/v1/models/{name:path}", responses=answer_schema(ModelCard))
    async def get_model(name: str = served) -> Response:
        """Describe one model."""
        return _json(context.models.get(name).card)

    return router


def status_router(context: ServerContext) -> APIRouter:
    """Return the routes that tell how the server is; they need no API key."""
    router = APIRouter(tags=["status"])

    @router.get("/health", responses=_NOT_WELL)
    async def health() -> Response:
        """Say whether every engine runs (200, also while the server drains) or one has died (503)."""
        engines = {model.name: _health(model) for model in context.models}
        is_well = all(model.llm.is_alive for model in context.models)
        body = {"status": _status(context, is_well), "models": engines}
        return Response(json.dumps(body), 200 if is_well else 503, media_type="application/json")

    @router.get("/ready", responses=_NOT_WELL)
    async def ready() -> Response:
        """Say whether new requests are taken (200), or the server drains or an engine has died (503)."""
        status = _status(context, all(model.llm.is_alive for model in context.models))
        body = {"status": status, "num_open": context.requests.num_open}
        return Response(json.dumps(body), 200 if status == "ok" else 503, media_type="application/json")

    @router.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Return metrics as Prometheus text."""
        snapshots = await asyncio.gather(*(snapshot(model) for model in context.models))
        return Response(render(context.metrics.registry, snapshots), headers={"Content-Type": CONTENT_TYPE_LATEST})

    @router.get("/version")
    async def version() -> Response:
        """Return the version of Elbowroom."""
        return Response(json.dumps({"version": __version__}), media_type="application/json")

    return router


def debug_router(context: ServerContext) -> APIRouter:
    """Return the routes that are there only when asked for."""
    router = APIRouter(tags=["debug"])

    @router.post("/debug/reset")
    async def reset() -> Response:
        """Empty every prefix cache, check that all books agree and tell what is held then."""
        held = {model.name: await asyncio.to_thread(_reset, model.llm.engine) for model in context.models}
        return Response(json.dumps(held), media_type="application/json")

    return router


def _reset(engine: Engine) -> dict[str, Any]:
    engine.clear_cache()
    engine.check_integrity()
    report = engine.kv_report()
    held = {name: getattr(report, name) for name in ("live_bytes", "num_strips", "num_sequences", "num_tokens")}
    return {"kv": held, "ledger": engine.ledger()}


def _status(context: ServerContext, is_well: bool) -> str:
    if not is_well:
        return "failed"
    return "draining" if context.requests.is_draining else "ok"


def _health(model: ServedModel) -> dict[str, Any]:
    parts = model.llm.engine.parts
    stats = model.llm.engine.stats()
    return {
        "status": "ok" if model.llm.is_alive else "dead",
        "budget_bytes": parts.memory.budget_bytes,
        "used_bytes": parts.ledger.total("host"),
        "kv_used_bytes": stats.kv_used_bytes,
        "kv_capacity_bytes": stats.kv_capacity_bytes,
        "num_running": stats.num_running,
        "num_waiting": stats.num_waiting,
    }


def _json(schema: Schema) -> Response:
    return Response(schema.json_bytes(), media_type="application/json")
