"""build_engine: from a model directory and a memory amount to a running Engine."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from elbowroom.engine.accounting import KVPricing
from elbowroom.engine.baseline import measure_baseline
from elbowroom.engine.core import EngineCore
from elbowroom.engine.engine import Engine, EngineParts
from elbowroom.engine.executors.local import TorchExecutor
from elbowroom.engine.scheduler import Scheduler, SchedulerConfig
from elbowroom.engine.sizing import ALIGN, plan_memory
from elbowroom.kv.paged import PagedStore
from elbowroom.kv.plan import KVPlan
from elbowroom.memory.arena import Arena, Range
from elbowroom.memory.ledger import Budget, Ledger
from elbowroom.memory.malloc import trim_malloc
from elbowroom.memory.meter import available_bytes
from elbowroom.memory.tiers import HostTier
from elbowroom.memory.workspace import Workspace
from elbowroom.models.decoder import Decoder
from elbowroom.models.directory import find_model
from elbowroom.models.hf_config import check_dtype, choose_dtype, read_config
from elbowroom.models.loader import read_weights
from elbowroom.models.path import ComputePath
from elbowroom.models.tokenizer import Tokenizer
from elbowroom.units import parse_bytes
from elbowroom.weights.resident import ResidentWeights

Progress = Callable[[int, int], None]


def build_engine(
    model: str | None = None,
    memory: str | int = "80%",
    kv: str | KVPlan | None = None,
    dtype: str = "auto",
    *,
    max_sequences: int = 64,
    prefix_cache: bool = True,
    seed: int = 0,
    progress: Progress | None = None,
) -> Engine:
    """Load a model inside ``memory`` and start its engine.

    Args:
        model: a Hugging Face model directory; None means the built-in model.
        memory: bound on what this process holds over its baseline: bytes, ``512MiB``, ``6GiB``, or ``80%`` of what is
            available now.
        kv: how keys and values are kept, e.g. ``plain`` or ``plain(bf16)``.
        dtype: ``float32``, ``bfloat16`` or ``float16``, for weights and KV cache; ``auto``: what the checkpoint says.
        max_sequences: most sequences that run at once.
        prefix_cache: keep finished prefixes for requests that share them.
        seed: seeds requests that bring none.
        progress: called with bytes loaded and bytes in all.

    Raises:
        BudgetTooSmall: the budget cannot hold the model and one short sequence.
        ModelError: the directory cannot be used.
        RequestError: an argument is malformed.
    """
    check_dtype(dtype)
    meter = measure_baseline()
    budget_bytes = parse_bytes(memory, available_bytes())
    directory = find_model(model)
    config, dtype = read_config(directory), choose_dtype(dtype, directory)
    kind: torch.dtype = getattr(torch, dtype)
    plan = KVPlan.parse(kv).bind(config.layers, dtype)
    path = ComputePath.choose(kind)
    sizes = plan_memory(config, kind, path, plan, budget_bytes, max_sequences)
    tokenizer = Tokenizer.from_directory(directory)

    ledger = Ledger(Budget({"host": budget_bytes}))
    ledger.charge("runtime", "host", sizes.runtime_bytes)
    arena = Arena(HostTier(), ledger)
    weights = _reserve(arena, "weights", sizes.weights_bytes)
    tensors, load = read_weights(directory, config, kind, _bump_allocator(weights), progress)
    decoder = Decoder(config, ResidentWeights(tensors, config.activation))
    workspace = Workspace(arena, sizes.workspace)
    kv_bytes = budget_bytes - ledger.total("host")
    store = PagedStore(plan, arena, kv_bytes, model_fingerprint(directory))
    settings = SchedulerConfig(
        max_positions=config.max_positions,
        max_step_tokens=sizes.max_step_tokens,
        max_sequences=sizes.max_sequences,
        # config.json often names only one of several.
        eos_token_ids=tuple(sorted({*config.eos_token_ids, *tokenizer.eos_token_ids})),
        prefix_cache=prefix_cache,
        namespace=store.fingerprint,
        seed=seed,
    )
    pricing = KVPricing.of(plan, config.max_positions, sizes.max_step_tokens, arena.tier.page_bytes)
    executor = TorchExecutor(path.model(decoder), decoder.weights, store, workspace)
    core = _make_core(Scheduler(settings, pricing, kv_bytes), executor, arena)
    decoder.eval()

    def close() -> None:
        store.close_all()
        workspace.close()
        weights.close()
        trim_malloc()

    return Engine(
        EngineParts(
            model_name=directory.name if model else "builtin",
            config=config,
            tokenizer=tokenizer,
            memory=sizes,
            plan=plan,
            ledger=ledger,
            store=store,
            core=core,
            meter=meter,
            load=load,
            close=close,
        )
    )


def _make_core(scheduler: Scheduler, executor: TorchExecutor, arena: Arena) -> EngineCore:
    core = EngineCore(scheduler, executor, arena)
    core.reset_executor = executor.reset
    core.resize_store = executor.store.resize
    # The store's address space, made at the start, holds twice its capacity.
    core.max_kv_bytes = 2 * scheduler.account.capacity_bytes
    return core


def _reserve(arena: Arena, owner: str, num_bytes: int) -> Range:
    made = arena.reserve(num_bytes, owner)
    made.commit(np.zeros(1, dtype=np.int64), num_bytes)
    return made


def _bump_allocator(target: Range) -> Callable[[str, tuple[int, ...], torch.dtype], Tensor]:
    """Return an allocator that lays tensors one behind the other in ``target``."""
    offset = 0

    def allocate(_name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        nonlocal offset
        count = int(np.prod(shape))
        start, offset = offset, offset + -(-count * dtype.itemsize // ALIGN) * ALIGN
        return target.base[start : start + count * dtype.itemsize].view(dtype).view(shape)

    return allocate


def model_fingerprint(directory: Path) -> bytes:
    """Return 16 bytes that name a model's weights: its config, and the headers and sizes of its weight files."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted([directory / "config.json", *directory.glob("*.safetensors")]):
        with path.open("rb") as file:
            size = path.stat().st_size
            digest.update(f"{path.name}|{size}|".encode())
            digest.update(file.read(65536))
            file.seek(max(size - 65536, 0))
            digest.update(file.read(65536))
    return digest.digest()
