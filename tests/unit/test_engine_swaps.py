"""Saving and loading sequences: the same tokens as without, and every failure costs one sequence at most."""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.support.tiny_model import write_tiny_model

from elbowroom.engine.executors.local import TorchExecutor
from elbowroom.engine.executors.transfers import Transfers
from elbowroom.engine.sampling_params import SamplingParams
from elbowroom.engine.types import KVOp, Moved, Row, SampleSpec, StepPlan, StepResult
from elbowroom.errors import OutOfBudget
from elbowroom.kv.contiguous import ContiguousStore
from elbowroom.kv.mixed import MixedStore
from elbowroom.kv.paged import PagedStore
from elbowroom.kv.plan import KVPlan
from elbowroom.memory import Arena, Budget, DiskTier, HostTier, Ledger
from elbowroom.models.base import TorchScratch
from elbowroom.models.decoder import Decoder
from elbowroom.models.loader import load_model
from elbowroom.models.path import ANY, ComputePath

PLANS = ("plain", "plain(bf16)", "int8", "fp8", "bfp(k=8,v=4,n=16)", "kivi(k=4,v=4,g=32)", "planes(g=16)")
CONTIGUOUS = "plain, contiguous"
GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)
PROMPTS = {1: 50, 2: 130, 3: 190}
COUNT = 90


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    return load_model(write_tiny_model(tmp_path_factory.mktemp("model")), torch.float32)


@pytest.fixture
def tier(tmp_path: Path) -> Iterator[DiskTier]:
    made = DiskTier(tmp_path, 1 << 28)
    yield made
    made.close()


class Player:
    """Sequences on an executor, each with all its tokens; sequence n lies in some slot, or in an object, or nowhere."""

    def __init__(self, decoder: Decoder, tier: DiskTier | None, *plans: str) -> None:
        self.ledger = Ledger(Budget({}))
        arena = Arena(HostTier(), self.ledger)
        bound = [KVPlan.parse(plan).bind(decoder.config.layers, "float32") for plan in plans if plan != CONTIGUOUS]
        self.store: PagedStore | MixedStore | ContiguousStore
        if plans == (CONTIGUOUS,):
            bound = [KVPlan.parse("plain").bind(decoder.config.layers, "float32")]
            self.store = ContiguousStore(bound[0], arena, 1 << 26, num_rows=8, row_tokens=1024)
        else:
            stores = [PagedStore(plan, arena, 1 << 26) for plan in bound]
            self.store = stores[0] if len(stores) == 1 else MixedStore(stores)
        transfers = None if tier is None else Transfers(self.store, tier)
        self.block_bytes = bound[0].block_bytes
        model = ComputePath(ANY).model(decoder)
        self.executor = TorchExecutor(model, decoder.weights, self.store, TorchScratch(), transfers)
        self.tokens: dict[int, list[int]] = {}
        self.slots: dict[int, int] = {}
        self.moved: list[Moved] = []
        self._next_slot = 0

    def submit(self, *ops: KVOp, rows: tuple[Row, ...] = (), waits: bool = False) -> StepResult:
        result = self.executor.collect(self.executor.submit(StepPlan(ops, rows, waits=waits)))
        self.moved += result.moved
        return result

    def slot(self, number: int) -> int:
        """Give a sequence a new slot."""
        self._next_slot += 1
        self.slots[number] = self._next_slot
        return self._next_slot

    def start(self, number: int, length: int, plan: int = 0) -> None:
        generator = torch.Generator().manual_seed(number)
        self.tokens[number] = torch.randint(0, 200, (length,), generator=generator).tolist()
        op = KVOp("open", self.slot(number), plan=plan)
        self.compute((op,), [self.row(number, 0)])

    def row(self, number: int, start: int) -> Row:
        tokens = self.tokens[number][start:]
        spec = SampleSpec(GREEDY, 0, 0, PROMPTS.get(number, 1), tuple(self.tokens[number]))
        return Row(self.slots[number], "chunk", start, len(tokens), tokens, spec)

    def compute(self, ops: tuple[KVOp, ...], rows: list[Row]) -> StepResult:
        result = self.submit(*ops, rows=tuple(rows))
        for number, slot in self.slots.items():
            self.tokens[number] += [token.token_id for token in result.tokens.get(slot, [])]
        return result

    def held(self, number: int) -> int:
        """Tokens that the slot of a sequence holds: all but the one that was sampled last."""
        return len(self.tokens[number]) - 1

    def save(self, number: int, **options: bool) -> KVOp:
        return KVOp("save", self.slots[number], num_tokens=self.held(number), key=f"s{number}", **options)

    def load(self, number: int, tokens: int | None = None, plan: int = 0, **options: bool) -> KVOp:
        count = self.held(number) if tokens is None else tokens
        return KVOp("load", self.slot(number), num_tokens=count, key=f"s{number}", plan=plan, **options)

    def close(self, number: int) -> KVOp:
        return KVOp("close", self.slots.pop(number))

    def wait(self, number: int) -> Moved:
        """Wait for the transfer of a sequence's object."""
        while True:
            for moved in self.moved:
                if moved.key == f"s{number}":
                    self.moved.remove(moved)
                    return moved
            self.submit(waits=True)


def played(decoder: Decoder, plan: str) -> dict[int, list[int]]:
    """Return the tokens of sequences that are never swapped."""
    player = Player(decoder, None, plan)
    for number, length in PROMPTS.items():
        player.start(number, length)
    for _ in range(COUNT):
        player.compute((), [player.row(number, player.held(number)) for number in PROMPTS])
    return player.tokens


@pytest.mark.parametrize("plan", [*PLANS, CONTIGUOUS])
def test_random_swaps_change_no_token(decoder: Decoder, tier: DiskTier, plan: str) -> None:
    """Sequences are saved, closed, loaded and rolled back at random, at once or meanwhile: the same greedy tokens."""
    player, rng = Player(decoder, tier, plan), random.Random(7)
    for number, length in PROMPTS.items():
        player.start(number, length)
    expected = played(decoder, plan)
    away: set[int] = set()
    while any(len(player.tokens[number]) < len(expected[number]) for number in PROMPTS):
        ops: list[KVOp] = []
        for number in PROMPTS:
            action, is_async = rng.random(), rng.random() < 0.5
            if number in away:
                if action < 0.3:
                    ops.append(player.load(number, is_async=is_async))
                    away.discard(number)
            elif action < 0.15:
                ops.append(player.save(number, is_async=is_async))
                if rng.random() < 0.7:  # waits for the transfer where it is asynchronous
                    ops.append(player.close(number))
                    away.add(number)
            elif action < 0.2:
                tokens, block = player.tokens[number], player.held(number) // 64 * 64
                cut = rng.randint(block, player.held(number)) if plan.startswith("plain") else block
                ops.append(KVOp("truncate", player.slots[number], num_tokens=cut))
                player.compute(tuple(ops), [player.row(number, cut)]) if cut < len(tokens) else None
                ops.clear()
        present = [number for number in PROMPTS if number in player.slots]
        player.compute(tuple(ops), [player.row(number, player.held(number)) for number in present])
        player.store.check_integrity()
    for number in PROMPTS:
        assert player.tokens[number][: len(expected[number])] == expected[number]
    assert [moved.error for moved in player.moved if moved.error] == []
    kinds = [moved.kind for moved in player.moved]
    assert min(kinds.count("save"), kinds.count("load")) > 5
    player.executor.reset()
    assert player.ledger.held("kv", "host") == 0
    assert tier.usage().num_objects == 0


def test_save_and_close_free_the_bytes_in_one_step_and_only_what_is_new_is_written(
    decoder: Decoder, tier: DiskTier
) -> None:
    """A second save writes the blocks behind the first one's full ones, and moves them as few runs."""
    player = Player(decoder, tier, "plain")
    player.start(3, 190)
    player.submit(player.save(3), player.close(3))
    assert player.ledger.held("kv", "host") == 0
    first = player.wait(3)
    assert (first.error, first.num_tokens, first.num_copies) == (None, 190, 1)
    assert first.num_bytes == tier.usage().used_bytes == 3 * player.block_bytes
    player.submit(player.load(3))
    for _ in range(10):
        player.compute((), [player.row(3, player.held(3))])
    player.moved.clear()
    player.submit(player.save(3))
    second = player.wait(3)
    assert (second.num_tokens, second.num_bytes) == (200, 2 * first.num_bytes // 3)
    player.submit(player.save(3))
    assert player.wait(3).num_bytes == first.num_bytes // 3
    player.submit(KVOp("forget", -1, key="s3"))
    assert tier.usage().used_bytes == 0


def test_prefix_of_an_object_can_be_loaded(decoder: Decoder, tier: DiskTier) -> None:
    """Fewer tokens than were saved make a sequence that goes on as the first did from there."""
    player = Player(decoder, tier, "plain(bf16)")
    player.start(2, 130)
    for _ in range(40):
        player.compute((), [player.row(2, player.held(2))])
    tokens = list(player.tokens[2])
    player.submit(player.save(2), player.close(2))
    for cut in (64, 100, 128, 150):
        player.submit(player.load(2, cut))
        player.tokens[2] = tokens[: max(cut + 1, 131)]
        player.compute((), [player.row(2, cut)])
        while len(player.tokens[2]) < len(tokens):
            player.compute((), [player.row(2, player.held(2))])
        assert player.tokens[2] == tokens
        player.submit(player.close(2))


def test_rows_of_others_go_on_during_a_save_and_a_change_waits(
    decoder: Decoder, tier: DiskTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a save cannot end, other sequences are computed; a row of its own slot comes back behind it only."""
    gate, write = threading.Event(), os.pwritev

    def slow(*args: object) -> int:
        assert gate.wait(20)
        return write(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "pwritev", slow)
    player = Player(decoder, tier, "plain")
    for number, length in PROMPTS.items():
        player.start(number, length)
    player.submit(player.save(3, is_async=True))
    player.compute((), [player.row(1, player.held(1)), player.row(2, player.held(2))])
    assert len(player.tokens[1]) == PROMPTS[1] + 2
    assert player.moved == []
    threading.Timer(0.3, gate.set).start()
    player.compute((), [player.row(3, player.held(3))])
    assert gate.is_set()
    assert [moved.kind for moved in player.moved] == ["save"]


@pytest.mark.parametrize("failure", ["full", "capacity", "damaged", "missing", "memory"])
def test_failure_costs_one_transfer(
    decoder: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: str
) -> None:
    """The result names the error; a slot to be saved stays, one to be loaded is absent; others go on."""
    tier = DiskTier(tmp_path, 1000 if failure == "capacity" else 1 << 26)
    player = Player(decoder, tier, "int8")
    for number, length in PROMPTS.items():
        player.start(number, length)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if failure in ("full", "capacity"):
        with monkeypatch.context() as patch:
            if failure == "full":
                patch.setattr(os, "pwritev", full)
            player.submit(player.save(3, is_async=True))
            assert "full" in (player.wait(3).error or "")
    else:
        player.submit(player.save(3), player.close(3))
        assert player.wait(3).error is None
        (path,) = tier.path.glob("*.kv")
        if failure == "damaged":
            path.write_bytes(bytes(path.stat().st_size))
        if failure == "missing":
            player.submit(KVOp("forget", -1, key="s3"))
        if failure == "memory":
            player.store.resize(1)
        load = player.load(3)
        result = player.compute((load,), [player.row(3, player.held(3))])
        error = player.wait(3).error or ""
        assert {"damaged": "checksum", "missing": "no object", "memory": "needs"}[failure] in error
        assert result.tokens == {}
        player.submit(player.close(3))
        player.store.resize(1 << 26)
        player.submit(KVOp("open", player.slot(3)))
        player.tokens[3].pop()
        player.compute((), [player.row(3, 0)])
    assert tier.usage().used_bytes == 0
    for _ in range(10):
        player.compute((), [player.row(number, player.held(number)) for number in PROMPTS])
    expected = played(decoder, "int8")
    for number in PROMPTS:
        assert player.tokens[number] == expected[number][: len(player.tokens[number])]
    player.store.check_integrity()
    tier.close()


def test_plans_side_by_side_and_forks(decoder: Decoder, tier: DiskTier) -> None:
    """Sequences of two plans go to one tier; a fork knows what its source has saved."""
    player = Player(decoder, tier, "plain", "int8")
    player.start(2, 130, plan=1)
    expected = played(decoder, "int8")[2]
    player.submit(player.save(2))
    whole = player.wait(2).num_bytes
    source = player.slots[2]
    player.submit(KVOp("fork", player.slot(2), source, player.held(2)), KVOp("close", source))
    player.compute((), [player.row(2, player.held(2))])
    player.submit(player.save(2), player.close(2))
    assert player.wait(2).num_bytes < whole
    player.submit(player.load(2, plan=0))
    assert "under plan 0" in (player.wait(2).error or "")
    assert not tier.contains("s2")
    player.slots.pop(2)
    player.start(2, 130, plan=1)
    player.submit(player.save(2), player.close(2))
    player.submit(player.load(2, plan=1))
    for _ in range(10):
        player.compute((), [player.row(2, player.held(2))])
    assert player.tokens[2] == expected[:141]


def test_plans_that_choose_tokens_are_refused(decoder: Decoder, tier: DiskTier) -> None:
    """A save of a plan with a policy is a failed transfer that names the fix."""
    player = Player(decoder, tier, "streaming(tokens=128)")
    player.submit(KVOp("open", player.slot(1)))
    player.submit(KVOp("save", player.slots[1], num_tokens=0, key="s1"))
    assert "cannot be swapped" in (player.wait(1).error or "")


@pytest.mark.parametrize("plan", ["plain", CONTIGUOUS])
def test_a_load_that_cannot_begin_leaves_no_sequence(
    decoder: Decoder, tier: DiskTier, monkeypatch: pytest.MonkeyPatch, plan: str
) -> None:
    player = Player(decoder, tier, plan)
    player.start(2, 130)
    player.submit(player.save(2), player.close(2))
    player.wait(2)

    def refuse(*_: object) -> int:
        raise OutOfBudget("no", "yes")

    monkeypatch.setattr(player.store, "lend", refuse)
    player.submit(player.load(2))
    assert player.wait(2).error == "no"
    assert player.store.report().num_sequences == 0
    assert player.ledger.held("kv", "host") == 0
