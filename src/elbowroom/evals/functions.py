"""Functions of the held-out text with what they do, as their docstrings say it."""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from elbowroom.evals.heldout import heldout_texts

MIN_LINES, MAX_LINES = 4, 40
"""Lines of a function without its docstring."""
MIN_WORDS = 6
"""Words of a description."""
_BLOCK = re.compile(
    r'^( *)def (\w+)\([^\n]*\):\n\1 +"""(.+?)"""\n((?:\1 +[^\n]+\n|[ \t]*\n)+)', re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True, slots=True)
class Function:
    """A function of the standard library."""

    name: str
    code: str
    """Its source, without docstring and indentation."""
    description: str
    """The first paragraph of its docstring as one line; does not hold the name."""


@cache
def heldout_functions() -> tuple[Function, ...]:
    """Return all functions whose descriptions say something and do not name them, each name and description once.

    They are found by their layout, file by file: a syntax tree of these files would take more memory than they do.
    """
    found: dict[str, Function] = {}
    descriptions = set[str]()
    for text in heldout_texts():
        for function in _functions(text):
            if function.name not in found and function.description not in descriptions:
                found[function.name] = function
                descriptions.add(function.description)
    return tuple(found.values())


def _functions(text: str) -> Iterator[Function]:
    for match in _BLOCK.finditer(text):
        head, body = match[0].split('"""', 1)[0], match[4]
        code = textwrap.dedent(f"{head.rstrip()}\n{body}").strip()
        description = " ".join(match[3].split("\n\n")[0].split())
        if _tells(match[2], description) and MIN_LINES <= code.count("\n") + 1 <= MAX_LINES and _is_python(code):
            yield Function(match[2], code, description)


def _tells(name: str, description: str) -> bool:
    """Return whether a description has enough words and not the name."""
    return len(description.split()) >= MIN_WORDS and name.lower() not in description.lower() and "`" not in description


def _is_python(code: str) -> bool:
    try:
        tree = ast.parse(code)
    except SyntaxError:
        return False
    return len(tree.body) == 1
