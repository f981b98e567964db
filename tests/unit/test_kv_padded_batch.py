"""Padded batches over a store: whatever happens to a batch, each row is the same as that row alone."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
import torch
from tests.support.kv_world import NOTHING, make_spec
from torch import Tensor

from elbowroom.errors import IntegrityError, OutOfBudget, RequestError
from elbowroom.kv import KVPlan, KVStep, PagedStore
from elbowroom.kv.adapters.hf_batch import PaddedBatch
from elbowroom.memory import Arena, Budget, HostTier, Ledger

LAYERS = (make_spec(4, 2, 32, 32), make_spec(4, 2, 32, 32, window=100))
DENSE = LAYERS[:1]


def make_store(plan: str, layers: tuple = LAYERS, capacity_bytes: int = 2**26) -> PagedStore:
    bound = KVPlan.parse(plan).bind(layers, "float32")
    return PagedStore(bound, Arena(HostTier(), Ledger(Budget({}))), capacity_bytes)


@dataclasses.dataclass
class Token:
    """What a layer was given for one token, ``[H, D]``, and what attention gave back, by layer."""

    q: list[Tensor]
    k: list[Tensor]
    v: list[Tensor]
    out: list[Tensor]


class Life:
    """A PaddedBatch and, beside it, rows as lists of tokens; None is padding."""

    def __init__(self, plan: str, seed: int) -> None:
        self.store, self.random = make_store(plan), random.Random(seed)
        self.batch = PaddedBatch(self.store)
        self.rows: list[list[Token | None]] = [[], [], []]
        self.generator = torch.Generator().manual_seed(seed)

    def mask(self, num_new: int) -> Tensor:
        past = torch.tensor([[token is not None for token in row] for row in self.rows], dtype=torch.bool)
        new = torch.rand(len(self.rows), num_new, generator=self.generator) < self.random.choice([1.0, 0.6])
        return torch.cat([past.view(len(self.rows), -1), new], dim=1)

    def forward(self, num_new: int, num_layers: int) -> None:
        """Run a pass; with fewer than all layers it dies."""
        mask = self.mask(num_new)
        step = self.batch.begin(mask, num_new)
        rows, made = len(self.rows), Token([], [], [], [])
        for layer in range(num_layers):
            shapes = (("q", 4), ("k", 2), ("v", 2))
            for name, heads in shapes:
                getattr(made, name).append(torch.randn(rows, heads, num_new, 32, generator=self.generator))
            if step.kv is None:
                made.out.append(torch.zeros(rows, num_new, 4, 32))
                continue
            packed = [step.pack(x[-1]) for x in (made.q, made.k, made.v)]
            made.out.append(step.unpack(self.store.attend(layer, *packed, step.kv, NOTHING).out))
            assert not made.out[-1][~mask[:, -num_new:]].any()
        if num_layers < len(LAYERS):
            return
        self.batch.end()
        for index, row in enumerate(self.rows):
            for column in range(num_new):
                parts = [[x[index, :, column] for x in each] for each in (made.q, made.k, made.v)]
                out = [x[index, column] for x in made.out]
                row.append(Token(*parts, out) if mask[index, column - num_new] else None)

    def crop(self) -> None:
        count = min(self.random.choice([0, 1, 5, 70]), self.batch.num_columns)
        before = self.store.report()
        try:
            self.batch.crop(count)
        except IntegrityError:
            assert self.store.report().num_tokens == before.num_tokens
            return
        self.rows = [row[: len(row) - count] for row in self.rows]

    def select(self) -> None:
        chosen = [self.random.randrange(len(self.rows)) for _ in range(self.random.choice([2, 3, 4]))]
        if self.batch.num_columns:
            self.batch.select(chosen)
            self.rows = [list(self.rows[row]) for row in chosen]

    def check(self) -> None:
        self.batch.abandon()
        self.store.check_integrity()
        tokens = [[token for token in row if token is not None] for row in self.rows]
        assert self.store.report().num_tokens == sum(map(len, tokens))
        for handle, row in zip(self.batch._handles, tokens, strict=True):
            if row:
                span, outs = alone(self.store.plan.plan.text, row)
                assert self.store.export_span(handle, 0, len(row)) == span
                for layer, out in enumerate(outs):
                    torch.testing.assert_close(torch.stack([each.out[layer] for each in row]), out, rtol=0, atol=1e-5)


def alone(plan: str, row: list[Token]) -> tuple[bytes, list[Tensor]]:
    """Return what a store holds that reads a row at once, and what attention gives in each layer."""
    store, outs = make_store(plan), []
    starts = np.array([0, len(row)], dtype=np.int32)
    step = KVStep((store.open(),), starts, np.arange(len(row), dtype=np.int64))
    assert store.reserve(step) is None
    for layer in range(len(LAYERS)):
        q, k, v = (torch.stack([getattr(token, name)[layer] for token in row]) for name in "qkv")
        outs.append(store.attend(layer, q, k, v, step, NOTHING).out)
    store.end_step(step)
    return store.export_span(step.handles[0], 0, len(row)), outs


@pytest.mark.parametrize("plan", ["plain", "plain(bf16)", "int8", "fp8", "bfp", "kivi", "kivi(k=2,v=2,g=64)"])
@pytest.mark.parametrize("seed", range(2))
def test_rows_of_a_random_life_are_those_rows_alone(plan: str, seed: int):
    """Padding, passes that die, rollbacks and chosen rows leave the bits and the attention of each row by itself."""
    life = Life(plan, seed)
    for _ in range(12):
        kind = life.random.choice(["pass"] * 4 + ["dies", "crop", "select"])
        if kind in ("pass", "dies"):
            life.forward(life.random.choice([1, 1, 7, 64, 90]), len(LAYERS) if kind == "pass" else 1)
        else:
            getattr(life, kind)()
    life.check()
    life.batch.clear()
    assert life.store.report().live_bytes == 0


def test_what_does_not_fit_takes_nothing():
    batch = PaddedBatch(store := make_store("plain", DENSE, 40_000))  # one strip of 32 KiB
    batch.begin(torch.ones(1, 64, dtype=torch.bool), 64)
    batch.end()
    held = store.report().live_bytes
    with pytest.raises(OutOfBudget, match=r"2 more tokens in 1 rows need .* could be had"):
        batch.begin(torch.ones(1, 66, dtype=torch.bool), 2)
    assert (batch.num_columns, store.report().live_bytes) == (64, held)


def test_a_batch_that_does_not_continue_the_stored_one_is_refused():
    batch = PaddedBatch(make_store("plain", DENSE))
    mask = torch.tensor([[True, True, True], [False, True, True]])
    batch.begin(mask, 3)
    batch.end()
    for wrong, reason in (
        (mask, "3 cached and 1 new"),
        (torch.ones(2, 4, dtype=torch.bool), "padding"),
        (torch.ones(1, 4, dtype=torch.bool), "1 rows"),
    ):
        with pytest.raises(RequestError, match=reason):
            batch.begin(wrong, 1)
    with pytest.raises(RequestError, match="cannot remove 4 of 3"):
        batch.crop(4)


def test_an_empty_batch_may_change_its_rows():
    batch = PaddedBatch(store := make_store("plain", DENSE))
    for rows in (3, 2):
        batch.begin(torch.ones(rows, 5, dtype=torch.bool), 5)  # the first pass dies
    batch.end()
    assert (batch.num_rows, batch.num_columns, store.report().num_sequences) == (2, 5, 2)
