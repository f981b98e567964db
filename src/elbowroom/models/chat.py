"""Chat templates: from a list of messages to the prompt that a model was trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elbowroom.errors import RequestError, TokenizerError
from elbowroom.models.fields import Fields, read_object

if TYPE_CHECKING:
    from elbowroom.models.chat_sandbox import SandboxedTemplate

_MAX_TEMPLATE_BYTES = 2**20

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
        self._compiled: dict[str, SandboxedTemplate] = {}

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

    def mentions(self, text: str) -> bool:
        """Return whether a template holds ``text`` as it is written."""
        return any(text in template for template in self._templates.values())

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
        }
        return template.render(scope)

    def _template(self, name: str) -> SandboxedTemplate:
        from elbowroom.models.chat_sandbox import NO_TEMPLATE_HINT, SandboxedTemplate

        if name not in self._templates:
            found = (
                f"only the templates {', '.join(sorted(self._templates))}" if self._templates else "no chat template"
            )
            raise TokenizerError(f"messages were given, but {self._source} has {found}", NO_TEMPLATE_HINT)
        if name not in self._compiled:
            self._compiled[name] = SandboxedTemplate(self._templates[name], self._source)
        return self._compiled[name]


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
