"""The house: a room imports only from lower floors or itself, and no file is long."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "src" / "elbowroom"
MAX_LINES = 500

GROUND = ("core", "units", "errors", "registry")
FLOORS = (
    (*GROUND, "memory"),
    ("kernels",),
    ("kv", "weights"),
    ("models",),
    ("engine",),
    ("planner", "train", "recall", "workloads"),
    ("serve", "evals", "vision"),
    ("bench",),
    ("commands",),
    ("__init__", "__main__"),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
MODULES = sorted(str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py"))


def room_of(module: str) -> str:
    return Path(module).with_suffix("").parts[0]


def imported_names(source: str, module: str) -> Iterator[str]:
    """Yield the full names of what a module imports, lazy imports included."""
    package = ("elbowroom", *Path(module).parts[:-1])
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            yield from (".".join((*base, *filter(None, [node.module]), alias.name)) for alias in node.names)


def imported_rooms(source: str, module: str) -> set[str]:
    """Return the rooms that a module imports from; ``_native`` counts as a part of kernels."""
    names = [name.split(".") for name in imported_names(source, module)]
    rooms = {parts[1] for parts in names if parts[0] == "elbowroom" and len(parts) > 1}
    return {"kernels" if room == "_native" else room for room in rooms - {"__version__"}}


def forbidden_rooms(room: str, imported: set[str]) -> set[str]:
    """Return what ``room`` may not import; what only the package's __init__ gives is for users."""
    if room in GROUND:
        return imported - set(GROUND)
    floor = FLOOR_OF[room]
    return {other for other in imported - {room} if FLOOR_OF.get(other, len(FLOORS)) >= max(floor, 1)}


@pytest.mark.parametrize("module", MODULES)
def test_a_room_imports_only_from_lower_floors_or_itself(module: str) -> None:
    assert room_of(module) in FLOOR_OF, f"give {room_of(module)} a floor, here and in the plan of the house"
    imported = imported_rooms((PACKAGE / module).read_text(encoding="utf-8"), module)

    assert not forbidden_rooms(room_of(module), imported)


@pytest.mark.parametrize("module", MODULES)
def test_no_file_is_long(module: str) -> None:
    assert len((PACKAGE / module).read_text(encoding="utf-8").splitlines()) <= MAX_LINES


def test_the_checker_sees_every_form_of_import() -> None:
    source = "import elbowroom.serve\nfrom elbowroom import engine, __version__\nfrom .base import x\ndef f():\n"
    source += "    from elbowroom.models.base import x\n    from .. import vision\n"
    source += "    from elbowroom._native import isa\n"

    assert imported_rooms(source, "kv/imagined.py") == {"serve", "engine", "kv", "models", "vision", "kernels"}


def test_the_checker_refuses_neighbours_higher_floors_and_user_names() -> None:
    assert forbidden_rooms("kv", {"core", "memory", "kernels", "kv", "weights", "models", "LLM"}) == {
        "weights",
        "models",
        "LLM",
    }
    assert forbidden_rooms("memory", {"core", "memory", "kernels"}) == {"kernels"}
    assert forbidden_rooms("units", {"errors", "memory"}) == {"memory"}
