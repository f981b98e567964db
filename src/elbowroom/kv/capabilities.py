"""Capabilities: which parts of a plan and which layers go together; refusals name the way out."""

from __future__ import annotations

import math
from collections.abc import Sequence

from elbowroom.core import LayerSpec
from elbowroom.errors import ConfigError, PlanError
from elbowroom.kv.bound import BoundPlan, owns_kv
from elbowroom.kv.policies import NO_LIMIT, ChannelPolicy, HeadPolicy, TokenPolicy


def check_choice(policy: TokenPolicy | HeadPolicy | ChannelPolicy, layers: Sequence[LayerSpec]) -> None:
    """A policy needs a layer that reads everything; what a window reads must not have been chosen from."""
    if all(layer.window is not None for layer in layers):
        raise PlanError(
            f"KV policy {policy.name!r} has nothing to choose: every layer reads a sliding window only",
            "leave the policy out: windows drop their tokens by themselves",
        )
    for index, layer in enumerate(layers):
        if layer.window is not None and layer.kv_source is not None and layers[layer.kv_source].window is None:
            raise PlanError(
                f"KV policy {policy.name!r} would drop keys of layer {layer.kv_source} that the window of layer "
                f"{index} reads",
                "use a plan of a codec alone",
            )


def check_sealing(plan: BoundPlan) -> None:
    """Blocks of earlier prompts that are sealed go or stay whole, and all that is sealed has waited for its prompt."""
    policy, limits = plan.policy, plan.limits(ends_prompt=True)
    if policy is not None and (policy.cascades or max(limits[plan.chosen_layers]) >= NO_LIMIT):
        part, seals = plan.plan.heads or plan.plan.channels, f"codec {plan.plan.codec.name!r}"
        fix = "use a codec that writes tokens one by one: bfp, int8, fp8 or plain"
        if part is not None:
            seals, fix = f"part {part.name!r}", f"leave {part.name} out of the plan"
        raise PlanError(
            f"KV policy {policy.name!r} chooses single tokens of layers that depend on each other, or keeps layers "
            f"whole; {seals} seals whole blocks of each",
            f"{fix}; or the policy snapkv",
        )


def check_reads(plan: BoundPlan) -> None:
    """A read policy needs layers that it chooses in."""
    reads = plan.plan.reads
    if reads is not None and not any(map(plan.selects, range(len(plan.layers)))):
        raise PlanError(
            f"KV read policy {reads.name!r} has nothing to choose from: each of {len(plan.layers)} layers reads a "
            "sliding window, or is one of the first that read everything",
            "lower skip, or leave the read policy out",
        )


def check_source(layers: Sequence[LayerSpec], index: int) -> None:
    """A layer that shares KV must read an earlier owner of the same shape, whose window keeps all that it reads."""
    layer, number = layers[index], layers[index].kv_source
    if number is None:
        return
    source = layers[number] if 0 <= number < index else None
    if source is None or not owns_kv(source):
        raise ConfigError(f"layer {index} reads the keys of layer {number}, which is no earlier layer with its own")
    shapes = [(each.num_kv_heads, each.head_dim, each.v_head_dim) for each in (layer, source)]
    windows = [math.inf if each.window is None else each.window for each in (layer, source)]
    if shapes[0] != shapes[1] or windows[0] > windows[1]:
        raise ConfigError(
            f"layer {index} (KV heads, head_dim, v_head_dim, window) {(*shapes[0], layer.window)} cannot read the keys "
            f"of layer {number} {(*shapes[1], source.window)}"
        )


def check_contiguous(plan: BoundPlan) -> None:
    """The contiguous store keeps tokens as they are computed, one behind the other, and all of them."""
    if plan.plan.codec.name != "plain" or plan.chooses or plan.plan.reads is not None:
        raise PlanError(
            f"KV plan {plan.plan.text!r} cannot be kept in the contiguous store, which holds all tokens, plain",
            "use kv=plain, plain(bf16) or plain(fp16) with it, or the paged store (--kv-store paged)",
        )
