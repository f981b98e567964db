"""What a task is: a generator of samples, how many questions it asks about a context, and one line on what it asks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from elbowroom.evals.base import Mode, Sample, TextTokenizer
from elbowroom.evals.samples import TaskSpec

Generator = Callable[[TextTokenizer, TaskSpec], Iterator[Sample]]
"""Yields samples of at most ``context_tokens`` tokens, the same for the same tokenizer and spec."""


def one_each(spec: TaskSpec) -> int:
    """Return the questions about a context: one for each fact in it."""
    return spec.num_facts


def just_one(_spec: TaskSpec) -> int:
    """Return the questions about a context: one, whatever was asked for."""
    return 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One member of the registry."""

    asks: str
    """What is asked, in one line."""
    samples: Generator
    num_questions: Callable[[TaskSpec], int] = one_each
    """Questions about each context."""
    mode: Mode = "multi_request"
    """How questions are asked unless the spec says so."""
    version: int = 1
    """Grows when the samples of a seed change; runs of different versions are not compared."""
