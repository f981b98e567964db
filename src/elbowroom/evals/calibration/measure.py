"""Measures the calibration of a model: scores of heads, errors of layers, magnitudes of keys."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from elbowroom.engine.resident import ResidentModel, model_fingerprint
from elbowroom.errors import BudgetTooSmall, ModelError, RequestError
from elbowroom.evals.calibration.errors import WINDOW, LayerErrors
from elbowroom.evals.calibration.heads import HeadScores
from elbowroom.evals.calibration.keys import KeyMagnitudes
from elbowroom.evals.calibration.needles import NUM_FACTS, Haystack, haystacks
from elbowroom.evals.calibration.reader import Reader
from elbowroom.evals.calibration.text import text_fingerprint
from elbowroom.evals.distractors import Distractors
from elbowroom.evals.engine_target import TASK_BYTES, PlainTokenizer
from elbowroom.kv.base import KVHandle
from elbowroom.kv.calibration import Calibration, Measurement, rounded
from elbowroom.models.config import ModelConfig
from elbowroom.units import format_bytes

Advance = Callable[[int, int], None]
LEAST_TOKENS = 256
"""Contexts below that say little of retrieval."""
_WINDOW_TOKENS = 2048
_CHARS_PER_TOKEN = 6
_NEW_TOKENS = 24
_ERROR_SHARE = 4
"""Layer errors are measured on so many times fewer contexts; they differ little from one to another."""
_HEAD_SEED, _ERROR_SEED = 20_250_802, 20_250_803


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured."""

    contexts: int = 16
    longest_tokens: int = 4096

    @property
    def error_contexts(self) -> int:
        """Contexts, and windows of text, on which layer errors are measured."""
        return max(self.contexts // _ERROR_SHARE, 2)

    @property
    def num_steps(self) -> int:
        """Questions and windows in all."""
        return NUM_FACTS * self.contexts + (NUM_FACTS + 1) * self.error_contexts


def tasks_bytes(config: ModelConfig, longest_tokens: int) -> int:
    """Return what is allocated beside model and store: text, its lines, and a head's keys and values in float32."""
    widest = max(3 * (spec.head_dim + spec.v_head_dim) + 4 * spec.num_q_heads for spec in config.layers)
    return TASK_BYTES + 4 * widest * min(longest_tokens, config.max_positions)


def calibrate(model: ResidentModel, text: str, effort: Effort, advance: Advance) -> Calibration:
    """Return the calibration of a model that was loaded with a plain KV plan and the readable path.

    Args:
        model: its store's memory bounds the contexts.
        text: what stands around facts, and is read by itself.
        effort: how much.
        advance: told the steps that are done and all.

    Raises:
        BudgetTooSmall: not even short contexts fit.
        ModelError: the model answers no question.
        RequestError: the text is too short.
    """
    distractors = Distractors(PlainTokenizer(model.tokenizer), [text])
    longest = _longest(model, distractors.num_tokens, effort.longest_tokens)
    reader, done = Reader(model), _Count(advance, effort.num_steps)
    contexts = spread(model, distractors, longest, effort.contexts, _HEAD_SEED)
    scores = measure_heads(reader, contexts, done)
    if scores.num_successes == 0:
        raise ModelError(
            f"the model found none of {scores.num_runs} facts in contexts of up to {longest} tokens, "
            "so which heads retrieve cannot be measured",
            "calibrate a model that can; compresskv(pick=all,budgets=uniform) needs no calibration",
        )
    semantic = scores.semantic()
    errors = [LayerErrors(reader, semantic) for _ in range(2)]
    for haystack in spread(model, distractors, longest, effort.error_contexts, _ERROR_SEED):
        _measure_errors(reader, errors[0], haystack, done)
    keys = KeyMagnitudes(model.config.layers)
    for window in _windows(model, text, min(longest, _WINDOW_TOKENS), effort.error_contexts):
        _measure_text(reader, errors[1], keys, window)
        done()
    return Calibration(
        model=model_fingerprint(model.directory).hex(),
        measured=Measurement(
            contexts=effort.contexts,
            runs=scores.num_runs,
            successes=scores.num_successes,
            longest_tokens=longest,
            key_tokens=keys.num_tokens,
            text=text_fingerprint(text),
            dtype=str(model.decoder.weights.vector("norm.weight").dtype).removeprefix("torch."),
        ),
        layer_errors=rounded(_mean_shares(errors)),
        head_scores=tuple(map(rounded, semantic)),
        copy_scores=tuple(map(rounded, scores.copying())),
        key_rms=tuple(tuple(map(rounded, layer)) for layer in keys.rms()),
    )


def measure_heads(reader: Reader, contexts: Iterator[Haystack], done: Callable[[], None]) -> HeadScores:
    """Return the scores of heads over all facts of ``contexts``."""
    scores = HeadScores(reader.model.config.layers)
    for haystack in contexts:
        with _Reading(reader, haystack) as context:
            for needle in haystack.needles:
                scores.ask(reader, context, needle)
                done()
    return scores


def _measure_errors(reader: Reader, errors: LayerErrors, haystack: Haystack, done: Callable[[], None]) -> None:
    with _Reading(reader, haystack) as context:
        for needle in haystack.needles:
            fork = reader.fork(context)
            try:
                errors.generate(fork, needle.prompt_ids, _NEW_TOKENS)
            finally:
                reader.close(fork)
            done()


def _measure_text(reader: Reader, errors: LayerErrors, keys: KeyMagnitudes, window: list[int]) -> None:
    handle = reader.open()
    try:
        reader.read(handle, window[:-WINDOW], keys.look)
        errors.generate(handle, window[-WINDOW:], _NEW_TOKENS)
    finally:
        reader.close(handle)


def _mean_shares(errors: list[LayerErrors]) -> list[float]:
    """Return the mean over kinds of text, each of which counts the same, summing to 1."""
    means = np.mean([each.shares() for each in errors], axis=0)
    return (means / math.fsum(means)).tolist()  # type: ignore[no-any-return]


def spread(model: ResidentModel, distractors: Distractors, longest: int, count: int, seed: int) -> Iterator[Haystack]:
    """Yield ``count`` contexts of evenly spread lengths up to ``longest`` tokens."""
    lengths = np.linspace(max(LEAST_TOKENS, longest // 8), longest, count).astype(int).tolist()
    return haystacks(model.tokenizer, distractors, lengths, seed)


def _windows(model: ResidentModel, text: str, num_tokens: int, count: int) -> Iterator[list[int]]:
    """Yield the tokens of windows spread evenly through the text, which is encoded in pieces: a whole takes memory."""
    for start in range(0, len(text), -(-len(text) // count)):
        piece = text[start : start + _CHARS_PER_TOKEN * num_tokens]
        window = model.tokenizer.encode(piece)[:num_tokens]
        if len(window) > WINDOW:
            yield window


def _longest(model: ResidentModel, num_tokens: int, wanted: int) -> int:
    """Return the tokens of the longest context that model, text and memory allow."""
    if num_tokens < 2 * LEAST_TOKENS:
        raise RequestError(
            f"the text has {num_tokens} tokens, at least {2 * LEAST_TOKENS} are needed", "give a longer --text"
        )
    longest = min(wanted, model.config.max_positions - _NEW_TOKENS, num_tokens // 2)
    capacity, needed = model.store.report().capacity_bytes, _needed(model, longest)
    while needed > capacity and longest > LEAST_TOKENS:
        longest = max(longest // 2, LEAST_TOKENS)
        needed = _needed(model, longest)
    if needed > capacity:
        minimum = model.memory.budget_bytes + needed - capacity
        raise BudgetTooSmall(
            f"contexts of {longest} tokens need {format_bytes(needed)} of KV cache, "
            f"there is {format_bytes(max(capacity, 0))}",
            minimum,
            f"set --memory to at least {-(-minimum // 2**20)}MiB",
        )
    return longest


def _needed(model: ResidentModel, num_tokens: int) -> int:
    """Return the KV bytes of a context, of a question in its fork, and of what a page may leave unused."""
    plan = model.store.plan
    curve = plan.curve(num_tokens, np.array([num_tokens + _NEW_TOKENS]), model.memory.max_step_tokens)
    slack = 2 * len(plan.layers) * model.arena.tier.page_bytes
    return int(curve.resident_bytes[0]) + curve.transient_bytes + 2 * plan.block_bytes + slack


class _Reading:
    """A context that was read, for the length of a block."""

    def __init__(self, reader: Reader, haystack: Haystack) -> None:
        self._reader, self._haystack = reader, haystack

    def __enter__(self) -> KVHandle:
        self._handle = self._reader.open()
        self._reader.read(self._handle, self._haystack.token_ids)
        return self._handle

    def __exit__(self, *_: object) -> None:
        self._reader.close(self._handle)


class _Count:
    """Counts steps and tells how many are done."""

    def __init__(self, advance: Advance, total: int) -> None:
        self._advance, self._done, self._total = advance, 0, total

    def __call__(self) -> None:
        self._done += 1
        self._advance(self._done, self._total)
