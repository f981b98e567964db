"""Chat templates: the variables they get, where they come from, and what they may not do."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tests.support.chat import CHATML, SPECIALS

from elbowroom.errors import RequestError, TokenizerError
from elbowroom.models import chat_sandbox
from elbowroom.models.chat import ChatTemplate
from elbowroom.models.tokenizer import Tokenizer

USER = [{"role": "user", "content": "Hi"}]


def render(source: str, messages: list[dict[str, Any]] | None = None, **options: Any) -> str:
    return ChatTemplate({"default": source}, SPECIALS).render(messages or USER, **options)


def test_messages_special_tokens_and_whitespace() -> None:
    messages = [*USER, {"role": "assistant", "content": "Oh"}]
    assert render(CHATML, messages) == "<s><|user|>Hi</s>\n!\n<|assistant|>Oh</s>\n<|assistant|>"
    assert render(CHATML, messages, add_generation_prompt=False) == "<s><|user|>Hi</s>\n!\n<|assistant|>Oh</s>\n"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ messages | tojson }}", '[{"role": "user", "content": "Hi"}]'),
        ("{{ '<é>' | tojson }}", '"<é>"'),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}", "Hi"),
        ("{{ tools is none }} {{ missing is defined }} {{ enable_thinking }}", "True False 7"),
        ("{{ 'ab' * 3 }} {{ 2 ** 5 }} {{ 3 * 4.5 }}", "ababab 32 13.5"),
        ("{% set ns = namespace(x=0) %}{% for m in messages %}{% set ns.x = ns.x + 1 %}{% endfor %}{{ ns.x }}", "1"),
    ],
)
def test_what_templates_rely_on(source: str, expected: str) -> None:
    assert render(source, enable_thinking=7) == expected


def test_the_date_is_available() -> None:
    assert re.fullmatch(r"20\d\d", render("{{ strftime_now('%Y') }}"))


def test_where_templates_come_from(tmp_path: Path) -> None:
    config = tmp_path / "tokenizer_config.json"
    assert not ChatTemplate.from_directory(tmp_path, {}).available
    config.write_text(json.dumps({"chat_template": None}))
    assert not ChatTemplate.from_directory(tmp_path, {}).available
    config.write_text(json.dumps({"chat_template": "one", "eos_token": "</s>"}))
    assert Tokenizer.from_directory(tmp_path).apply_chat_template(USER) == "one"
    named = [{"name": "default", "template": "two"}, {"name": "tool_use", "template": "three"}]
    config.write_text(json.dumps({"chat_template": named}))
    template = ChatTemplate.from_directory(tmp_path, {})
    assert template.render(USER) == "two"
    assert template.render(USER, tools=[{"type": "function"}]) == "three"
    (tmp_path / "chat_template.jinja").write_text("four")
    assert ChatTemplate.from_directory(tmp_path, {}).render(USER) == "four"


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer_config.json", b'{"chat_template": 3}'),
        ("tokenizer_config.json", b'{"chat_template": [{"name": "default"}]}'),
        ("tokenizer_config.json", b"{"),
        ("chat_template.jinja", b"\xff"),
        ("chat_template.jinja", b" " * (2**20 + 1)),
    ],
)
def test_malformed_files_are_named(tmp_path: Path, file: str, content: bytes) -> None:
    (tmp_path / file).write_bytes(content)
    with pytest.raises(TokenizerError, match=file):
        ChatTemplate.from_directory(tmp_path, {})


def test_a_model_without_template_says_so() -> None:
    with pytest.raises(TokenizerError, match="has no chat template") as error:
        ChatTemplate({}, {}).render(USER)
    assert "chat_template.jinja" in str(error.value.hint)
    with pytest.raises(TokenizerError, match="only the templates rag"):
        ChatTemplate({"rag": ""}, {}).render(USER)


def test_a_broken_template_is_found_at_its_first_use() -> None:
    template = ChatTemplate({"default": "{% for %}"}, {}, "/some/model")
    with pytest.raises(TokenizerError, match="/some/model is not valid"):
        template.render(USER)


@pytest.mark.parametrize("messages", [[], "Hi", ["Hi"], [{"content": "Hi"}], [{"role": 3}]])
def test_malformed_messages_are_refused(messages: Any) -> None:
    with pytest.raises(RequestError, match="message"):
        ChatTemplate({"default": "x"}, {}).render(messages)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].absent.deeper }}", "has no attribute 'absent'"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
    ],
)
def test_messages_that_a_template_refuses(source: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        render(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ 'x' * 10**9 }}",
        "{{ 'x' * 2000000 }}",
        "{{ [1] * 2000000 }}",
        "{{ 10 ** 10 ** 10 }}",
        "{% for i in range(1000000) %}x{% endfor %}",
        "{% for i in range(1000) %}{% for j in range(1000) %}x{% endfor %}{% endfor %}",
    ],
)
def test_templates_are_held_in(source: str) -> None:
    with pytest.raises(TokenizerError, match="was stopped"):
        render(source)


def test_prompts_have_a_longest_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_sandbox, "MAX_PROMPT_CHARS", 5)
    assert render("12345") == "12345"
    with pytest.raises(TokenizerError, match="exceeds 5 characters"):
        render("123{{ 456 }}")
