"""Chat templates: from a list of messages to the prompt that a model was trained on.

Templates are programs that come with a model, so they run in jinja2's immutable sandbox, with limits on loops, on
products and on the length of the result.
"""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from elbowroom.errors import RequestError, TokenizerError
from elbowroom.models.fields import Fields, read_object

MAX_PROMPT_CHARS = 64 * 2**20
"""Longest rendered prompt."""
_MAX_TEMPLATE_BYTES = 2**20
_MAX_PRODUCT = 2**20
_MAX_ITERATIONS = 100_000
_NO_TEMPLATE_HINT = "send a plain prompt to the completions route, or add chat_template.jinja to the model directory"

Message = Mapping[str, Any]
"""``role`` and ``content``, and whatever else the model's template reads (``tool_calls``, ``name``)."""


class ChatTemplate:
    """The chat template, or the named templates, of one model.

    Args:
        templates: jinja2 source by name; ``default`` is used, and ``tool_use`` when tools are given.
        special_tokens: variables such as ``bos_token`` and ``eos_token``.
        source: where it came from, for error messages.
    """

    def __init__(
        self, templates: Mapping[str, str], special_tokens: Mapping[str, str], source: str = "this model"
    ) -> None:
        self._templates, self._special_tokens, self._source = dict(templates), dict(special_tokens), source
        self._compiled: dict[str, jinja2.Template] = {}

    @classmethod
    def from_directory(cls, directory: Path, special_tokens: Mapping[str, str]) -> ChatTemplate:
        """Return the template of a model directory: chat_template.jinja, else in tokenizer_config.json, else none.

        Raises:
            TokenizerError: a file is malformed.
        """
        file = directory / "chat_template.jinja"
        templates = {"default": _read_text(file)} if file.exists() else _configured(directory / "tokenizer_config.json")
        return cls(templates, special_tokens, str(directory))

    @property
    def available(self) -> bool:
        """Whether the model has a chat template."""
        return bool(self._templates)

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: object,
    ) -> str:
        """Return the prompt; its special tokens are in it, so encode it with ``add_special_tokens=False``.

        Args:
            messages: the conversation, oldest first.
            add_generation_prompt: whether to end with the header of the assistant's reply.
            tools: JSON schemas of callable functions.
            variables: further ones that the template reads, such as ``enable_thinking``.

        Raises:
            TokenizerError: there is no template, or it is not valid or not safe.
            RequestError: the messages are malformed, or the template refuses them.
        """
        _check_messages(messages)
        template = self._template("tool_use" if tools and "tool_use" in self._templates else "default")
        scope = {
            **self._special_tokens,
            **variables,
            "messages": messages,
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
            "range": _Range(),
        }
        try:
            return _joined(template.generate(scope))
        except SecurityError as reason:
            raise TokenizerError(f"the chat template of {self._source} was stopped: {reason}") from reason
        except jinja2.TemplateError as reason:
            raise RequestError(f"the chat template refuses the messages: {reason}", "correct the messages") from reason
        except (ArithmeticError, LookupError, TypeError, ValueError, AttributeError, RecursionError) as reason:
            raise RequestError(
                f"the chat template fails on the messages: {type(reason).__name__}: {reason}",
                "give each message a role and a content of the kind that the model expects",
            ) from reason

    def _template(self, name: str) -> jinja2.Template:
        if name not in self._templates:
            found = (
                f"only the templates {', '.join(sorted(self._templates))}" if self._templates else "no chat template"
            )
            raise TokenizerError(f"messages were given, but {self._source} has {found}", _NO_TEMPLATE_HINT)
        if name not in self._compiled:
            try:
                self._compiled[name] = _environment().from_string(self._templates[name])
            except (jinja2.TemplateError, RecursionError) as reason:
                raise TokenizerError(
                    f"the chat template of {self._source} is not valid: {reason}", _NO_TEMPLATE_HINT
                ) from reason
        return self._compiled[name]


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


def _check_messages(messages: Sequence[Message]) -> None:
    if isinstance(messages, str) or not messages:
        raise RequestError("messages are empty or no list", 'give a list such as [{"role": "user", "content": "Hi"}]')
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise RequestError(f"message {index} has no role", "give each message a role and a content")


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_TEMPLATE_BYTES + 1)
        if len(text) > _MAX_TEMPLATE_BYTES:
            raise TokenizerError(f"{path} is larger than {_MAX_TEMPLATE_BYTES} bytes", "download the file again")
        return text.decode()
    except (OSError, UnicodeDecodeError) as reason:
        raise TokenizerError(f"{path} cannot be read: {reason}", "download the file again") from reason


def _configured(path: Path) -> dict[str, str]:
    """Return the templates in tokenizer_config.json: one string, or a list of named ones."""
    if not path.exists():
        return {}
    fields = Fields(read_object(path, TokenizerError), str(path), error=TokenizerError)
    value = fields.get("chat_template")
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    if not isinstance(value, list):
        raise fields.wrong("chat_template", "a string or a list of named templates")
    named = [Fields(item, f"{path}: chat_template", error=TokenizerError) for item in value if isinstance(item, dict)]
    return {item.text("name"): item.text("template") for item in named}
