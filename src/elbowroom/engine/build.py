"""build_engine: from a model directory and a memory amount to a running Engine."""

from __future__ import annotations

from collections.abc import Sequence

from elbowroom.engine.core import EngineCore
from elbowroom.engine.engine import Engine, EngineParts
from elbowroom.engine.executors.local import TorchExecutor
from elbowroom.engine.executors.transfers import Transfers
from elbowroom.engine.plans import KVPlans
from elbowroom.engine.resident import Progress, load_resident
from elbowroom.engine.scheduler import Scheduler, SchedulerConfig
from elbowroom.engine.scheduling import Scheduling
from elbowroom.engine.stores import Store, price
from elbowroom.kv.mixed import MixedStore
from elbowroom.kv.paged import PagedStore
from elbowroom.kv.plan import KVPlan
from elbowroom.memory.arena import Arena
from elbowroom.models.thinking import find_marks


def build_engine(
    model: str | None = None,
    memory: str | int = "80%",
    kv: str | KVPlan | None = None,
    dtype: str = "auto",
    *,
    kv_choices: Sequence[str | KVPlan] = (),
    kv_relief: str | KVPlan | None = None,
    kv_store: str = "paged",
    max_sequences: int = 64,
    prefix_cache: bool = True,
    scheduling: Scheduling | None = None,
    seed: int = 0,
    thinking_marks: str | None = None,
    progress: Progress | None = None,
) -> Engine:
    """Load a model inside ``memory`` and start its engine.

    Args:
        model: a Hugging Face model directory; None means the built-in model.
        memory: bound on what this process holds over its baseline: bytes, ``512MiB``, ``6GiB``, or ``80%`` of what is
            available now.
        kv: how keys and values are kept, e.g. ``plain`` or ``plain(bf16)``.
        dtype: ``float32``, ``bfloat16`` or ``float16``, for weights and KV cache; ``auto``: what the checkpoint says.
        kv_choices: further plans, which single requests may ask for; each takes some of the budget for its steps.
        kv_relief: a plan that running sequences are turned into when memory is short, before any is preempted and
            computed again; it rounds what they hold, so by default there is none. Requests that name a plan keep it.
        kv_store: where keys and values lie: ``paged``; ``static``, the same with all its pages taken at the start; or
            ``contiguous``, one piece of address space for each sequence, whose pages come as it grows: for plain plans,
            without sharing of prefixes.
        max_sequences: most sequences that run at once.
        prefix_cache: keep finished prefixes for requests that share them.
        scheduling: who may begin, who is served first, and what becomes of those that have to go.
        seed: seeds requests that bring none.
        thinking_marks: ``BEGIN,END``, the texts between which the model thinks, or ``none``; by default they are found
            among the tokens of its tokenizer or in its chat template.
        progress: called with bytes loaded and bytes in all.

    Raises:
        ConfigError: nothing can be saved where ``scheduling`` says.
        BudgetTooSmall: the budget cannot hold the model and one short sequence.
        ModelError: the directory cannot be used.
        PlanError: a plan is malformed, does not suit the model or the KV store, or is no relief of ``kv``.
        RequestError: another argument is malformed.
    """
    policies = scheduling or Scheduling()
    plans = KVPlans.of(kv, kv_choices, kv_relief)
    swap_cost = policies.measure()  # a directory that cannot be used is refused before the model is loaded
    loaded = load_resident(
        model, memory, plans, dtype, max_sequences=max_sequences, kv_store=kv_store, progress=progress
    )
    config, tokenizer, sizes = loaded.config, loaded.tokenizer, loaded.memory
    marks = find_marks(tokenizer, thinking_marks)
    store: Store | MixedStore = loaded.store
    if loaded.others and isinstance(loaded.store, PagedStore):
        store = MixedStore((loaded.store, *loaded.others))
    kv_bytes = store.report().capacity_bytes
    settings = SchedulerConfig(
        max_positions=config.max_positions,
        max_step_tokens=sizes.max_step_tokens,
        max_sequences=sizes.max_sequences,
        # config.json often names only one of several.
        eos_token_ids=tuple(sorted({*config.eos_token_ids, *tokenizer.eos_token_ids})),
        prefix_cache=prefix_cache,
        relief_plan=plans.relief,
        repeats_steps=False,
        seed=seed,
    )
    page_bytes = loaded.arena.tier.page_bytes
    pricings = [
        price(kv_store, each.plan, config.max_positions, sizes.max_step_tokens, page_bytes, each.fingerprint)
        for each in (loaded.store, *loaded.others)
    ]
    tier = policies.make_tier(loaded.ledger)
    transfers = None if tier is None else Transfers(store, tier)
    decoder = loaded.decoder
    path = loaded.path.model(decoder)
    executor = TorchExecutor(path, decoder.weights, store, loaded.workspace, transfers, marks)
    scheduler = Scheduler(
        settings,
        pricings,
        kv_bytes,
        policies.make_admission(),
        policies.make_order(),
        policies.make_preemption(swap_cost),
    )
    core = _make_core(scheduler, executor, loaded.arena)
    core.marks = marks

    def close() -> None:
        if tier is not None:
            tier.close()
        loaded.close()

    return Engine(
        EngineParts(
            model_name=loaded.directory.name if model else "builtin",
            config=config,
            tokenizer=tokenizer,
            memory=sizes,
            plans=plans,
            plan=loaded.store.plan,
            ledger=loaded.ledger,
            store=store,
            core=core,
            meter=loaded.meter,
            load=loaded.load,
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
