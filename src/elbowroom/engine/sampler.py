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

from elbowroom.engine.drawing import draw
from elbowroom.engine.sampling_params import SamplingParams
from elbowroom.engine.types import SampledToken, SampleSpec
from elbowroom.errors import ModelError

_MASK = 2**64 - 1


def uniform(seed: int, sample: int, position: int) -> float:
    """Return a number in [0, 1) that depends on the three keys only (SplitMix64 finaliser over their mix)."""
    x = (seed ^ (sample * 0xD1342543DE82EF95) ^ (position * 0x9E3779B97F4A7C15)) & _MASK
    for _ in range(2):
        x = (x + 0x9E3779B97F4A7C15) & _MASK
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
        x ^= x >> 31
    return (x >> 11) / 2.0**53


@dataclass(slots=True)
class SlotSampler:
    """Sampling state of one slot: its parameters and, for penalties, the tokens seen."""

    params: SamplingParams
    seed: int
    sample: int
    position: int
    """Tokens before the next one: its position."""
    last_token: int = 0
    prompt: frozenset[int] = frozenset()
    output: Counter[int] = field(default_factory=Counter)

    @classmethod
    def start(cls, spec: SampleSpec) -> SlotSampler:
        """Return the state for a slot whose tokens so far are ``spec.history``."""
        assert spec.history is not None
        history = spec.history
        made = cls(spec.params, spec.seed, spec.sample, len(history))
        if spec.params.has_penalties:
            made.prompt = frozenset(history[: spec.num_prompt_tokens])
            made.output = Counter(history[spec.num_prompt_tokens :])
        return made

    def accept(self, token: int) -> None:
        """Take in a chosen token."""
        self.last_token = token
        self.position += 1
        if self.params.has_penalties:
            self.output[token] += 1


def sample(logits: Tensor, slots: Sequence[SlotSampler]) -> list[SampledToken]:
    """Choose one token for every row and take it into the slot's state.

    Args:
        logits: ``[R, V]``, any float dtype; may be overwritten.
        slots: R states.

    Raises:
        ModelError: a row holds NaN or infinity, or nothing finite (the weights are broken).
    """
    rows = logits.float()
    highest, best = rows.max(dim=-1)  # NaN counts as the highest
    if not bool(torch.isfinite(highest).all()):
        broken = highest[~torch.isfinite(highest)][0].item()
        raise ModelError(f"the model gave the logit {broken}", "its weights are broken: check the files and reload")
    tokens = best.tolist()
    originals: dict[int, Tensor] = {}
    for row, slot in enumerate(slots):
        if slot.params.has_penalties or slot.params.logit_bias:
            if slot.params.logprobs is not None:
                originals[row] = rows[row].clone()
            _penalise(rows[row], slot)
            tokens[row] = int(rows[row].argmax())
    drawn = [row for row, slot in enumerate(slots) if not slot.params.is_greedy]
    points = [uniform(slots[row].seed, slots[row].sample, slots[row].position) for row in drawn]
    for row, token in zip(drawn, draw(rows, drawn, [slots[row].params for row in drawn], points), strict=True):
        tokens[row] = token
    for slot, token in zip(slots, tokens, strict=True):
        slot.accept(token)
    return [
        _with_logprobs(originals[row] if row in originals else rows[row], token, slot.params.logprobs)
        for row, (slot, token) in enumerate(zip(slots, tokens, strict=True))
    ]


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


def _with_logprobs(logits: Tensor, token: int, top: int | None) -> SampledToken:
    if top is None:
        return SampledToken(token)
    logprobs = torch.log_softmax(logits, dim=-1)
    values, ids = logprobs.topk(min(top, logits.numel()))
    pairs = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return SampledToken(token, float(logprobs[token]), pairs)
