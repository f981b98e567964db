"""Writes what docs/ takes from the code: ``python -m elbowroom.commands.reference``.

docs/commands.md is the help of every command; the floors in docs/architecture.md are the first sentences of modules;
tables of claims, in the README too, are the newest results of the benchmarks that their markers name.
With ``--readme`` the README's first command is run and its output put below it.
"""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from elbowroom.commands import app

SOURCE = Path(__file__).parents[1]
DOCS = SOURCE.parents[1] / "docs"
RESULTS = SOURCE.parents[1] / "benchmarks" / "results"
WIDTH = 100
FLOORS = (
    ("7", ("commands",)),
    ("7, below the commands", ("bench",)),
    ("6", ("serve", "evals")),
    ("5", ("workloads",)),
    ("4", ("engine",)),
    ("3", ("models",)),
    ("2", ("kv", "weights")),
    ("1", ("kernels",)),
    ("0", ("memory", "")),
)
"""Rooms by floor, the top first; the empty name is the package itself."""
_CLAIMS = re.compile(r"(<!-- claims: ([\w -]+) -->\n).*?(<!-- /claims -->)", re.DOTALL)
_MODULES = re.compile(r"<!-- modules -->.*<!-- /modules -->", re.DOTALL)
_SHOWN = re.compile(r"(```sh\nelbowroom (.*?)\n```\n\n```text\n).*?(```)", re.DOTALL)
_HEAD = """\
# Commands

This page is the `--help` of every command; `python -m elbowroom.commands.reference` writes it.

Errors go to stderr as `error: ...` and, where there is a remedy, `hint: ...`. Exit codes: 0 success, 1 an error of
another kind, 2 wrong usage or a request that cannot be met, 3 the memory budget is too small, 4 the model directory
cannot be used, 130 interrupted.
"""


def commands_page() -> str:
    """Return docs/commands.md."""
    parts = [_HEAD]
    for path, text in _helps(typer.main.get_command(app), "elbowroom", None):
        parts.append(f"\n## {path}\n\n```text\n{text.rstrip()}\n```\n")
    return "".join(parts)


def _helps(command: Any, name: str, parent: Any) -> Iterator[tuple[str, str]]:
    """Yield path and help of a command and of those below it."""
    context = command.make_context(
        name, [], parent=parent, resilient_parsing=True, terminal_width=WIDTH, max_content_width=WIDTH
    )
    yield context.command_path, command.get_help(context)
    for below in getattr(command, "commands", {}).values():
        yield from _helps(below, below.name, context)


def modules_section() -> str:
    """Return the floors with one line a module."""
    lines = []
    for floor, rooms in FLOORS:
        for room in rooms:
            lines += [f"### Floor {floor}: `{room}/`" if room else f"### Floor {floor}: the package", ""]
            paths = sorted((SOURCE / room).glob("*.py" if not room else "**/*.py"))
            lines += [_line(path) for path in paths if path.stem not in ("__init__", "__main__")]
            lines.append("")
    return "\n".join(["<!-- modules -->", "", *lines, "<!-- /modules -->"])


def _line(path: Path) -> str:
    documentation = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    summary = " ".join(documentation.split("\n\n")[0].split()).replace("``", "`")
    return f"- `{path.relative_to(SOURCE).as_posix()}`: {summary}"


def with_claims(text: str) -> str:
    """Return a page whose tables of claims show the newest results."""
    return _CLAIMS.sub(lambda match: match[1] + "\n".join(_claim_lines(match[2].split())) + "\n" + match[3], text)


def _claim_lines(names: list[str]) -> Iterator[str]:
    yield from ("| claim | measured | interval | target | holds |", "| --- | --- | --- | --- | --- |")
    for name in names:
        newest = max(RESULTS.glob(f"{name}_*.json"), default=None)  # dated: the last by name
        if newest is None:
            yield f"| {name} | not measured yet | | | |"
            continue
        result = json.loads(newest.read_text(encoding="utf-8"))
        for claim in result["claims"]:
            low, high, value = claim["low"], claim["high"], claim["value"]
            span = "" if low is None else f"{low:.3g} to {high:.3g}"
            found = "not measured" if value is None else f"{value:.3g} {claim['unit']}"
            target, holds = f"{claim['op']} {claim['target']:g}", "yes" if claim["holds"] else "**no**"
            yield f"| `{claim['id']}` | {found} | {span} | {target} | {holds} |"
        for row in result["rows"]:
            if row.get("ratio") and row["value"] is not None:
                yield _ratio_line(name, row)


def _ratio_line(name: str, row: dict[str, Any]) -> str:
    where = f" behind {row['context_tokens']} tokens" if "context_tokens" in row else ""
    best = f" ({row['best']})" if "best" in row else ""
    span = f"{row['low']:.3g} to {row['high']:.3g}" if "low" in row else ""
    return f"| {name}{where}: {row['ratio']}{best} | {row['value']:.3g} x | {span} | | |"


def write() -> None:
    """Write all that is taken from the code."""
    for page in (DOCS.parent / "README.md", *DOCS.glob("*.md")):
        page.write_text(with_claims(page.read_text(encoding="utf-8")), encoding="utf-8")
    (DOCS / "commands.md").write_text(commands_page(), encoding="utf-8")
    page = DOCS / "architecture.md"
    text = _MODULES.sub(lambda _: modules_section(), page.read_text(encoding="utf-8"))
    page.write_text(text, encoding="utf-8")


def refresh_readme() -> None:
    """Run the README's first command and put its output below it."""

    def rerun(match: re.Match[str]) -> str:
        words = [sys.executable, "-m", "elbowroom.commands", *shlex.split(match[2].replace("\\\n", " "))]
        done = subprocess.run(words, cwd=DOCS.parent, check=True, capture_output=True, text=True)
        lines = [line.rstrip() for line in done.stdout.splitlines()]
        return match[1] + "\n".join(lines).strip("\n") + "\n" + match[3]

    page = DOCS.parent / "README.md"
    page.write_text(_SHOWN.sub(rerun, page.read_text(encoding="utf-8"), count=1), encoding="utf-8")


if __name__ == "__main__":
    write()
    if "--readme" in sys.argv:
        refresh_readme()
