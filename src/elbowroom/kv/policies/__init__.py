"""Token policies by name: which tokens of a prompt stay when it is longer than the plan allows."""

from collections.abc import Callable

from elbowroom.kv.policies.base import NO_LIMIT, Cascade, LayerView, TokenPolicy
from elbowroom.registry import Registry

POLICIES: Registry[Callable[..., TokenPolicy]] = Registry(
    "KV policy",
    {
        "streaming": "elbowroom.kv.policies.streaming:StreamingPolicy",
        "snapkv": "elbowroom.kv.policies.snapkv:SnapKVPolicy",
        "spatten": "elbowroom.kv.policies.spatten:SpattenPolicy",
    },
)

__all__ = ["NO_LIMIT", "POLICIES", "Cascade", "LayerView", "TokenPolicy"]
