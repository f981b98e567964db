"""Generators of the context tasks: keyed facts (completion, chat, follow-ups), variable chains, many-shot labels.

Every generator yields samples whose context plus longest prompt and answer have at most ``context_tokens`` tokens,
with facts in every tenth of the depth equally often.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from elbowroom.evals import facts
from elbowroom.evals.base import Mode, Sample, TextTokenizer, Turn
from elbowroom.evals.distractors import Distractors, heldout_distractors

NUM_DECILES = 10
MANY_SHOT_QUESTIONS = 4
"""Most items of a many-shot context that are asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSpec:
    """Size of one evaluation cell."""

    context_tokens: int
    num_queries: int = 400
    """At least this many questions are asked."""
    num_facts: int = 1
    """Facts (chains) in every context; each is asked once."""
    hops: int = 1
    """Links of every variable chain."""
    seed: int = 0
    mode: Mode | None = None
    """How the questions of a context are asked; None: as the task does by itself."""

    def follow_up(self, by_itself: bool = False) -> bool:
        """Return whether questions follow each other in one session, which they do ``by_itself`` in some tasks."""
        return by_itself if self.mode is None else self.mode == "multi_turn"


@dataclass(frozen=True, slots=True)
class _Question:
    prompt: str
    target: str
    reference: str


def retrieval(tokenizer: TextTokenizer, spec: TaskSpec) -> Iterator[Sample]:
    """Yield contexts with keyed facts, each asked as a plain completion in its own fork."""
    return _keyed("retrieval", tokenizer, spec, _completion)


def chat(tokenizer: TextTokenizer, spec: TaskSpec) -> Iterator[Sample]:
    """Yield contexts as the built-in model's user message, each fact asked in its own fork."""
    return _keyed("chat", tokenizer, spec, _chat, head="<|user|>")


def follow_ups(tokenizer: TextTokenizer, spec: TaskSpec) -> Iterator[Sample]:
    """Yield contexts whose facts are asked one after the other in one session."""
    return _keyed("follow_ups", tokenizer, spec, _completion, follow_up=True)


def first_seen(tokenizer: TextTokenizer, spec: TaskSpec) -> Iterator[Sample]:
    """Yield the contexts of ``follow_ups`` with the first question behind them, before anything is chosen."""
    for sample in follow_ups(tokenizer, spec):
        number = sample.id.rpartition("-")[2]
        yield replace(sample, id=f"first_seen-{number}", first_seen=sample.follow_up)


def chains(tokenizer: TextTokenizer, spec: TaskSpec) -> Iterator[Sample]:
    """Yield contexts with variable chains of ``spec.hops`` links; the last variable is traced to its number."""
    distractors, rng = heldout_distractors(tokenizer), np.random.default_rng(spec.seed)
    for number in range(-(-spec.num_queries // spec.num_facts)):
        questions, links = [], []
        for _ in range(spec.num_facts):
            names = [facts.random_key(rng) for _ in range(spec.hops)]
            values = [facts.random_value(rng), *names[:-1]]
            prompt, reference = facts.trace(names, values)
            questions.append(_Question("\n" + prompt, values[0], reference))
            links.append([facts.VARIABLE.fact(*link) for link in zip(names, values, strict=True)])
        order = rng.permutation(np.repeat(np.arange(spec.num_facts), spec.hops))
        pending = [iter(chain) for chain in links]
        lines = [next(pending[chain]) for chain in order]
        depths = sorted(rng.random(len(lines)).tolist())
        yield _sample(f"chains-{number}", distractors, rng, spec, lines, depths, questions, None)


def many_shot(tokenizer: TextTokenizer, spec: TaskSpec) -> Iterator[Sample]:
    """Yield blocks of ``spec.num_facts`` labelled items amid held-out text; up to four are asked in forks."""
    distractors, rng = heldout_distractors(tokenizer), np.random.default_rng(spec.seed)
    for number in range(-(-spec.num_queries // min(MANY_SHOT_QUESTIONS, spec.num_facts))):
        words = [facts.random_key(rng) for _ in range(spec.num_facts)]
        labels = [facts.LABELS[index] for index in rng.integers(len(facts.LABELS), size=len(words))]
        lines = [facts.SHOT.fact(*pair) for pair in zip(words, labels, strict=True)]
        depths = [float(rng.random())] * len(lines)
        asked = rng.choice(len(words), size=min(MANY_SHOT_QUESTIONS, spec.num_facts), replace=False)
        questions = [
            _Question("\n" + facts.SHOT.prompt.format(key=words[index]), labels[index], " " + labels[index])
            for index in asked
        ]
        yield _sample(f"many_shot-{number}", distractors, rng, spec, lines, depths, questions, asked.tolist())


def _completion(key: str, value: str, turn: int) -> _Question:
    opening = "\n" if turn == 0 else facts.SENTENCE.ending + "\n"
    return _Question(opening + facts.SENTENCE.prompt.format(key=key), value, " " + value)


def _chat(key: str, value: str, turn: int) -> _Question:
    opening = "\n" if turn == 0 else "<|end|><|user|>"
    question = facts.CHAT_QUESTION.format(key=key)
    return _Question(f"{opening}{question}<|end|><|assistant|>", value, facts.SENTENCE.fact(key, value))


def _keyed(
    name: str,
    tokenizer: TextTokenizer,
    spec: TaskSpec,
    ask: Callable[[str, str, int], _Question],
    head: str = "",
    follow_up: bool = False,
) -> Iterator[Sample]:
    distractors, rng = heldout_distractors(tokenizer), np.random.default_rng(spec.seed)
    follow_up = spec.follow_up(follow_up)
    deciles = _decile_stream(rng)
    for number in range(-(-spec.num_queries // spec.num_facts)):
        pairs = [(facts.random_key(rng), facts.random_value(rng)) for _ in range(spec.num_facts)]
        depths = sorted((next(deciles) + rng.random()) / NUM_DECILES for _ in pairs)
        lines = [facts.SENTENCE.fact(*pair) for pair in pairs]
        asked = rng.permutation(len(pairs)).tolist()
        questions = [
            ask(pairs[index][0], pairs[index][1], turn if follow_up else 0) for turn, index in enumerate(asked)
        ]
        yield _sample(f"{name}-{number}", distractors, rng, spec, lines, depths, questions, asked, head, follow_up)


def _decile_stream(rng: np.random.Generator) -> Iterator[int]:
    """Yield 0 .. 9 in random order, again and again."""
    while True:
        yield from rng.permutation(NUM_DECILES).tolist()


def _sample(
    name: str,
    distractors: Distractors,
    rng: np.random.Generator,
    spec: TaskSpec,
    lines: list[str],
    depths: list[float],
    questions: list[_Question],
    asked: list[int] | None,
    head: str = "",
    follow_up: bool = False,
) -> Sample:
    follow_up = spec.follow_up(follow_up)
    tails = [distractors.count(question.prompt) + distractors.count(question.reference) for question in questions]
    tail = sum(tails) if follow_up else max(tails)
    reserve = tail + (distractors.count(head) if head else 0)
    placed = distractors.place(rng, lines, depths, spec.context_tokens - reserve)
    turns = tuple(
        Turn(
            prompt=question.prompt,
            target=question.target,
            reference=question.reference,
            max_new_tokens=distractors.count(question.reference),
            depth=None if asked is None else placed.depths[asked[number]],
        )
        for number, question in enumerate(questions)
    )
    # The prompt brings the line break that ends the context.
    context = head + placed.context.rstrip("\n")
    return Sample(
        id=name,
        context=context,
        turns=turns,
        num_tokens=placed.num_tokens + reserve,
        follow_up=follow_up,
        meta={"context_tokens": spec.context_tokens, "num_facts": spec.num_facts, "seed": spec.seed},
    )
