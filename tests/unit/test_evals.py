"""Evaluation tasks: sizes, depths, scoring against targets whose score is known."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Self

import pytest

from elbowroom.evals import facts, samples
from elbowroom.evals.base import Reply, score_reply
from elbowroom.evals.bits_per_byte import bits_per_byte
from elbowroom.evals.retrieval import run
from elbowroom.evals.stats import wilson_interval


class WordTokenizer:
    """Splits into words, single digits and other characters; enough to count tokens."""

    def encode(self, text: str) -> list[int]:
        return [hash(piece) for piece in re.findall(r"[a-zA-Z_]+|.|\n", text)]

    def decode(self, token_ids: list[int]) -> str:
        raise NotImplementedError


@dataclass
class RegexSession:
    """Answers by looking the key up in everything read so far; a perfect model of the retrieval tasks."""

    text: str
    closed: list[str]

    def ask(self, prompt: str, max_tokens: int) -> Reply:
        key = re.findall(r"code of ([a-z]{6})", prompt)[-1]
        found = re.search(rf"The code of {key} is (\d+)", self.text)
        reply = f" {found.group(1) if found else 0}"
        self.text += prompt + reply
        return Reply(reply)

    def push(self, text: str) -> None:
        self.text += text

    def fork(self) -> Self:
        return type(self)(self.text, self.closed)

    def close(self) -> None:
        self.closed.append(self.text)


class RegexTarget:
    """Reads the last ``visible`` characters of a context only."""

    def __init__(self, visible: int) -> None:
        self.visible = visible
        self.closed: list[str] = []

    def open(self, context: str) -> RegexSession:
        return RegexSession(context[-self.visible :], self.closed)


@pytest.mark.parametrize("make", [samples.retrieval, samples.chat, samples.follow_ups])
def test_perfect_target_scores_one(make: object) -> None:
    assert callable(make)
    spec = samples.TaskSpec(context_tokens=512, num_queries=40, num_facts=4)
    target = RegexTarget(visible=10**9)
    result, outcomes = run(target, make(WordTokenizer(), spec))
    assert result.accuracy == 1.0
    assert result.num_queries == len(outcomes) == 40
    assert result.max_tokens <= 512
    assert len(target.closed) == 10 if make is samples.follow_ups else 50


def test_depths_cover_every_tenth_and_show_what_a_window_loses() -> None:
    spec = samples.TaskSpec(context_tokens=2048, num_queries=200)
    result, _ = run(RegexTarget(visible=1800), samples.retrieval(WordTokenizer(), spec))
    assert all(part.num_queries >= 10 for part in result.by_depth)
    assert result.by_depth[0].accuracy == 0.0
    assert result.by_depth[9].accuracy == 1.0
    assert 0.1 < result.accuracy < 0.9


def test_contexts_are_full_and_differ() -> None:
    spec = samples.TaskSpec(context_tokens=1024, num_queries=12, num_facts=4)
    made = list(samples.retrieval(WordTokenizer(), spec))
    assert len({sample.context for sample in made}) == 3
    assert all(900 < sample.num_tokens <= 1024 for sample in made)
    for sample in made:
        assert len(re.findall(r"^The code of [a-z]{6} is \d{6}\.$", sample.context, re.MULTILINE)) == 4
    assert made == list(samples.retrieval(WordTokenizer(), spec))


def test_chains_assign_before_use_and_trace_to_the_number() -> None:
    spec = samples.TaskSpec(context_tokens=512, num_queries=8, num_facts=2, hops=2)
    for sample in samples.chains(WordTokenizer(), spec):
        values = dict(re.findall(r"^VAR ([a-z]{6}) = (\w+)$", sample.context, re.MULTILINE))
        for turn in sample.turns:
            name = turn.prompt.split()[-2]
            assert values[values[name]] == turn.target == score_reply(turn.reference, turn.target).answer


def test_many_shot_targets_are_in_the_context() -> None:
    spec = samples.TaskSpec(context_tokens=512, num_queries=8, num_facts=8)
    for sample in samples.many_shot(WordTokenizer(), spec):
        for turn in sample.turns:
            assert f"{turn.prompt} {turn.target}\n" in sample.context + "\n"


def test_too_many_facts_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        next(iter(samples.retrieval(WordTokenizer(), samples.TaskSpec(context_tokens=64, num_facts=16))))


@pytest.mark.parametrize(
    ("text", "target", "value"),
    [(" 482135", "482135", 1.0), (" 4821355", "482135", 0.0), ("", "482135", 0.0), (" red\n", "red", 1.0)],
)
def test_scores_are_exact(text: str, target: str, value: float) -> None:
    assert score_reply(text, target).value == value


def test_wilson_interval_matches_published_values() -> None:
    low, high = wilson_interval(8, 10)
    assert (low, high) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert wilson_interval(10, 10)[1] == 1.0


def test_uniform_bytes_cost_eight_bits() -> None:
    class Bytes:
        def encode(self, text: str) -> list[int]:
            return list(text.encode("utf-8"))

        def decode(self, token_ids: list[int]) -> str:
            return bytes(token_ids).decode("utf-8")

    result = bits_per_byte(lambda ids: [-math.log(256)] * (len(ids) - 1), Bytes(), 64, 10, ["def f(): pass\n" * 100])
    assert result.bits_per_byte == pytest.approx(8.0)
    assert result.num_tokens == result.num_bytes == 630


def test_trace_of_a_chain_reads_as_text() -> None:
    assert facts.trace(["aaaaaa", "bbbbbb"], ["123456", "aaaaaa"]) == (
        "Trace: VAR bbbbbb =",
        " aaaaaa; VAR aaaaaa = 123456.",
    )
