"""One request under many schedules: the tokens must be those of a plain loop that recomputes everything.

``Stepper`` is the engine without thread, text and clock: scheduler, executor, store and workspace, stepped by hand,
so that capacity and chunk sizes can be anything. Used by the benchmark ``parity`` and by the tests.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from elbowroom.core import STRIP_TOKENS
from elbowroom.engine.accounting import num_blocks
from elbowroom.engine.executors.local import TorchExecutor
from elbowroom.engine.sampling_params import SamplingParams
from elbowroom.engine.scheduler import Scheduler, SchedulerConfig
from elbowroom.engine.sizing import workspace_sizes
from elbowroom.engine.stores import make_stores, price
from elbowroom.engine.types import Request, SessionRef
from elbowroom.kv.calibration import Calibration
from elbowroom.kv.capacity import Capacity
from elbowroom.kv.plan import KVPlan
from elbowroom.memory.arena import Arena
from elbowroom.memory.ledger import Budget, Ledger
from elbowroom.memory.tiers import HostTier
from elbowroom.memory.workspace import Workspace
from elbowroom.models.config import ModelConfig
from elbowroom.models.decoder import Decoder
from elbowroom.models.dense import DenseContext
from elbowroom.models.path import ComputePath

STEP_TOKENS = 512
EXCUSED_GAP = 2e-4
"""A token may differ where the two largest logits of the reference are closer than this."""
Tokens = dict[tuple[int, int], list[int]]
"""Tokens by (request, sample)."""


@dataclass(frozen=True, slots=True)
class Reference:
    """Greedy tokens of a plain loop, and how clear each choice was."""

    tokens: list[int]
    gaps: list[float]
    """Largest minus second largest logit."""


@dataclass(slots=True)
class Difference:
    """How the tokens of a schedule compare with the reference."""

    num_tokens: int = 0
    unexcused: int = 0
    excused: int = 0

    def add(self, tokens: Sequence[int], reference: Reference, excused_gap: float = EXCUSED_GAP) -> None:
        """Compare one sequence; behind its first difference there is nothing left to compare."""
        assert len(tokens) == len(reference.tokens)
        for place, (ours, theirs) in enumerate(zip(tokens, reference.tokens, strict=True)):
            self.num_tokens += 1
            if ours != theirs:
                excused = reference.gaps[place] < excused_gap
                self.excused += excused
                self.unexcused += not excused
                return

    def merge(self, other: Difference) -> None:
        """Add the counts of ``other``."""
        self.num_tokens += other.num_tokens
        self.unexcused += other.unexcused
        self.excused += other.excused


@torch.inference_mode()
def reference_tokens(decoder: Decoder, prompt: Sequence[int], count: int) -> Reference:
    """Return ``count`` greedy tokens, computed from scratch for every token."""
    tokens, gaps = list(prompt), []
    for _ in range(count):
        context = DenseContext(decoder.config.layers, 1, len(tokens))
        logits = decoder.logits(decoder(torch.tensor(tokens), context)[-1:])[0].float()
        best = logits.topk(2).values
        gaps.append(float(best[0] - best[1]))
        tokens.append(int(logits.argmax()))
    return Reference(tokens[len(prompt) :], gaps)


@dataclass(frozen=True, slots=True)
class Subject:
    """A model, which of its passes run native, and how it keeps keys and values."""

    decoder: Decoder
    path: ComputePath
    kv: str | KVPlan = "plain"
    calibration: Calibration | None = None
    """For plans that need it."""
    kv_store: str = "paged"

    @property
    def config(self) -> ModelConfig:
        """Shape of the model."""
        return self.decoder.config


class Stepper:
    """An engine stepped by hand.

    Args:
        subject: the model; its weights stay where they are.
        capacity_tokens: tokens of all sequences, in whole blocks; one that long can at least be read.
        chunk: returns the most tokens of the next step.
        dtype: of activations, KV cache and workspace.
    """

    def __init__(
        self, subject: Subject, capacity_tokens: int, chunk: Callable[[], int] | None = None, dtype: str = "float32"
    ) -> None:
        plan = KVPlan.parse(subject.kv).bind(subject.config.layers, dtype, subject.calibration)
        tier = HostTier()
        longest = subject.config.max_positions
        self.pricing = price(subject.kv_store, plan, longest, STEP_TOKENS, tier.page_bytes)
        longest = len(self.pricing.by_blocks) - 1
        times, blocks = divmod(num_blocks(capacity_tokens), longest)
        prices = times * self.pricing.price(longest) + self.pricing.price(blocks)
        reading = self.pricing.peak_bytes(min(num_blocks(capacity_tokens), longest) * STRIP_TOKENS, ())
        capacity_bytes = max(prices, reading) + self.pricing.transient_bytes
        config = SchedulerConfig(
            max_positions=subject.config.max_positions, max_step_tokens=STEP_TOKENS, max_sequences=8
        )
        self.scheduler = Scheduler(config, [self.pricing], capacity_bytes)
        arena = Arena(tier, Ledger(Budget({})))
        sizes = workspace_sizes(subject.config, getattr(torch, dtype), subject.path, STEP_TOKENS, config.max_sequences)
        self._workspace = Workspace(arena, sizes)
        room = Capacity(capacity_bytes)
        (self.store,) = make_stores(
            subject.kv_store, [plan], arena, room, max_tokens=config.max_positions, max_sequences=8
        )
        self._executor = TorchExecutor(
            subject.path.model(subject.decoder), subject.decoder.weights, self.store, self._workspace
        )
        self._chunk = chunk
        self.tokens: Tokens = {}

    def add(
        self, number: int, prompt: Sequence[int], count: int, n: int = 1, session: SessionRef | None = None
    ) -> None:
        """Queue a greedy request."""
        sampling = SamplingParams(temperature=0.0, max_tokens=count, n=n, ignore_eos=True, seed=0)
        self.scheduler.add(Request(id=number, prompt_token_ids=tuple(prompt), sampling=sampling, session=session))

    def step(self) -> None:
        """Run one step.

        Raises:
            Exception: what a request ended with.
        """
        if self._chunk is not None:
            self.scheduler.config = replace(self.scheduler.config, max_step_tokens=self._chunk())
        plan = self.scheduler.schedule(0.0)
        for update in self.scheduler.update(self._executor.collect(self._executor.submit(plan))):
            if update.error is not None:
                raise update.error
            made = self.tokens.setdefault((update.request_id, update.sample), [])
            made += [token.token_id for token in update.tokens]

    def run(self) -> None:
        """Run until nothing is left to do."""
        while self.scheduler.has_work():
            self.step()

    def close(self) -> None:
        """Check the books and give all memory back."""
        self.scheduler.check()
        self.store.check_integrity()
        self.store.close_all()
        self._workspace.close()


Schedule = Callable[[Subject, Sequence[int], int, int], list[list[int]]]
"""(subject, prompt, tokens to make, seed) -> one or more token lists, each of which must be the reference."""


def one_shot(subject: Subject, prompt: Sequence[int], count: int, _seed: int) -> list[list[int]]:
    """Alone, the prompt in as few steps as possible."""
    return _finish(_started(Stepper(subject, len(prompt) + count), prompt, count))


def chunked(subject: Subject, prompt: Sequence[int], count: int, seed: int) -> list[list[int]]:
    """Alone, the prompt in pieces of random sizes."""
    rng = random.Random(seed)
    return _finish(_started(Stepper(subject, len(prompt) + count, lambda: rng.randint(1, 70)), prompt, count))


def batched(subject: Subject, prompt: Sequence[int], count: int, seed: int) -> list[list[int]]:
    """Among four others of other lengths that come before and after it."""
    rng = random.Random(seed)
    stepper = Stepper(subject, 8 * (len(prompt) + count), lambda: rng.randint(8, 300))
    for number in (2, 3, 1, 4, 5):
        if number == 1:
            stepper.add(1, prompt, count)
        else:
            other = _noise(subject, rng, rng.randint(1, len(prompt)))
            stepper.add(number, other, rng.randint(1, count))
        stepper.step()
    return _finish(stepper)


def preempted(subject: Subject, prompt: Sequence[int], count: int, seed: int) -> list[list[int]]:
    """With so little memory that it must give way to an older request and be computed again."""
    rng = random.Random(seed)
    blocks = -(-len(prompt) // 64)
    other = _noise(subject, rng, len(prompt))
    # Both prompts fit with one block to spare, and both grow into another one.
    stepper = Stepper(subject, (2 * blocks + 1) * 64)
    stepper.add(2, other, min(blocks * 64 - len(prompt) + 6, count))
    stepper.add(1, prompt, count)
    made = _finish(stepper)
    if stepper.pricing.can_share and stepper.scheduler.stats().preemptions == 0:
        raise AssertionError("the schedule meant to preempt did not")
    return made


def prefix_hit(subject: Subject, prompt: Sequence[int], count: int, _seed: int) -> list[list[int]]:
    """Behind a request with the same prompt whose blocks are cached (where prefixes are shared)."""
    stepper = Stepper(subject, 3 * (len(prompt) + count))
    stepper.add(2, prompt, 3)
    stepper.run()
    stepper.add(1, prompt, count)
    made = _finish(stepper)
    if stepper.pricing.can_share and stepper.scheduler.stats().cached_prompt_tokens < len(prompt) - 64:
        raise AssertionError("the schedule meant to hit the prefix cache did not")
    return made


def forked(subject: Subject, prompt: Sequence[int], count: int, seed: int) -> list[list[int]]:
    """In a session forked in the middle of a block, while the original goes another way."""
    rng = random.Random(seed)
    cut = rng.randint(1, len(prompt) - 1)
    stepper = Stepper(subject, 4 * (len(prompt) + count))
    stepper.add(2, prompt[:cut], 0, session=SessionRef(2))
    stepper.run()
    stepper.add(1, prompt, count, session=SessionRef(1, parent=2))
    stepper.add(3, [*prompt[:cut], *_noise(subject, rng, 20)], 20, session=SessionRef(2))
    return _finish(stepper)


def rolled_back(subject: Subject, prompt: Sequence[int], count: int, seed: int) -> list[list[int]]:
    """In a session that had read and written something else behind a part of the prompt."""
    rng = random.Random(seed)
    cut = rng.randint(1, len(prompt) - 1)
    stepper = Stepper(subject, 4 * (len(prompt) + count))
    stepper.add(2, [*prompt[:cut], *_noise(subject, rng, 30)], 10, session=SessionRef(1))
    stepper.run()
    stepper.add(1, prompt, count, session=SessionRef(1))
    return _finish(stepper)


def samples(subject: Subject, prompt: Sequence[int], count: int, _seed: int) -> list[list[int]]:
    """As three greedy samples of one request."""
    stepper = Stepper(subject, 4 * (len(prompt) + count))
    stepper.add(1, prompt, count, n=3)
    made = _finish(stepper)
    if len(made) != 3:
        raise AssertionError(f"3 samples were asked for, {len(made)} came")
    return made


SCHEDULES: dict[str, Schedule] = {
    each.__name__: each for each in (one_shot, chunked, batched, preempted, prefix_hit, forked, rolled_back, samples)
}


def _started(stepper: Stepper, prompt: Sequence[int], count: int) -> Stepper:
    stepper.add(1, prompt, count)
    return stepper


def _finish(stepper: Stepper) -> list[list[int]]:
    stepper.run()
    stepper.close()
    return [tokens for (number, _), tokens in sorted(stepper.tokens.items()) if number == 1]


def _noise(subject: Subject, rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(subject.config.vocab_size) for _ in range(count)]
