"""ServedModel: an engine under the name that clients use, and the directory of all of them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

from elbowroom.engine.async_llm import AsyncLLM, OutputStream
from elbowroom.engine.plans import PlanText
from elbowroom.engine.queue import QueueView
from elbowroom.engine.sampling_params import SamplingParams
from elbowroom.errors import Overloaded, UnknownModel
from elbowroom.serve.callers import Caller
from elbowroom.serve.deadlines import Deadlines
from elbowroom.serve.limits import ServerLimits
from elbowroom.serve.responses import ModelCard
from elbowroom.serve.service_rate import ServiceRate
from elbowroom.serve.tenants import Tenant
from elbowroom.units import format_bytes


class QueueFull(Overloaded):
    """One more request would be too many."""

    def __init__(self, message: str, num_waiting: int) -> None:
        super().__init__(message, "retry later")
        self.num_waiting = num_waiting


class ServedModel:
    """One model of a server.

    Args:
        name: what clients write into ``model``.
        llm: its engine.
        limits: of the server.
    """

    def __init__(self, name: str, llm: AsyncLLM, limits: ServerLimits) -> None:
        self.name, self.llm, self.limits = name, llm, limits
        self.created = int(time.time())
        self.num_live = 0
        """Requests that wait or run."""
        self.rate = ServiceRate()

    @property
    def card(self) -> ModelCard:
        """What /v1/models says of it."""
        context = self.llm.engine.parts.config.max_positions
        return ModelCard(
            id=self.name, object="model", created=self.created, owned_by="elbowroom", max_model_len=context
        )

    async def open(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, kv: PlanText, caller: Caller
    ) -> AbstractContextManager[OutputStream]:
        """Queue one request for each prompt and return the stream of their outputs; leaving it aborts them.

        Raises:
            RequestError: a prompt is malformed or can never fit.
            Overloaded: too many wait already, or of this tenant, or so many that this one would wait too long.
            EngineClosed: the engine was shut down.
        """
        self._observe()
        try:
            stream = await self.llm.start(
                prompts,
                sampling,
                kv,
                tenant=caller.tenant.name,
                priority=caller.priority,
                admission=caller.admission,
                deadline_s=caller.deadline_s,
                gate=lambda view: self._check(view, caller.tenant),
                max_unread=self.limits.max_unread,
            )
        except QueueFull as full:
            full.retry_after_s = self.rate.retry_after_s(full.num_waiting)
            raise
        self._observe()
        return self._watched(stream, caller, len(prompts))

    @contextmanager
    def _watched(self, stream: OutputStream, caller: Caller, num_prompts: int) -> Iterator[OutputStream]:
        self.num_live += 1
        try:
            with stream, Deadlines(stream, caller, self.limits.queue_timeout_s, self._retry_after_s):
                yield stream
        finally:
            self.num_live -= 1
            self._observe(num_prompts)

    def _check(self, view: QueueView, tenant: Tenant) -> None:
        """Refuse what would make the queue too long; called on the engine's thread."""
        limits = self.limits
        if view.num_waiting >= limits.max_queue:
            raise QueueFull(self._full(view, f"at most {limits.max_queue} may"), view.num_waiting)
        if limits.max_queue_per_tenant is not None:
            most = max(int(limits.max_queue_per_tenant * tenant.weight), 1)
            if view.num_waiting_of_tenant >= most:
                yours = f"{view.num_waiting_of_tenant} of them are yours, at most {most} may be"
                raise QueueFull(self._full(view, yours), view.num_waiting_of_tenant)
        predicted_s, most_s = self.rate.predicted_s(view.num_waiting), limits.queue_timeout_s
        if most_s is not None and predicted_s is not None and view.num_waiting and predicted_s > most_s:
            soon = f"one more would wait {predicted_s:.0f} s, at most {most_s:g} s are allowed"
            raise QueueFull(self._full(view, soon), view.num_waiting)

    def _full(self, view: QueueView, why: str) -> str:
        used, capacity = format_bytes(view.kv_used_bytes), format_bytes(view.kv_capacity_bytes)
        waiting = f"{view.num_waiting} requests to {self.name!r} wait ({why})"
        return f"{waiting}; {view.num_running} sequences run, and {used} of {capacity} of KV cache are in use"

    def _observe(self, num_ended: int = 0) -> None:
        self.rate.observe(time.monotonic(), self.llm.engine.stats().num_waiting > 0, num_ended)

    def _retry_after_s(self) -> int:
        return self.rate.retry_after_s(self.llm.engine.stats().num_waiting)


class ServedModels:
    """All models of a server by name."""

    def __init__(self, engines: Mapping[str, AsyncLLM], limits: ServerLimits) -> None:
        self._by_name = {name: ServedModel(name, llm, limits) for name, llm in engines.items()}

    def __iter__(self) -> Iterator[ServedModel]:
        """Return all models in the order in which they were given."""
        return iter(self._by_name.values())

    def get(self, name: str | None) -> ServedModel:
        """Return the model ``name``; None means the only one.

        Raises:
            UnknownModel: there is no such model, or none was named and there are several.
        """
        if name is None and len(self._by_name) == 1:
            return next(iter(self))
        if name is None or name not in self._by_name:
            asked = "no model was named" if name is None else f"model {name!r} is not served here"
            raise UnknownModel(asked, f"set model to one of: {', '.join(self._by_name)}")
        return self._by_name[name]
