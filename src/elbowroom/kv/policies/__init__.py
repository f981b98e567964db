"""Token policies by name: which tokens of a prompt stay when it is longer than the plan allows."""

from collections.abc import Callable

from elbowroom.kv.policies.base import LayerView, TokenPolicy
from elbowroom.registry import Registry

POLICIES: Registry[Callable[..., TokenPolicy]] = Registry(
    "KV policy",
    {
        "streaming": "elbowroom.kv.policies.streaming:StreamingPolicy",
        "compresskv": "elbowroom.kv.policies.compresskv:CompressKVPolicy",
        "snapkv": "elbowroom.kv.policies.snapkv:SnapKVPolicy",
    },
)

__all__ = ["POLICIES", "LayerView", "TokenPolicy"]
