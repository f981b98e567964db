"""Held-out text and facts in one pass each: what a codec costs, without decoding token by token.

The true tokens are given and every token is predicted behind those before it. Since what a query reads is a function of
its position only (a block is read sealed by all later ones), the predictions are those of decoding. All tokens of an
answer that are predicted greedily behind the true ones before them are the answer that greedy decoding writes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from elbowroom.bench.paged_logits import paged_logits
from elbowroom.engine.executors.local import StoreContext
from elbowroom.evals.base import Sample, TextTokenizer
from elbowroom.kv.base import KVStep, KVStore
from elbowroom.kv.plan import KVPlan
from elbowroom.models.decoder import Decoder
from elbowroom.models.path import ComputePath

READABLE = ComputePath(0)
_CHUNK = 256


@dataclass(frozen=True, slots=True)
class ForcedTask:
    """A token sequence, and which of its tokens are answers."""

    tokens: list[int]
    answers: dict[int, tuple[int, int]]
    """Turn -> first and end position of the tokens that a correct answer has."""


def as_forced(tokenizer: TextTokenizer, sample: Sample) -> ForcedTask:
    """Return a sample with its questions one after the other, each followed by its reference."""
    tokens, answers = tokenizer.encode(sample.context), {}
    for number, turn in enumerate(sample.turns):
        tokens = tokens + tokenizer.encode(turn.prompt)
        first = len(tokens)
        tokens = tokens + tokenizer.encode(turn.reference)
        answers[number] = first, len(tokens)
    return ForcedTask(tokens, answers)


def answered(decoder: Decoder, plan: KVPlan, tasks: Mapping[str, ForcedTask]) -> dict[tuple[str, int], float]:
    """Return, by sample and turn, 1 for each answer whose tokens are all predicted, else 0."""
    found: dict[tuple[str, int], float] = {}
    for name, task in tasks.items():
        best = paged_logits(decoder, task.tokens, _CHUNK, READABLE, plan).argmax(-1).tolist()
        for turn, (first, end) in task.answers.items():
            found[name, turn] = float(best[first - 1 : end - 1] == task.tokens[first:end])
    return found


def window_bits(
    decoder: Decoder,
    plan: KVPlan,
    tokenizer: TextTokenizer,
    windows: Sequence[list[int]],
    contexts: Callable[[KVStore, KVStep], StoreContext] = StoreContext,
) -> dict[tuple[str, int], float]:
    """Return the bits per byte of each window's second half, behind its first half; arguments as ``paged_logits``."""
    found = {}
    for number, tokens in enumerate(windows):
        half = len(tokens) // 2
        logits = paged_logits(decoder, tokens, _CHUNK, READABLE, plan, contexts)[half - 1 : -1]
        nats = float(F.cross_entropy(logits, torch.tensor(tokens[half:]), reduction="sum"))
        found["window", number] = nats / math.log(2) / len(tokenizer.decode(tokens[half:]).encode("utf-8"))
    return found
