"""A lazy registry: names of implementations to import paths, imported when first asked for."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Generic, TypeVar

from elbowroom.errors import PlanError

T = TypeVar("T")


class Registry(Generic[T]):
    """Maps short names to ``module:attribute`` paths of one kind of thing.

    Args:
        kind: what is registered, for error messages ("codec", "tier").
        paths: name -> ``package.module:attribute``.
    """

    def __init__(self, kind: str, paths: dict[str, str]) -> None:
        self.kind = kind
        self._paths = dict(paths)

    def names(self) -> Iterable[str]:
        """Return all names, sorted."""
        return sorted(self._paths)

    def add(self, name: str, path: str) -> None:
        """Register ``name``; a name can be taken once."""
        if name in self._paths:
            raise PlanError(f"{self.kind} {name!r} is registered twice")
        self._paths[name] = path

    def get(self, name: str) -> T:
        """Return the implementation called ``name``.

        Raises:
            PlanError: no such name; the message lists the ones there are.
        """
        path = self._paths.get(name)
        if path is None:
            raise PlanError(f"unknown {self.kind} {name!r}", f"choose one of: {', '.join(self.names())}")
        module, _, attribute = path.partition(":")
        implementation: T = getattr(importlib.import_module(module), attribute)
        return implementation
