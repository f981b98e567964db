"""Every admission policy, order and preemption: in memory that is short, each request gets the tokens it gets alone.

The requests are made to get into each other's way: prompts of all lengths around the borders of blocks, prefixes in
common, tenants, priorities, deadlines, two KV plans, several samples, penalties, drawn tokens, sessions that go on,
branch and overlap, cancels, stop tokens that nobody foresees, and a budget that is lowered for a while.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.decoder_world import VOCAB, config, random_decoder, spec
from tests.support.policy_world import FAST, ORDERS, SLOW, STEP_S, PolicyWorld, alone

from elbowroom.engine.admission import ADMISSIONS, AdmissionPolicy
from elbowroom.engine.admission.lengths import Kind
from elbowroom.engine.ordering import ORDERS as ORDER_REGISTRY
from elbowroom.engine.preemption import PREEMPTIONS
from elbowroom.engine.preemption.auto import AutoPreemption
from elbowroom.engine.preemption.base import PreemptPolicy
from elbowroom.engine.sampling_params import SamplingParams
from elbowroom.engine.types import Request, SchedulerStats, SessionRef
from elbowroom.kernels import backend_name
from elbowroom.memory import DiskTier
from elbowroom.models.decoder import Decoder
from elbowroom.models.path import ANY, ComputePath

PATH = ComputePath(ANY if backend_name() == "native" else 0)
BLOCKS, FEWER = 12, 8
"""What the store holds, and while the budget is lowered."""
DIP = range(60, 80)
"""Steps in which it is."""
GAP = 0.005
"""Nats between the two best tokens: passes of other shapes round in the last bit, and a code on an edge may fall."""
MODELS = {
    "full": config(spec(4, 2, 16), spec(4, 2, 16), hidden=48),
    "windows": config(spec(4, 2, 16, window=70), spec(4, 2, 16), hidden=48),
}
PREEMPTION_NAMES = tuple(PREEMPTIONS.names())
AXES = tuple(ADMISSIONS.names()), tuple(ORDER_REGISTRY.names()), tuple(PREEMPTIONS.names())
# A Latin square, in which every two values of two axes meet, and a diagonal with every value.
CELLS = [
    ("full", AXES[0][row], AXES[1][column], AXES[2][(row + column) % 3]) for row in range(5) for column in range(4)
] + [("windows", AXES[0][row], AXES[1][row % 4], AXES[2][row % 3]) for row in range(5)]


@dataclass(frozen=True)
class Work:
    """A request, when it comes, and what it gets alone."""

    request: Request
    expected: list[list[int]]
    at: int = 0
    """Step of its arrival."""
    behind: int | None = None
    """Request that must have ended before."""
    cancelled: int | None = None
    """Steps behind its arrival after which it is cancelled."""


def tokens_of(count: int, seed: int) -> tuple[int, ...]:
    """Return random tokens."""
    return tuple(torch.randint(0, VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist())


@dataclass
class Workload:
    """Requests whose choices, alone, are all clear: nothing is excused as rounding."""

    decoder: Decoder
    works: list[Work] = field(default_factory=list)

    def add(
        self,
        length: int,
        count: int,
        prefix: Sequence[int] = (),
        params: dict[str, Any] | None = None,
        life: dict[str, int] | None = None,
        **fields: Any,
    ) -> Work:
        """Add a request.

        Args:
            length: random tokens of its prompt, behind ``prefix``.
            count: tokens that it gets.
            prefix: what its prompt begins with.
            params: further sampling parameters.
            life: when it comes, and whether it is cancelled.
            fields: of ``Request``.
        """
        number, chosen = len(self.works), {"temperature": 0.0, "ignore_eos": True, "max_tokens": count}
        for seed in range(1000):
            prompt = (*prefix, *tokens_of(length, 1000 * number + seed))
            sampling = SamplingParams(seed=number, **{**chosen, **(params or {})})
            request = Request(id=number, prompt_token_ids=prompt, sampling=sampling, **fields)
            answers = alone(self.decoder, PATH, replace(request, sampling=replace(sampling, logprobs=2), session=None))
            # Log-probabilities are those of the model, before penalties.
            if sampling.has_penalties or not sampling.is_greedy or min(answers[0].gaps) > GAP:
                self.works.append(Work(request, [answer.tokens for answer in answers], **(life or {})))
                return self.works[-1]
        raise AssertionError("no prompt has a clear answer")

    def stop_early(self, work: Work, place: int) -> None:
        """Let a request end with the token at ``place`` of its answer, or where that comes before."""
        (tokens,) = work.expected
        sampling = replace(work.request.sampling, stop_token_ids=(tokens[place],))
        ended = Work(replace(work.request, sampling=sampling), [tokens[: tokens.index(tokens[place]) + 1]])
        self.works[self.works.index(work)] = ended

    def add_sessions(self) -> None:
        """Add a session that goes on, branches, is rolled back, and is asked again before it has answered."""
        first = self.add(90, 40, session=SessionRef(1), tenant="a", priority=1)
        said = (*first.request.prompt_token_ids, *first.expected[0])
        for length, cut, ref, at in (
            (30, 130, SessionRef(1), 0),  # the next turn
            (25, 110, SessionRef(2, parent=1), 0),  # a branch
            (20, 64, SessionRef(1), 5),  # rolled back, while the turn before it may still be answered
            (35, 101, SessionRef(2), 60),
        ):
            life = {"behind": first.request.id, "at": at}
            self.add(length, 45, said[:cut], life=life, session=ref, tenant="a", priority=1)


def workload(decoder: Decoder) -> list[Work]:
    """Return requests that want much more memory than there is."""
    made = Workload(decoder)
    common = tokens_of(130, 77)
    for at, after, plan in ((0, 25, 0), (0, 1, 1), (30, 15, 0), (50, 1, 0)):
        made.add(100, 100, life={"at": at, "cancelled": after}, tenant="c", priority=at and 2, plan=plan)
    for place, (length, count) in enumerate([(1, 150), (63, 100), (64, 100), (65, 128), (20, 120), (191, 70)]):
        fields: dict[str, Any] = {"tenant": "abc"[place % 3], "priority": 2 - place % 3, "plan": place % 2}
        # They say that they will be short, which the oracle believes.
        made.add(length, count, num_output_tokens=10, deadline_s=60.0, **fields)
    for place in range(4):  # the third has another salt, so that it shares nothing, the fourth another plan
        fields = {"tenant": "b", "priority": 1, "salt": b"x" if place == 2 else b"", "plan": int(place == 3)}
        made.add(5 + 20 * place, 50, common, life={"at": 4 + 9 * place}, num_output_tokens=50, **fields)
    made.add(40, 60, params={"n": 2}, tenant="c", priority=1)
    made.add(70, 80, params={"frequency_penalty": 0.7, "repetition_penalty": 1.3}, tenant="a", priority=2)
    made.add(70, 80, params={"temperature": 0.8, "top_p": 0.9}, tenant="a", priority=2, plan=1)
    made.stop_early(made.add(30, 90, tenant="c", deadline_s=50.0), 40)
    for place, at in enumerate((25, 45, 70, 100)):  # urgent in every order
        fields = {"tenant": f"light {place}", "priority": 0, "deadline_s": at * STEP_S + 1.5, "plan": place % 2}
        made.add(100 + 30 * place, 20, life={"at": at}, num_output_tokens=20, **fields)
    made.add_sessions()
    return made.works


Worlds = dict[str, tuple[Decoder, list[Work]]]
"""Decoders, and requests with what they get alone."""


@pytest.fixture(scope="module")
def worlds() -> Worlds:
    """Both models."""
    decoders = {name: random_decoder(made) for name, made in MODELS.items()}
    return {name: (decoder, workload(decoder)) for name, decoder in decoders.items()}


def admission_taught_wrong(name: str) -> AdmissionPolicy:
    """Return a new policy that has seen short answers only, so that one that foresees admits too many."""
    made = ADMISSIONS.get(name)()
    for number in range(300):
        made.ended(Kind.of("abc"[number % 3], 1 + number), 5)
    return made


def preemption(name: str) -> PreemptPolicy:
    """Return a new policy; ``auto`` has a disk that is faster than any model."""
    return AutoPreemption(FAST) if name == "auto" else PREEMPTIONS.get(name)()


def play(made: PolicyWorld, works: Sequence[Work], dip: range = DIP) -> SchedulerStats:
    """Run all and compare every answer with that of the request alone; the budget is lowered for a while."""
    todo = list(works)
    cancels: dict[int, list[int]] = {}
    while todo or made.scheduler.has_work():
        step = made.num_steps
        for work in [each for each in todo if step >= each.at and (each.behind is None or made.ended(each.behind))]:
            todo.remove(work)
            made.scheduler.add(replace(work.request, arrival_s=step * STEP_S))
            if work.cancelled is not None:
                cancels.setdefault(step + work.cancelled, []).append(work.request.id)
        for number in cancels.pop(step, []):
            made.scheduler.abort(number)
        if step in (dip.start, dip.stop):
            made.set_blocks(FEWER if step == dip.start else BLOCKS)
        made.step()
        assert made.num_steps < 5000
    check(made, works)
    stats = made.scheduler.stats()
    made.close(sessions=[1, 2])
    return stats


def check(made: PolicyWorld, works: Sequence[Work]) -> None:
    """Every answer is that of the request alone; a cancelled one is its beginning."""
    num_cut = 0
    for work in works:
        for sample, expected in enumerate(work.expected):
            answer = made.answers[work.request.id, sample]
            if work.cancelled is None:
                assert answer.tokens == expected, f"request {work.request.id}"
                assert answer.reason == ("stop" if work.request.sampling.stop_token_ids else "length")
            else:
                assert answer.tokens == expected[: len(answer.tokens)], f"request {work.request.id}"
                assert answer.reason == "abort"
                num_cut += 0 < len(answer.tokens) < len(expected)
    assert num_cut > 0, "no cancel came in the middle of an answer"


def test_cells_hold_every_pair() -> None:
    """Every value of an axis meets every value of each other axis."""
    for one, other in ((0, 1), (0, 2), (1, 2)):
        pairs = {(cell[1 + one], cell[1 + other]) for cell in CELLS if cell[0] == "full"}
        assert len(pairs) == len(AXES[one]) * len(AXES[other])


@pytest.mark.parametrize(("model", "admission", "order", "preempts"), CELLS, ids=map("-".join, CELLS))
def test_tokens_do_not_depend_on_the_policies(
    worlds: Worlds, tmp_path: Path, model: str, admission: str, order: str, preempts: str
) -> None:
    """Nobody's answer depends on who else runs, who has to go for whom, and how often."""
    decoder, works = worlds[model]
    policies = admission_taught_wrong(admission), deepcopy(ORDERS[order]), preemption(preempts)
    tier = None if preempts == "recompute" else DiskTier(tmp_path, 1 << 28)
    stats = play(PolicyWorld(decoder, PATH, BLOCKS, policies, tier), works)
    assert stats.preemptions > 0
    assert stats.failed_swaps == 0
    if tier is not None:
        assert min(stats.swaps_out, stats.swaps_in) > 0
        tier.close()
    if model == "full":
        assert stats.cached_prompt_tokens > 0


def test_a_full_disk_and_policies_of_single_requests(worlds: Worlds, tmp_path: Path) -> None:
    """Saves that fail cost time only; requests that name their own admission policy get what all others get."""
    decoder, works = worlds["full"]
    names = AXES[0]
    mixed = [
        replace(work, request=replace(work.request, admission=names[place % len(names)]))
        for place, work in enumerate(works)
    ]
    tier = DiskTier(tmp_path, 120_000)
    policies = admission_taught_wrong("greedy"), deepcopy(ORDERS["fair"]), preemption("swap")
    stats = play(PolicyWorld(decoder, PATH, BLOCKS, policies, tier), mixed)
    assert stats.failed_swaps > 0
    assert stats.swaps_in > 0
    tier.close()


def test_auto_with_a_slow_disk_computes_again(worlds: Worlds, tmp_path: Path) -> None:
    """It has a disk and saves nothing there."""
    decoder, works = worlds["full"]
    tier = DiskTier(tmp_path, 1 << 28)
    policies = admission_taught_wrong("oracle"), deepcopy(ORDERS["priority"]), AutoPreemption(SLOW)
    stats = play(PolicyWorld(decoder, PATH, BLOCKS, policies, tier), works)
    assert stats.preemptions > 0
    assert (stats.swaps_out, stats.swaps_in) == (0, 0)
    tier.close()
