"""Codecs by name."""

from collections.abc import Callable

from elbowroom.kv.codecs.base import Codec
from elbowroom.registry import Registry

CODECS: Registry[Callable[..., Codec]] = Registry("KV codec", {"plain": "elbowroom.kv.codecs.plain:PlainCodec"})

__all__ = ["CODECS", "Codec"]
