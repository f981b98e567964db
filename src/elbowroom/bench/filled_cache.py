"""A long context without reading one: a cached prefix of random keys and values, put into a running engine.

What decoding costs at 32,768 tokens does not depend on what the keys are, and reading such a prompt takes minutes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from elbowroom.bench.patching import replaced
from elbowroom.core import STRIP_TOKENS
from elbowroom.engine.engine import Engine
from elbowroom.engine.prefix import block_keys, root_key
from elbowroom.engine.types import KVOp, StepPlan
from elbowroom.errors import RequestError
from elbowroom.kernels.digest import write_digest
from elbowroom.kv.base import KVHandle, KVStore
from elbowroom.kv.bound import BoundPlan
from elbowroom.kv.codecs.ordered import in_order
from elbowroom.kv.holding import Extent
from elbowroom.kv.span import pack_span

_SPAN_BLOCKS = 16


def fill_prefix(engine: Engine, tokens: Sequence[int], seed: int = 0) -> None:
    """Make ``tokens`` a cached prefix of ``engine``, with keys and values drawn from N(0, 1).

    Raises:
        RequestError: the tokens are no whole blocks, or the engine's layers have sliding windows.
        OutOfBudget: the KV cache cannot hold them.
    """
    plan = engine.parts.plan
    if len(tokens) % STRIP_TOKENS or not tokens:
        raise RequestError(f"{len(tokens)} tokens are no whole blocks", f"give a multiple of {STRIP_TOKENS}")
    if plan.has_windows:
        raise RequestError("only caches without sliding windows can be filled", "use a model without them")
    engine.call(lambda: _adopt(engine, tokens, seed)).result()


def _adopt(engine: Engine, tokens: Sequence[int], seed: int) -> None:
    """Do what ends with a cached prompt, without computing it; runs on the engine's thread, between steps."""
    core, store = engine.parts.core, engine.parts.store
    account = core.scheduler.account
    account.next_slot += 1
    slot = account.next_slot
    opened: list[KVHandle] = []
    with replaced(store, "open", _noting(store.open, opened)):
        core.executor.collect(core.executor.submit(StepPlan((KVOp("open", slot),), ())))
    import_random(store, opened[0], engine.parts.plan, account.pricings[0].namespace, len(tokens), seed)
    keys = block_keys(root_key(account.pricings[0].namespace), tokens, len(tokens) // STRIP_TOKENS)
    account.index.insert(None, keys, slot, account.pricings[0].block_bytes)


def _noting(function: Callable[[int, int], KVHandle], into: list[KVHandle]) -> Callable[[int, int], KVHandle]:
    def call(plan: int, expected_tokens: int) -> KVHandle:
        into.append(function(plan, expected_tokens))
        return into[-1]

    return call


def import_random(
    store: KVStore, handle: KVHandle, plan: BoundPlan, fingerprint: bytes, num_tokens: int, seed: int
) -> None:
    """Append ``num_tokens`` to a stored sequence, in spans; the blocks of a layer all hold the same numbers."""
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for index, (spec, fmt) in enumerate(zip(plan.layers, plan.formats, strict=True)):
        if spec.kv_source is None:
            k, v = (
                torch.empty(fmt.num_kv_heads, STRIP_TOKENS, width).normal_(generator=generator)
                for width in (fmt.head_dim, fmt.v_head_dim)
            )
            strip = torch.zeros(fmt.strip_bytes, dtype=torch.uint8)
            codec = in_order(plan.plan.codec, plan.orders, index)
            codec.store(strip, fmt, torch.arange(STRIP_TOKENS), k, v)
            if fmt.digest_bytes:
                write_digest(strip, fmt, codec.open(strip, fmt)[0], 0, STRIP_TOKENS, STRIP_TOKENS)
            layers.append(strip)
    for start in range(0, num_tokens, _SPAN_BLOCKS * STRIP_TOKENS):
        stop = min(start + _SPAN_BLOCKS * STRIP_TOKENS, num_tokens)
        blocks = (stop - start) // STRIP_TOKENS
        store.import_span(
            handle, pack_span(fingerprint, start, Extent(stop), [strip.repeat(blocks).numpy() for strip in layers])
        )
