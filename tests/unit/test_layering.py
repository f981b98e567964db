"""The house: a room imports only from lower floors or itself, and no file is long."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "src" / "elbowroom"
MAX_LINES = 500

FLOORS = (
    ("core", "units", "errors", "registry", "memory"),
    ("kernels", "_native"),
    ("kv", "weights"),
    ("models",),
    ("engine",),
    ("planner", "train", "recall"),
    ("serve", "evals", "vision"),
    ("commands", "bench"),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# The package's own __init__ and __main__ only re-export; they stand on the roof.
FLOOR_OF |= {"__init__": len(FLOORS), "__main__": len(FLOORS)}

MODULES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_modules(path: Path) -> Iterator[str]:
    """Yield the full names of what a module imports, lazy imports included."""
    package = ("elbowroom", *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *([node.module] if node.module else [])))
            # `from elbowroom import kernels` names a room only by what it imports.
            yield from (f"{module}.{alias.name}" for alias in node.names) if module == "elbowroom" else (module,)


def imported_rooms(path: Path) -> set[str]:
    parts = [name.split(".") for name in imported_modules(path)]
    return {part[1] for part in parts if part[0] == "elbowroom" and len(part) > 1}


def id_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


@pytest.mark.parametrize("path", MODULES, ids=id_of)
def test_a_room_imports_only_from_lower_floors_or_itself(path: Path) -> None:
    room = room_of(path)
    assert room in FLOOR_OF, f"{room} has no floor: give it one here and in the plan of the house"
    # What is no room is a name that the package itself re-exports: that is the roof.
    floors = {other: FLOOR_OF.get(other, len(FLOORS)) for other in imported_rooms(path) - {room}}
    too_high = {other for other, floor in floors.items() if floor >= FLOOR_OF[room] and FLOOR_OF[room] > 0}
    if FLOOR_OF[room] == 0:
        # The ground floor is one room for its four modules; memory/ builds on them, never the other way round.
        too_high = {other for other, floor in floors.items() if floor > 0 or other == "memory"}

    assert not too_high, f"{id_of(path)} (floor {FLOOR_OF[room]}) imports {sorted(too_high)}"


@pytest.mark.parametrize("path", MODULES, ids=id_of)
def test_no_file_is_long(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


def test_the_checker_sees_every_form_of_import(tmp_path: Path) -> None:
    source = PACKAGE / "kv" / "imagined.py"
    text = "import elbowroom.serve\nfrom elbowroom import engine\nfrom elbowroom.models.base import x\nfrom .. import vision\n"
    path = tmp_path / "imagined.py"
    path.write_text(text)
    tree_path = type("Fake", (), {"relative_to": source.relative_to, "read_text": path.read_text})()

    assert imported_rooms(tree_path) == {"serve", "engine", "models", "vision"}
