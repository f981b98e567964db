"""Codecs by name."""

from collections.abc import Callable
from typing import cast

from elbowroom.kv.codecs.base import Codec, TokenCodec
from elbowroom.kv.codecs.plain import PlainCodec
from elbowroom.registry import Registry

CODECS: Registry[Callable[..., Codec]] = Registry(
    "KV codec",
    {
        "plain": "elbowroom.kv.codecs.plain:PlainCodec",
        "fp8": "elbowroom.kv.codecs.fp8:Fp8Codec",
        "int8": "elbowroom.kv.codecs.int8:Int8Codec",
        "bfp": "elbowroom.kv.codecs.bfp:BfpCodec",
        "kivi": "elbowroom.kv.codecs.kivi:KiviCodec",
        "planes": "elbowroom.kv.codecs.planes:PlanesCodec",
    },
)


def token_codec(codec: Codec) -> TokenCodec:
    """Return how tokens lie that are written one by one: as ``codec`` says, or plain until it seals them."""
    if codec.seals:
        return PlainCodec()
    return cast("TokenCodec", codec)


__all__ = ["CODECS", "Codec", "TokenCodec", "token_codec"]
