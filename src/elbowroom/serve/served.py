"""ServedModel: an engine under the name that clients use, and the directory of all of them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from elbowroom.engine.async_llm import AsyncLLM
from elbowroom.errors import Overloaded, UnknownModel
from elbowroom.serve.limits import ServerLimits
from elbowroom.serve.responses import ModelCard


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

    @property
    def card(self) -> ModelCard:
        """What /v1/models says of it."""
        context = self.llm.engine.parts.config.max_positions
        return ModelCard(
            id=self.name, object="model", created=self.created, owned_by="elbowroom", max_model_len=context
        )

    @contextmanager
    def admit(self) -> Iterator[None]:
        """Count one request as live.

        Raises:
            Overloaded: there are too many already.
        """
        if self.num_live >= self.limits.max_live_requests:
            raise Overloaded(f"{self.num_live} requests to {self.name!r} wait or run already", "retry later")
        self.num_live += 1
        try:
            yield
        finally:
            self.num_live -= 1


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
