"""Token policies by name: which tokens of a prompt stay when it is longer than the plan allows."""

from collections.abc import Callable

from elbowroom.kv.policies.base import (
    NO_LIMIT,
    Cascade,
    ChannelPolicy,
    HeadPolicy,
    LayerView,
    Merged,
    MergePolicy,
    TokenPolicy,
)
from elbowroom.registry import Registry

POLICIES: Registry[Callable[..., TokenPolicy]] = Registry(
    "KV policy",
    {
        "streaming": "elbowroom.kv.policies.streaming:StreamingPolicy",
        "compresskv": "elbowroom.kv.policies.compresskv:CompressKVPolicy",
        "snapkv": "elbowroom.kv.policies.snapkv:SnapKVPolicy",
        "kvmerger": "elbowroom.kv.policies.kvmerger:KVMergerPolicy",
        "spatten": "elbowroom.kv.policies.spatten:SpattenPolicy",
    },
)

HEADS: Registry[Callable[..., HeadPolicy]] = Registry(
    "KV head policy", {"heads": "elbowroom.kv.policies.heads:HeadsPolicy"}
)

CHANNELS: Registry[Callable[..., ChannelPolicy]] = Registry(
    "KV channel policy", {"think": "elbowroom.kv.policies.think:ThinKPolicy"}
)

__all__ = [
    "CHANNELS",
    "HEADS",
    "NO_LIMIT",
    "POLICIES",
    "Cascade",
    "ChannelPolicy",
    "HeadPolicy",
    "LayerView",
    "MergePolicy",
    "Merged",
    "TokenPolicy",
]
