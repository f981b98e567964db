"""How a reply becomes a score in [0, 1]: pure functions of the turn and the reply's text."""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Callable

from elbowroom.evals.base import Score, Turn, score_reply
from elbowroom.evals.bleu import sentence_bleu
from elbowroom.registry import Registry

Scorer = Callable[[Turn, str], Score]
SCORERS: Registry[Scorer] = Registry(
    "scorer",
    {
        "first": "elbowroom.evals.scorers:first",
        "number": "elbowroom.evals.scorers:number",
        "share": "elbowroom.evals.scorers:share",
        "function": "elbowroom.evals.scorers:function",
    },
)
MIN_BLEU = 0.8
"""BLEU from which on a reply counts as the asked function."""
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def score_turn(turn: Turn, text: str) -> Score:
    """Return the score of a reply by the scorer that the turn names."""
    return SCORERS.get(turn.scorer)(turn, text)


def first(turn: Turn, text: str) -> Score:
    """1 when the first number (lowercase word, if the answer is a word) is the answer."""
    return score_reply(text, turn.target)


def number(turn: Turn, text: str) -> Score:
    """1 when the first number equals the answer as a number (SCBench's math find)."""
    found = _NUMBER.search(text)
    answer = found.group() if found else ""
    return Score(float(found is not None and float(answer) == float(turn.target)), answer)


def share(turn: Turn, text: str) -> Score:
    """The share of answers that are substrings of the reply, both in lower case (RULER; SCBench with one answer)."""
    lower = text.lower()
    missing = [target for target in turn.targets if target.lower() not in lower]
    value = 1 - len(missing) / len(turn.targets)
    return Score(value, text.strip(), f"missing: {', '.join(missing)}" if missing else "")


def function(turn: Turn, text: str) -> Score:
    """1 when the reply's first function resembles the asked one most, with a BLEU of at least 0.8 (RepoQA, SCBench)."""
    candidate = first_function(text)
    words = candidate.split()
    bleu = sentence_bleu(turn.target.split(), words)
    nearest = max((sentence_bleu(rival.split(), words) for rival in turn.rivals), default=0.0)
    value = float(bleu >= MIN_BLEU and bleu > nearest)
    return Score(value, candidate, f"BLEU {bleu:.3f}, with another function {nearest:.3f}")


def first_function(text: str) -> str:
    """Return the first Python function of a reply, before its first code fence or inside a fenced block.

    What follows the function, and what makes it no Python because the reply was cut, is left out; a reply without a
    function is returned up to its first fence.
    """
    parts = text.split("```")
    for part in parts:
        found = _parsed_function(part.removeprefix("python"))
        if found:
            return found
    return parts[0].strip()


def _parsed_function(text: str) -> str:
    """Return the first function of the longest run of lines from the beginning that is Python; none: empty."""
    lines = textwrap.dedent(text.strip("\n")).splitlines()
    for stop in range(len(lines), 0, -1):
        try:
            tree = ast.parse("\n".join(lines[:stop]))
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        nodes = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
        node = next(nodes, None)
        return "" if node is None else "\n".join(lines[node.lineno - 1 : node.end_lineno])
    return ""
