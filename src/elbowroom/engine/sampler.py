"""Sampling: from logits to tokens, one row a sequence.

Randomness is keyed by (seed, sample, position), so a token depends on its own request only: never on the batch, the
chunking, a preemption or a cache hit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from elbowroom.engine.drawing import BROKEN, Draw, backend
from elbowroom.engine.sampling_params import SamplingParams
from elbowroom.engine.thinking import ThinkingTracker
from elbowroom.engine.types import SampledToken, SampleSpec
from elbowroom.errors import ModelError
from elbowroom.models.thinking import ThinkingMarks


@dataclass(slots=True)
class SlotSampler:
    """Sampling state of one slot: its parameters and, for penalties, the tokens seen."""

    params: SamplingParams
    seed: int
    sample: int
    position: int
    """Tokens before the next one: its position."""
    num_prompt: int = 0
    """Of them, those of the prompt."""
    last_token: int = 0
    prompt: frozenset[int] = frozenset()
    output: Counter[int] = field(default_factory=Counter)
    thinking: ThinkingTracker | None = None
    """Set where thinking is limited."""
    draw: Draw = field(init=False)
    has_penalties: bool = field(init=False)
    changes_logits: bool = field(init=False)

    def __post_init__(self) -> None:
        """Derive what is asked for at every token."""
        self.draw = Draw.of(self.params, self.seed, self.sample)
        self.has_penalties = self.params.has_penalties
        self.changes_logits = self.has_penalties or bool(self.params.logit_bias)

    @classmethod
    def start(cls, spec: SampleSpec, marks: ThinkingMarks | None = None) -> SlotSampler:
        """Return the state for a slot whose tokens so far are ``spec.history``; ``marks`` are those of the model."""
        assert spec.history is not None
        history = spec.history
        made = cls(spec.params, spec.seed, spec.sample, len(history), spec.num_prompt_tokens)
        if spec.params.has_penalties:
            made.prompt = frozenset(history[: spec.num_prompt_tokens])
            made.output = Counter(history[spec.num_prompt_tokens :])
        made.thinking = ThinkingTracker.limited(marks, spec)
        return made

    def chosen(self, drawn: int) -> int:
        """Return the next token: a forced one, the end of thinking where that is due, or the one that was drawn."""
        forced, number = self.params.forced, self.position - self.num_prompt
        if number < len(forced):
            return forced[number]
        due = None if self.thinking is None else self.thinking.due()
        return drawn if due is None else due

    def accept(self, token: int) -> None:
        """Take in a chosen token."""
        self.last_token = token
        self.position += 1
        if self.has_penalties:
            self.output[token] += 1
        if self.thinking is not None:
            self.thinking.push(token)


def sample(logits: Tensor, slots: Sequence[SlotSampler]) -> list[SampledToken]:
    """Choose one token for every row and take it into the slot's state.

    Args:
        logits: ``[R, V]``, any float dtype; may be overwritten.
        slots: R states.

    Raises:
        ModelError: a row holds NaN or infinity, or nothing finite (the weights are broken).
    """
    rows = logits.float()
    originals: dict[int, Tensor] = {}
    for row, slot in enumerate(slots):
        if slot.changes_logits:
            if slot.params.logprobs is not None:
                originals[row] = rows[row].clone()
            _penalise(rows[row], slot)
    tokens = backend()(rows, [slot.draw for slot in slots], [slot.position for slot in slots])
    if BROKEN in tokens:
        broken = rows[tokens.index(BROKEN)].max().item()
        raise ModelError(f"the model gave the logit {broken}", "its weights are broken: check the files and reload")
    chosen: list[SampledToken] = []
    for row, (slot, drawn) in enumerate(zip(slots, tokens, strict=True)):
        token = slot.chosen(drawn)
        slot.accept(token)
        top = slot.params.logprobs
        chosen.append(SampledToken(token) if top is None else _with_logprobs(originals.get(row, rows[row]), token, top))
    return chosen


def _penalise(row: Tensor, slot: SlotSampler) -> None:
    """Apply penalties and then bias to the logits, in place."""
    params = slot.params
    seen = list(slot.prompt | slot.output.keys())
    if params.repetition_penalty != 1.0 and seen:
        picked = row[seen]
        row[seen] = torch.where(picked > 0, picked / params.repetition_penalty, picked * params.repetition_penalty)
    if slot.output:
        ids, counts = list(slot.output), torch.tensor(list(slot.output.values()), dtype=row.dtype)
        row[ids] -= params.presence_penalty + params.frequency_penalty * counts
    for token, bias in params.logit_bias.items():
        if 0 <= token < row.numel():
            row[token] += bias


def _with_logprobs(logits: Tensor, token: int, top: int) -> SampledToken:
    logprobs = torch.log_softmax(logits, dim=-1)
    values, ids = logprobs.topk(min(top, logits.numel()))
    pairs = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return SampledToken(token, float(logprobs[token]), pairs)
