"""Padded batches under policies: whatever happens to a batch, each row holds what it would hold in one of its own."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from tests.support.kv_world import NOTHING, make_spec
from torch import Tensor

from elbowroom.errors import IntegrityError, RequestError
from elbowroom.kv import KVPlan, PagedStore
from elbowroom.kv.adapters.hf_batch import PaddedBatch
from elbowroom.kv.adapters.hf_prompts import Prompts
from elbowroom.memory import Arena, Budget, HostTier, Ledger

LAYERS = (make_spec(4, 2, 32, 32), make_spec(4, 2, 32, 32, window=100), make_spec(4, 2, 32, 32))
PLANS = (
    "snapkv(128,w=16)",
    "streaming(128) | int8",
    "spatten(150,last=128,w=16)",
    "snapkv(128,w=16) | kivi",
    "think | kivi(2,2,32)",
    "kvmerger(128,w=64)",
)


def make_batch(plan: str) -> tuple[PagedStore, PaddedBatch]:
    bound = KVPlan.parse(plan).bind(LAYERS, "float32")
    store = PagedStore(bound, Arena(HostTier(), Ledger(Budget({}))), 2**26)
    return store, PaddedBatch(store, prompts=Prompts(bound.chosen_layers))


class Life:
    """A batch, and beside it one for each row, in stores of their own."""

    def __init__(self, plan: str, seed: int) -> None:
        self.random = random.Random(f"{plan} {seed}")
        self.generator = torch.Generator().manual_seed(seed)
        self.store, self.batch = make_batch(plan)
        self.rows: list[tuple[PagedStore, PaddedBatch]] = [make_batch(plan) for _ in range(3)]
        self.mask = torch.empty(3, 0, dtype=torch.bool)
        self.num_chosen = 0

    def forward(self, num_new: int, num_layers: int, is_part: bool) -> None:
        """Run a pass; with fewer than all layers it dies."""
        new = torch.rand(len(self.rows), num_new, generator=self.generator) < self.random.choice([1.0, 0.6])
        new[:, -1] |= self.random.random() < 0.9  # mostly, rows end together
        mask = torch.cat([self.mask, new], dim=1)
        shapes = [(len(self.rows), heads, num_new, 32) for heads in (4, 2, 2)] * num_layers
        given = [torch.randn(shape, generator=self.generator) for shape in shapes]
        try:
            outs = self._run(self.store, self.batch, mask, given, is_part)
        except RequestError:  # a row has only padding where its prompt ends
            return
        for number, (store, batch) in enumerate(self.rows):
            row = slice(number, number + 1)
            alone = self._run(store, batch, mask[row], [x[row] for x in given], is_part)
            assert all(torch.equal(out[row], each) for out, each in zip(outs, alone, strict=True))
        if num_layers < len(LAYERS):
            self._die()
        else:
            self.mask = mask

    def _run(
        self, store: PagedStore, batch: PaddedBatch, mask: Tensor, given: list[Tensor], is_part: bool
    ) -> list[Tensor]:
        num_new, outs = mask.shape[1] - self.mask.shape[1], []
        with batch.prompts.reading() if is_part else nullcontext():
            step = batch.begin(mask, num_new)
            self.num_chosen += step.chooses
            for layer in range(len(given) // 3):
                if step.kv is None:
                    outs.append(torch.zeros(mask.shape[0], num_new, 4, 32))
                    continue
                packed = [step.pack(x) for x in given[3 * layer : 3 * layer + 3]]
                outs.append(step.unpack(store.attend(layer, *packed, step.kv, NOTHING).out))
                store.end_layer(layer, step.kv)
            if len(given) == 3 * len(LAYERS):
                batch.end()
        return outs

    def _die(self) -> None:
        """What came next finds that the tokens are there, or says that they are lost; they are after a choice only."""
        chose = self.batch._step is not None and self.batch._step.chooses
        had = self.batch.num_columns
        for _, batch in self.rows:
            batch.abandon()
        if chose and had:
            with pytest.raises(RequestError, match="are lost"):
                self.batch.fork()
        self.batch.abandon()
        if chose:
            assert self.store.report().num_strips == 0
            for each in (self.batch, *(batch for _, batch in self.rows)):
                each.clear()
            self.mask = self.mask[:, :0]

    def both(self, act: Callable[[PaddedBatch], Any]) -> bool:
        """Do something to the batch and to each row; return whether it was allowed, which rows alone decide."""
        try:
            act(self.batch)
        except IntegrityError:
            return False
        for _, batch in self.rows:
            act(batch)
        return True

    def crop(self) -> None:
        count = min(self.random.choice([0, 1, 5, 70]), self.batch.num_columns)
        if self.both(lambda batch: batch.crop(count)):
            self.mask = self.mask[:, : self.mask.shape[1] - count]

    def select(self) -> None:
        """Change the order of the rows."""
        order = self.random.sample(range(3), 3)
        if self.batch.num_columns:
            self.batch.select(order)
            self.rows, self.mask = [self.rows[row] for row in order], self.mask[order]

    def fork(self) -> None:
        """Go on with copies, beside their originals."""
        twin = self.batch.fork()
        self.batch.clear()
        self.batch = twin

    def check(self) -> None:
        self.batch.abandon()
        self.store.check_integrity()
        assert self.store.report().num_strips == sum(store.report().num_strips for store, _ in self.rows)
        for handle, (store, batch) in zip(self.batch._handles, self.rows, strict=False):
            count = self.store.num_tokens(handle)
            if count:
                assert self.store.export_span(handle, 0, count) == store.export_span(batch._handles[0], 0, count)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("seed", range(2))
def test_rows_of_a_random_life_are_those_rows_alone(plan: str, seed: int) -> None:
    """Parts, ends and later prompts, single tokens, passes that die, rollbacks and copies."""
    life = Life(plan, seed)
    for _ in range(14):
        kind = life.random.choice(["pass"] * 5 + ["dies", "dies", "crop", "select", "fork"])
        if kind in ("pass", "dies"):
            size, is_part = life.random.choice([1, 1, 7, 90, 200, 300]), life.random.random() < 0.3
            life.forward(size, len(LAYERS) if kind == "pass" else 1, is_part)
        else:
            getattr(life, kind)()
        life.check()
    life.batch.clear()
    assert life.store.report().live_bytes == 0
    assert life.num_chosen
