"""Sentences of the synthetic tasks, shared by evaluation and training so that both speak the same language."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

KEY_LETTERS = 6
VALUE_DIGITS = 6
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True, slots=True)
class FactForm:
    """One wording of a keyed fact; the prompt is the wording up to the value."""

    prompt: str
    ending: str

    def fact(self, key: str, value: str) -> str:
        """Return the fact as a line without its line break."""
        return f"{self.prompt.format(key=key)} {value}{self.ending}"


SENTENCE = FactForm("The code of {key} is", ".")
COMMENT = FactForm("# {key}:", "")
ASSIGNMENT = FactForm("CODE {key} =", "")
FORMS = (SENTENCE, COMMENT, ASSIGNMENT)
"""Wordings; evaluations use SENTENCE."""

CHAT_QUESTION = "What is the code of {key}?"
VARIABLE = FactForm("VAR {key} =", "")
"""A link of a variable chain: the value is a number or another variable."""
LABELS = ("red", "blue", "green", "black", "white", "gold", "pink", "brown")
SHOT = FactForm("item {key} ->", "")
"""One example of the many-shot task: the key is a word, the value a label."""


def random_key(rng: np.random.Generator) -> str:
    """Return six random lowercase letters."""
    return "".join(LETTERS[index] for index in rng.integers(len(LETTERS), size=KEY_LETTERS))


def random_value(rng: np.random.Generator) -> str:
    """Return a random number of exactly six digits."""
    return str(rng.integers(10 ** (VALUE_DIGITS - 1), 10**VALUE_DIGITS))


def trace(names: list[str], values: list[str]) -> tuple[str, str]:
    """Return the prompt and the answer that follow a variable chain back to its number.

    Args:
        names: variables of the chain, the one that holds the number first.
        values: what each variable was assigned.
    """
    answer = f" {values[len(names) - 1]}"
    for index in reversed(range(len(names) - 1)):
        answer += f"; {VARIABLE.fact(names[index], values[index])}"
    return f"Trace: {VARIABLE.prompt.format(key=names[-1])}", answer + "."
