"""Typed reading of the JSON files of a model directory.

A wrong type, a missing key or a truncated file becomes an error that names file, key, value and what was expected.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from elbowroom.errors import ConfigError, ModelError

MAX_JSON_BYTES = 16 * 2**20
"""Largest plain JSON file read (config, index); tokenizers are read by their own library."""
_RELOAD_HINT = "download the file again, or correct it by hand"


def read_object(
    path: Path, error: type[ModelError] = ConfigError, max_bytes: int = MAX_JSON_BYTES
) -> dict[str, object]:
    """Return the JSON object in the file at ``path``.

    Raises:
        ModelError: of class ``error``: missing, unreadable, larger than ``max_bytes``, not JSON, or not an object.
    """
    try:
        with path.open("rb") as file:
            text = file.read(max_bytes + 1)
    except OSError as reason:
        raise error(f"{path} cannot be read: {reason.strerror}", "give a complete model directory") from reason
    if len(text) > max_bytes:
        raise error(f"{path} is larger than {max_bytes} bytes", _RELOAD_HINT)
    return parse_object(text, str(path), error)


def parse_object(text: bytes, where: str, error: type[ModelError]) -> dict[str, object]:
    """Return the JSON object in ``text``; ``where`` names its origin in errors of class ``error``."""
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as reason:
        raise error(f"{where} is not valid JSON ({reason})", _RELOAD_HINT) from reason
    if not isinstance(value, dict):
        raise error(f"{where} holds a JSON {type(value).__name__}, expected an object", _RELOAD_HINT)
    return value


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key occurs twice in one object")
    return values


class Fields:
    """The keys of one JSON object, read by type.

    Args:
        values: the object.
        where: file (and section) for error messages.
        defaults: values of omitted keys.
        error: class of the errors raised.
    """

    def __init__(
        self,
        values: Mapping[str, object],
        where: str,
        defaults: Mapping[str, object] | None = None,
        error: type[ModelError] = ConfigError,
    ) -> None:
        self.values, self.where, self.error = values, where, error
        self._defaults: Mapping[str, object] = defaults or {}

    def __contains__(self, key: str) -> bool:
        return self.get(key) is not None

    def get(self, key: str) -> object:
        """Return the raw value: as written (null included), else the default, else None."""
        return self.values[key] if key in self.values else self._defaults.get(key)

    def wrong(self, key: str, expected: str, hint: str | None = None) -> ModelError:
        """Return the error for a value of ``key`` that is not what was ``expected``."""
        value = repr(self.get(key))
        shown = value if len(value) <= 80 else f"{value[:77]}..."
        return self.error(f"{self.where}: {key} is {shown}, expected {expected}", hint or _RELOAD_HINT)

    def integer(self, key: str, low: int = 1, high: int = 2**31) -> int:
        """Return a whole number from ``low`` to ``high``; null means the default."""
        value = self._required(key)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.wrong(key, f"a whole number from {low} to {high}")
        return value

    def optional_integer(self, key: str) -> int | None:
        """Return a positive whole number, or None for null."""
        return None if self.get(key) is None else self.integer(key)

    def number(self, key: str, low: float = 0.0) -> float:
        """Return a finite number above ``low``; null means the default."""
        value = self._required(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low < value < math.inf:
            raise self.wrong(key, f"a finite number above {low:g}")
        return float(value)

    def optional_number(self, key: str) -> float | None:
        """Return a finite positive number, or None for null."""
        return None if self.get(key) is None else self.number(key)

    def flag(self, key: str) -> bool:
        """Return true or false; null means the default."""
        value = self._required(key)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def text(self, key: str) -> str:
        """Return a string; null means the default."""
        value = self._required(key)
        if not isinstance(value, str):
            raise self.wrong(key, "a string")
        return value

    def strings(self, key: str) -> list[str]:
        """Return a list of strings, empty for null."""
        value = self.get(key) or []
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.wrong(key, "a list of strings")
        return value

    def section(self, key: str) -> Fields:
        """Return a nested object, empty for null."""
        value = self.get(key)
        if value is None:
            value = {}
        if not isinstance(value, dict):
            raise self.wrong(key, "an object")
        return Fields(value, f"{self.where}: {key}", error=self.error)

    def token_ids(self, key: str) -> tuple[int, ...]:
        """Return token ids written as one number or a list, empty for null."""
        value = self.get(key)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if not all(isinstance(item, int) and not isinstance(item, bool) for item in ids):
            raise self.wrong(key, "a token id or a list of token ids")
        return tuple(ids)

    def _required(self, key: str) -> object:
        value = self.get(key)
        value = self._defaults.get(key) if value is None else value
        if value is None:
            raise self.error(f"{self.where}: {key} is missing", _RELOAD_HINT)
        return value
