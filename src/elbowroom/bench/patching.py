"""Methods of real objects, replaced for a while: how benchmarks look into an engine that knows nothing of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def replaced(owner: object, name: str, replacement: object) -> Iterator[None]:
    """Let ``owner.name`` (of an instance, a class or a module) be ``replacement`` inside the block.

    Raises:
        AttributeError: there is nothing of that name to replace.
    """
    getattr(owner, name)  # a benchmark of what is no longer called must fail, not measure nothing
    own = vars(owner)
    had, before = name in own, own.get(name)
    setattr(owner, name, replacement)
    try:
        yield
    finally:
        if had:
            setattr(owner, name, before)
        else:
            delattr(owner, name)
