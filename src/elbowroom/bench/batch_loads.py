"""Loads of the ``batch`` benchmark: documents with questions, few-shot tasks, conversations; lines shuffled."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

NEW_TOKENS = 16
Prompt = list[int]


def documents(ids: Callable[[int], Prompt], rng: random.Random, shrink: int) -> Iterator[Prompt]:
    """Yield 40 documents with 25 questions each (fewer when shrunk)."""
    for _ in range(40 // shrink):
        document = ids(rng.randint(256, 512))
        yield from (document + ids(rng.randint(12, 36)) for _ in range(25))


def few_shot(ids: Callable[[int], Prompt], rng: random.Random, shrink: int) -> Iterator[Prompt]:
    """Yield 8 tasks of 25 questions: one instruction for all, examples for each task."""
    instruction = ids(90)
    for _ in range(max(8 // shrink, 2)):
        examples = instruction + ids(rng.randint(250, 400))
        yield from (examples + ids(rng.randint(12, 36)) for _ in range(25))


def turns(ids: Callable[[int], Prompt], rng: random.Random, shrink: int) -> Iterator[Prompt]:
    """Yield the turns of 25 conversations, each the whole conversation so far (the answers are known)."""
    system = ids(70)
    for _ in range(25 // shrink):
        said = system
        for _ in range(8):
            said = said + ids(rng.randint(20, 90))
            yield said


LOADS = {"documents": documents, "few-shot": few_shot, "turns": turns}
LONGEST_DOCUMENT = 512


def prompts(load: str, vocab_size: int, seed: int, shrink: int) -> list[Prompt]:
    """Return the prompts of a load, in random order."""
    rng = random.Random(f"{load} {seed}")

    def ids(count: int) -> Prompt:
        return [rng.randrange(5, vocab_size) for _ in range(count)]

    made = list(LOADS[load](ids, rng, shrink))
    rng.shuffle(made)
    return made


def write_lines(path: Path, made: list[Prompt], spread: int = 1) -> None:
    """Write prompts as a batch; answers have ``NEW_TOKENS``, or up to ``spread - 1`` more."""
    with path.open("w", encoding="utf-8") as file:
        for number, prompt in enumerate(made):
            body = {
                "prompt": prompt,
                "max_tokens": NEW_TOKENS + 7 * number % spread,
                "temperature": 0,
                "ignore_eos": True,
            }
            line = {"custom_id": f"request-{number}", "method": "POST", "url": "/v1/completions", "body": body}
            file.write(json.dumps(line) + "\n")


def read_answers(path: Path) -> list[tuple[str, str]]:
    """Return id and text of every line of an output."""
    with path.open(encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    return [(line["custom_id"], line["response"]["body"]["choices"][0]["text"]) for line in lines]
