"""Read policies by name: which strips a decoding token reads; nothing is dropped."""

from collections.abc import Callable

from elbowroom.kv.reads.base import ReadPolicy
from elbowroom.registry import Registry

READS: Registry[Callable[..., ReadPolicy]] = Registry(
    "KV read policy", {"quest": "elbowroom.kv.reads.quest:QuestPolicy"}
)

__all__ = ["READS", "ReadPolicy"]
