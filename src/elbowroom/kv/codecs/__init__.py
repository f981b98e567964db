"""Codecs by name."""

from collections.abc import Callable

from elbowroom.kv.codecs.base import Codec
from elbowroom.registry import Registry

CODECS: Registry[Callable[..., Codec]] = Registry(
    "KV codec",
    {
        "plain": "elbowroom.kv.codecs.plain:PlainCodec",
        "fp8": "elbowroom.kv.codecs.fp8:Fp8Codec",
        "int8": "elbowroom.kv.codecs.int8:Int8Codec",
        "bfp": "elbowroom.kv.codecs.bfp:BfpCodec",
    },
)

__all__ = ["CODECS", "Codec"]
