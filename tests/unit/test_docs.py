"""Documentation that cannot drift: help pages, module lists, links and the README's commands are those of the code."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import typer

from elbowroom.commands import app, reference
from elbowroom.commands.reference import commands_page, with_claims

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "elbowroom"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
_LINK = re.compile(r"\[[^\]]+\]\(([^)\s]+)\)")
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def shown_commands(page: Path) -> list[str]:
    """Return every line of a shell or text block that runs elbowroom, continuation lines joined."""
    blocks = [body for kind, body in _FENCE.findall(page.read_text()) if kind in ("sh", "text")]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip().startswith("elbowroom ")]


def test_the_commands_page_is_the_help():
    assert (ROOT / "docs" / "commands.md").read_text() == commands_page(), "run: python -m elbowroom.commands.reference"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_of_claims_are_the_newest_results(page: Path):
    assert page.read_text() == with_claims(page.read_text()), "run: python -m elbowroom.commands.reference"


def test_a_benchmark_without_results_is_not_measured_yet():
    page = "<!-- claims: no-such -->\n<!-- /claims -->\n"
    assert "| no-such | not measured yet | | | |" in with_claims(page)


def test_ratios_of_rows_are_shown_with_what_they_have(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(reference, "RESULTS", tmp_path)
    rows = [
        {"ratio": "a / b", "value": 2.0},
        {"ratio": "a / best", "best": "c", "value": 3.0, "low": 1.0, "high": 4.0, "context_tokens": 64},
        {"ratio": "a / d", "value": None},
    ]
    (tmp_path / "one-two_2026-01-01.json").write_text(json.dumps({"claims": [], "rows": rows}))
    lines = with_claims("<!-- claims: one-two -->\n<!-- /claims -->\n").splitlines()[3:-1]
    assert lines == [
        "| one-two: a / b | 2 x |  | | |",
        "| one-two behind 64 tokens: a / best (c) | 3 x | 1 to 4 | | |",
    ]


def test_every_module_is_in_the_architecture():
    text = (ROOT / "docs" / "architecture.md").read_text()
    modules = [path.relative_to(SOURCE).as_posix() for path in SOURCE.rglob("*.py")]
    expected = [name for name in modules if not name.startswith(("bench/", "commands/")) and "__" not in name]
    missing = [name for name in expected if f"`{name}`" not in text]
    assert not missing, "run: python -m elbowroom.commands.reference"


def test_the_architecture_names_only_modules_that_exist():
    text = (ROOT / "docs" / "architecture.md").read_text()
    named = set(re.findall(r"`([a-z_0-9]+(?:/[a-z_0-9]+)*\.py)`", text))
    assert {name for name in named if not (SOURCE / name).is_file()} == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path):
    for target in _LINK.findall(page.read_text()):
        path, _, fragment = target.partition("#")
        if target.startswith("https://"):
            continue
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        assert not fragment or fragment in anchors(file), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_shown_commands_and_options_exist(page: Path):
    root = typer.main.get_command(app)
    for line in shown_commands(page):
        words = shlex.split(line, comments=True)[1:]
        command = root
        while words and words[0] in getattr(command, "commands", {}):
            command = command.commands[words.pop(0)]
        known = {name for param in command.params for name in (*param.opts, *param.secondary_opts)}
        used = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert used <= known | {"--help"}, line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_name_only_files_that_exist(page: Path):
    for name in re.findall(r"`((?:src|docs|tests|examples|recipes|native)/[\w./-]+)`", page.read_text()):
        if "NAME" not in name:
            assert (ROOT / name).exists(), f"{page.name}: {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_have_no_machine_paths_and_no_filler_words(page: Path):
    text = page.read_text().lower()
    assert not re.search(r"(?<![\w.])/(?:root|home|work|tmp)/", text)
    for word in ("simply", "just run", "easily", "blazing"):
        assert word not in text, word
