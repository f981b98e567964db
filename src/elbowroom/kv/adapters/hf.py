"""KVPlan.for_hf: a plan as the cache of a transformers model."""

from __future__ import annotations

import importlib
import re
import weakref
from typing import TYPE_CHECKING, Any

from elbowroom.core import DTYPE_BYTES
from elbowroom.errors import PlanError
from elbowroom.kv.adapters.hf_layers import layer_specs
from elbowroom.kv.paged import PagedStore
from elbowroom.memory.arena import Arena
from elbowroom.memory.ledger import Budget, Ledger
from elbowroom.memory.meter import available_bytes
from elbowroom.memory.tiers import HostTier
from elbowroom.units import parse_bytes

if TYPE_CHECKING:
    from elbowroom.kv.adapters.hf_cache import StoreCache
    from elbowroom.kv.plan import KVPlan

MINIMUM = (5, 23)
"""The oldest transformers that is tested."""
_INSTALL = "pip install 'elbowroom[transformers]'"


def open_cache(plan: KVPlan, model: Any, memory: str | int) -> StoreCache:
    """Return an empty cache for ``model``, kept as ``plan`` says, and give the model the attention that reads it.

    Raises:
        PlanError: transformers is missing or too old, the model is one that no plan can keep, or the plan has a policy.
        RequestError: ``memory`` is not an amount.
    """
    require_transformers()
    from elbowroom.kv.adapters.hf_attention import switch_off, switch_on
    from elbowroom.kv.adapters.hf_cache import SharedStore, StoreCache

    limit_bytes = parse_bytes(memory, available_bytes())
    choice = plan.policy or plan.heads or plan.channels
    if choice is not None:
        raise PlanError(
            f"policy {choice.name!r} chooses when a prompt ends, which no call of transformers tells",
            "use a plan of a codec alone, or the plan as it is with elbowroom's own engine",
        )
    check_model(model)
    bound = plan.bind(layer_specs(model.config), str(model.dtype).removeprefix("torch."))
    arena = Arena(HostTier(), Ledger(Budget({HostTier.name: limit_bytes})))
    store = PagedStore(bound, arena, limit_bytes)
    switch_on(model)
    held = weakref.ref(model)

    def give_back() -> None:
        """Restore the model's attention, if the model still lives."""
        if (living := held()) is not None:
            switch_off(living)

    return StoreCache(SharedStore(store, arena, give_back))


def require_transformers() -> None:
    """Refuse to go on without a transformers library that is known to work.

    Raises:
        PlanError: it is missing, broken or too old; the message says what to install.
    """
    needed = ".".join(map(str, MINIMUM))
    try:
        version = str(importlib.import_module("transformers").__version__)
    except ImportError as error:
        raise PlanError(f"KVPlan.for_hf needs transformers {needed} or later: {error}", _INSTALL) from error
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < MINIMUM:
        raise PlanError(f"KVPlan.for_hf needs transformers {needed} or later, found {version}", _INSTALL)


def check_model(model: Any) -> None:
    """Refuse models whose attention would not come here.

    Raises:
        PlanError: says which property of the model it is.
    """
    name = type(model).__name__
    if not getattr(model, "_supports_attention_backend", False):
        raise PlanError(
            f"{name} does not use the attention interface of transformers",
            "generate without past_key_values: this model keeps its own cache",
        )
    devices = {parameter.device.type for parameter in model.parameters()}
    if devices - {"cpu"}:
        raise PlanError(
            f"{name} has weights on {', '.join(sorted(devices))}; keys and values are kept in host memory only",
            "load the model on the CPU (device_map='cpu')",
        )
    dtype = str(model.dtype).removeprefix("torch.")
    if dtype not in DTYPE_BYTES:
        raise PlanError(f"{name} computes in {dtype}", f"load the model as one of {', '.join(DTYPE_BYTES)}")
