"""Registry: names to lazily imported implementations."""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction

import pytest

from elbowroom.errors import ElbowroomError, PlanError
from elbowroom.registry import Registry


def test_get_imports_and_returns_the_attribute():
    """A name gives the object its path names."""
    registry: Registry[type] = Registry("number", {"fraction": "fractions:Fraction"})
    assert registry.get("fraction") is Fraction


def test_unknown_name_lists_the_known_ones_in_order():
    """The error names the kind and what was asked, and its hint lists all names, sorted."""
    registry: Registry[object] = Registry("codec", {"b": "x:y", "a": "x:y"})
    with pytest.raises(PlanError) as caught:
        registry.get("zip")
    assert "unknown codec 'zip'" in caught.value.message
    assert caught.value.hint == "choose one of: a, b"
    assert list(registry.names()) == ["a", "b"]


def test_name_is_taken_once_and_added_names_are_found():
    """add makes a name known; a second add of it is refused and keeps the first."""
    registry: Registry[type] = Registry("number", {})
    registry.add("fraction", "fractions:Fraction")
    with pytest.raises(PlanError, match="twice"):
        registry.add("fraction", "decimal:Decimal")
    assert registry.get("fraction") is Fraction


def test_registries_do_not_share_their_paths():
    """A registry copies the table it is given."""
    paths = {"a": "fractions:Fraction"}
    registry: Registry[type] = Registry("number", paths)
    registry.add("b", "fractions:Fraction")
    assert paths == {"a": "fractions:Fraction"}


def test_nothing_is_imported_before_it_is_asked_for():
    """Making and listing a registry imports none of its modules."""
    script = (
        "import sys; from elbowroom.registry import Registry; r = Registry('x', {'w': 'wave:open'}); list(r.names()); "
        "before = 'wave' in sys.modules; r.get('w'); print(before, 'wave' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["False", "True"]


def test_errors_show_message_and_hint():
    """An error prints its message and, behind it, the setting that fixes it."""
    assert str(ElbowroomError("no room", "raise memory=")) == "no room\nhint: raise memory="
    assert str(ElbowroomError("no room")) == "no room"
