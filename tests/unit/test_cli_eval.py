"""The adapter between engines and evaluations: order, progress, failures."""

from __future__ import annotations

import threading

import pytest

from elbowroom.evals.base import Reply, Sample, Turn
from elbowroom.evals.engine_target import PlainTokenizer, run_parallel


class EchoSession:
    """Answers a prompt with its last word, unless the context says otherwise."""

    def __init__(self, target: EchoTarget, context: str) -> None:
        self.target, self.context = target, context

    def ask(self, prompt: str, max_tokens: int) -> Reply:
        if self.context == "broken":
            raise RuntimeError("no answer")
        return Reply(" 999" if self.context == "wrong" else prompt.rsplit(maxsplit=1)[-1])

    def push(self, text: str) -> None:
        self.context += text

    def fork(self) -> EchoSession:
        return EchoSession(self.target, self.context)

    def close(self) -> None:
        self.target.threads.add(threading.get_ident())


class EchoTarget:
    def __init__(self) -> None:
        self.threads: set[int] = set()

    def open(self, context: str) -> EchoSession:
        return EchoSession(self, context)


def sample(number: int, context: str = "right", num_turns: int = 2) -> Sample:
    turns = tuple(
        Turn(
            prompt=f"say {number * 10 + turn}",
            target=str(number * 10 + turn),
            reference="",
            max_new_tokens=4,
            depth=turn / 10,
        )
        for turn in range(num_turns)
    )
    return Sample(id=str(number), context=context, turns=turns, num_tokens=100 + number)


def test_every_question_is_counted_and_progress_only_grows():
    moves: list[int] = []
    samples = [sample(number, "wrong" if number == 3 else "right") for number in range(7)]
    result = run_parallel(EchoTarget(), iter(samples), 3, moves.append)
    assert result.num_queries == 14
    assert result.num_correct == 12
    assert result.max_tokens == 106
    assert moves == [2, 4, 6, 8, 10, 12, 14]


def test_contexts_are_worked_on_in_other_threads():
    target = EchoTarget()
    run_parallel(target, [sample(number) for number in range(4)], 2, lambda done: None)
    assert threading.get_ident() not in target.threads


def test_samples_are_made_as_they_are_needed():
    made: list[int] = []

    def stream():
        for number in range(6):
            made.append(number)
            yield sample(number)

    def check(done: int) -> None:
        assert len(made) * 2 - done <= 2 * 3

    run_parallel(EchoTarget(), stream(), 2, check)
    assert made == list(range(6))


def test_a_failing_context_ends_the_run_with_its_error():
    with pytest.raises(RuntimeError, match="no answer"):
        run_parallel(EchoTarget(), [sample(0), sample(1, "broken"), sample(2)], 2, lambda done: None)


class CountingTokenizer:
    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [1] * add_special_tokens + [ord(letter) for letter in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


def test_tasks_count_tokens_without_special_ones():
    tokenizer = PlainTokenizer(CountingTokenizer())
    assert tokenizer.encode("ab") == [97, 98]
    assert tokenizer.decode([97]) == "a"
