"""load_resident: from a model directory and a memory amount to weights, workspace and KV store, and no engine yet."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from elbowroom.engine.baseline import measure_baseline
from elbowroom.engine.plans import KVPlans, PlanText
from elbowroom.engine.sizing import ALIGN, MemoryPlan, plan_memory
from elbowroom.engine.stores import Store, check_store, make_stores
from elbowroom.errors import ConfigError
from elbowroom.kv.calibration import FILE, Calibration
from elbowroom.kv.capacity import Capacity
from elbowroom.kv.paged import PagedStore
from elbowroom.memory.arena import Arena, Range
from elbowroom.memory.ledger import Budget, Ledger
from elbowroom.memory.malloc import trim_malloc
from elbowroom.memory.meter import Meter, available_bytes
from elbowroom.memory.tiers import HostTier
from elbowroom.memory.workspace import Workspace
from elbowroom.models.config import ModelConfig
from elbowroom.models.decoder import Decoder
from elbowroom.models.directory import find_model
from elbowroom.models.hf_config import check_dtype, choose_dtype, read_config
from elbowroom.models.loader import LoadReport, read_weights
from elbowroom.models.path import ComputePath
from elbowroom.models.tokenizer import Tokenizer
from elbowroom.units import parse_bytes
from elbowroom.weights.resident import ResidentWeights

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidentModel:
    """A model in memory with room for keys and values; every byte is charged."""

    directory: Path
    config: ModelConfig
    tokenizer: Tokenizer
    path: ComputePath
    memory: MemoryPlan
    ledger: Ledger
    arena: Arena
    decoder: Decoder
    workspace: Workspace
    store: Store
    """Of the usual plan."""
    others: tuple[PagedStore, ...]
    """Of further plans; all share one capacity."""
    meter: Meter
    load: LoadReport
    weights: Range

    def close(self) -> None:
        """Give all memory back."""
        for store in (self.store, *self.others):
            store.close_all()
        self.workspace.close()
        self.weights.close()
        trim_malloc()


def load_resident(
    model: str | None = None,
    memory: str | int = "80%",
    kv: PlanText | KVPlans = None,
    dtype: str = "auto",
    *,
    path: ComputePath | None = None,
    max_sequences: int = 64,
    kv_store: str = "paged",
    tasks_bytes: int = 0,
    progress: Progress | None = None,
) -> ResidentModel:
    """Load a model inside ``memory``; errors as in ``build_engine``.

    Args:
        model: a Hugging Face model directory; None means the built-in model.
        memory: bound on what this process holds over its baseline.
        kv: how keys and values are kept, the plan or several; read with the calibration beside the model if one
            needs it.
        dtype: for weights and KV cache; ``auto``: what the checkpoint says.
        path: which passes run native and which on torch; by default what is fastest here.
        max_sequences: most sequences that run at once.
        kv_store: where keys and values lie; see ``KV_STORES``.
        tasks_bytes: what the caller will allocate beside, charged to ``tasks``.
        progress: called with bytes loaded and bytes in all.
    """
    check_dtype(dtype)
    meter = measure_baseline()
    budget_bytes = parse_bytes(memory, available_bytes())
    directory = find_model(model)
    config, dtype = read_config(directory), choose_dtype(dtype, directory)
    kind: torch.dtype = getattr(torch, dtype)
    plans = kv if isinstance(kv, KVPlans) else KVPlans.of(kv)
    bound = plans.bind(config.layers, dtype, read_calibration(directory) if plans.needs_calibration else None)
    check_store(kv_store, bound)
    path = path or ComputePath.choose(kind, config.hidden_size)
    sizes = plan_memory(config, kind, path, bound, budget_bytes, max_sequences, plans.relief)
    tokenizer = Tokenizer.from_directory(directory)

    ledger = Ledger(Budget({"host": budget_bytes}))
    ledger.charge("runtime", "host", sizes.runtime_bytes)
    arena = Arena(HostTier(), ledger)
    weights = _reserve(arena, "weights", sizes.weights_bytes)
    tensors, load = read_weights(directory, config, kind, _bump_allocator(weights), progress)
    decoder = Decoder(config, ResidentWeights(tensors, config.activation))
    decoder.eval()
    workspace = Workspace(arena, sizes.workspace)
    if tasks_bytes:
        ledger.charge("tasks", "host", tasks_bytes)
    capacity, model_id = Capacity(budget_bytes - ledger.total("host")), model_fingerprint(directory)
    longest = config.max_positions
    store, *others = make_stores(
        kv_store, bound, arena, capacity, model_id, max_tokens=longest, max_sequences=sizes.max_sequences
    )
    return ResidentModel(
        directory=directory,
        config=config,
        tokenizer=tokenizer,
        path=path,
        memory=sizes,
        ledger=ledger,
        arena=arena,
        decoder=decoder,
        workspace=workspace,
        store=store,
        others=tuple(each for each in others if isinstance(each, PagedStore)),
        meter=meter,
        load=load,
        weights=weights,
    )


def read_calibration(directory: Path) -> Calibration | None:
    """Return the calibration beside a model, or None.

    Raises:
        ConfigError: the file is malformed, or was measured with other weights.
    """
    calibration = Calibration.load(directory)
    if calibration is not None and calibration.model != model_fingerprint(directory).hex():
        raise ConfigError(
            f"{directory / FILE} was measured with other weights", f"measure it again: elbowroom calibrate {directory}"
        )
    return calibration


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
