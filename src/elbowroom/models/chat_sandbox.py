"""Runs chat templates: programs that come with a model, so they get jinja2's immutable sandbox and limits of ours.

Loops, products and the length of the result are limited. jinja2 is imported here and nowhere else: a model without a
chat template does without it.
"""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from elbowroom.errors import RequestError, TokenizerError

MAX_PROMPT_CHARS = 64 * 2**20
"""Longest rendered prompt."""
NO_TEMPLATE_HINT = "send a plain prompt to the completions route, or add chat_template.jinja to the model directory"
_MAX_PRODUCT = 2**20
_MAX_ITERATIONS = 100_000


class SandboxedTemplate:
    """One chat template, compiled.

    Args:
        text: jinja2 source.
        source: where it came from, for error messages.

    Raises:
        TokenizerError: the source is not valid.
    """

    def __init__(self, text: str, source: str) -> None:
        self._source = source
        try:
            self._template = _environment().from_string(text)
        except (jinja2.TemplateError, RecursionError) as reason:
            raise TokenizerError(f"the chat template of {source} is not valid: {reason}", NO_TEMPLATE_HINT) from reason

    def render(self, variables: Mapping[str, object]) -> str:
        """Return what the template makes of ``variables``; ``range`` is ours.

        Raises:
            TokenizerError: the template exceeds a limit or leaves the sandbox.
            RequestError: it refuses the messages, or fails on them.
        """
        try:
            return _joined(self._template.generate({**variables, "range": _Range()}))
        except SecurityError as reason:
            raise TokenizerError(f"the chat template of {self._source} was stopped: {reason}") from reason
        except jinja2.TemplateError as reason:
            raise RequestError(f"the chat template refuses the messages: {reason}", "correct the messages") from reason
        except (ArithmeticError, LookupError, TypeError, ValueError, AttributeError, RecursionError) as reason:
            raise RequestError(
                f"the chat template fails on the messages: {type(reason).__name__}: {reason}",
                "give each message a role and a content of the kind that the model expects",
            ) from reason


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, with products kept small: ``'x' * 10**9`` would be a memory bomb."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        numbers = [value if isinstance(value, int | float) else len(value) for value in (left, right)]
        if any(abs(number) > _MAX_PRODUCT for number in numbers) or (operator == "**" and abs(numbers[1]) > 64):
            raise SecurityError(f"the operands of {operator} are too large")
        if operator == "*" and numbers[0] * numbers[1] > _MAX_PRODUCT and not isinstance(left, int | float):
            raise SecurityError("a repeated sequence is too long")
        return super().call_binop(context, operator, left, right)


class _Range:
    """``range`` for one rendering: all loops over it together have a limited number of turns."""

    def __init__(self) -> None:
        self._left = _MAX_ITERATIONS

    def __call__(self, *bounds: int) -> range:
        numbers = range(*bounds)
        self._left -= len(numbers)
        if self._left < 0:
            raise SecurityError(f"its loops take more than {_MAX_ITERATIONS} turns")
        return numbers


class _Generation(Extension):
    """``{% generation %} ... {% endgeneration %}`` marks the assistant's text for training; here it is only text."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it as a plain set)

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> _Environment:
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(value: object, indent: int | None = None, **options: Any) -> str:
    """JSON as models were trained on it: no HTML escapes, no ASCII escapes."""
    return json.dumps(value, ensure_ascii=options.pop("ensure_ascii", False), indent=indent, **options)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return dt.datetime.now().astimezone().strftime(pattern)


def _joined(pieces: Iterator[str]) -> str:
    parts: list[str] = []
    length = 0
    for piece in pieces:
        length += len(piece)
        if length > MAX_PROMPT_CHARS:
            raise SecurityError(f"the prompt exceeds {MAX_PROMPT_CHARS} characters")
        parts.append(piece)
    return "".join(parts)
