"""Read policies by name: how much of what is stored a decoding token reads; nothing is dropped."""

from collections.abc import Callable

from elbowroom.kv.reads.base import ReadPolicy
from elbowroom.registry import Registry

READS: Registry[Callable[..., ReadPolicy]] = Registry(
    "KV read policy",
    {
        "progressive": "elbowroom.kv.reads.progressive:ProgressivePolicy",
        "quest": "elbowroom.kv.reads.quest:QuestPolicy",
    },
)

__all__ = ["READS", "ReadPolicy"]
