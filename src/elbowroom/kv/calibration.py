"""Calibration: what was measured once of a model for the KV plans that ask for it, stored beside its weights.

``elbowroom calibrate`` makes the file; the engine reads it when a plan's policy needs it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from elbowroom.core import LayerSpec
from elbowroom.errors import ConfigError, PlanError

FILE = "kv_calibration.json"
_VERSION = 1
_DIGITS = 4
_SUM_TOLERANCE = 0.01
_FIX = "measure it again: elbowroom calibrate MODEL"

Row = tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """How a calibration was made."""

    contexts: int
    """Contexts with facts that were read."""
    runs: int
    """Questions about them."""
    successes: int
    """Questions that were answered; the others count nowhere."""
    longest_tokens: int
    """Tokens of the longest context."""
    key_tokens: int
    """Tokens of plain text whose keys were measured."""
    text: str
    """Hash of that text, which is also what stands around the facts."""
    dtype: str
    """Of weights, keys and values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Scores of heads and layers of one model; numbers have four digits.

    Layers with a sliding window have scores and errors of 0: no policy chooses from them.
    """

    model: str
    """Fingerprint of the weights, hexadecimal."""
    measured: Measurement
    layer_errors: Row
    """``[layers]``: what attention loses with 32 tokens, summing to 1 (CompressKV, arXiv 2508.02401, offline)."""
    head_scores: tuple[Row, ...]
    """``[layers][Hq]``: attention to the whole of a fact while a query head's model repeats it."""
    copy_scores: tuple[Row, ...]
    """``[layers][Hq]``: how often a query head looks first at the very token that is written next."""
    key_rms: tuple[tuple[Row, ...], ...]
    """``[layers][Hkv][Dk]``: root mean square of each channel of the rotated keys over plain text."""

    @classmethod
    def load(cls, directory: Path) -> Calibration | None:
        """Return the calibration in ``directory``, or None where there is none.

        Raises:
            ConfigError: the file is no calibration.
        """
        path = directory / FILE
        if not path.is_file():
            return None
        try:
            return _from_json(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as reason:
            raise ConfigError(f"{path} is no calibration: {reason!r}", _FIX) from reason

    def save(self, directory: Path) -> Path:
        """Write the file, whole or not at all, and return its path.

        Raises:
            OSError: the directory cannot be written to.
        """
        path = directory / FILE
        draft = directory / f"{FILE}.new"
        try:
            draft.write_text(self.to_text(), encoding="utf-8")
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
        return path

    def to_text(self) -> str:
        """Return the file's text: one line for each row of numbers."""
        parts = [f'"version": {_VERSION}']
        for field in fields(self):
            value = getattr(self, field.name)
            parts.append(f'"{field.name}": {_lines(asdict(value) if isinstance(value, Measurement) else value)}')
        return "{\n" + ",\n".join(parts) + "\n}\n"

    def check(self, layers: Sequence[LayerSpec]) -> None:
        """Refuse a calibration of a model of another shape.

        Raises:
            PlanError: names the first layer that differs.
        """
        if len(self.layer_errors) != len(layers):
            raise PlanError(f"the calibration has {len(self.layer_errors)} layers, the model {len(layers)}", _FIX)
        for index, (heads, keys, spec) in enumerate(zip(self.head_scores, self.key_rms, layers, strict=True)):
            found = (len(heads), len(keys), len(keys[0]))
            expected = (spec.num_q_heads, spec.num_kv_heads, spec.head_dim)
            if found != expected:
                raise PlanError(
                    f"layer {index} has (query heads, KV heads, width) {found} in the calibration, {expected} in the "
                    "model",
                    _FIX,
                )


def rounded(values: Sequence[float]) -> Row:
    """Return ``values`` with as many digits as a calibration keeps."""
    return tuple(float(f"{value:.{_DIGITS}g}") for value in values)


def _lines(value: object) -> str:
    """Return JSON in which lists of lists have a line for each inner list."""
    if isinstance(value, tuple) and value and isinstance(value[0], tuple):
        return "[\n" + ",\n".join(_lines(each) for each in value) + "\n]"
    return json.dumps(value, allow_nan=False)


def _from_json(value: dict[str, Any]) -> Calibration:
    if value["version"] != _VERSION:
        raise ValueError(f"version {value['version']}, expected {_VERSION}")
    made = Calibration(
        model=str(value["model"]),
        measured=Measurement(**value["measured"]),
        layer_errors=_row(value["layer_errors"]),
        head_scores=tuple(map(_row, value["head_scores"])),
        copy_scores=tuple(map(_row, value["copy_scores"])),
        key_rms=tuple(tuple(map(_row, layer)) for layer in value["key_rms"]),
    )
    num_layers = len(made.layer_errors)
    if not num_layers == len(made.head_scores) == len(made.copy_scores) == len(made.key_rms) > 0:
        raise ValueError("its parts disagree on the number of layers")
    if [len(row) for row in made.head_scores] != [len(row) for row in made.copy_scores]:
        raise ValueError("its scores disagree on the number of query heads")
    if not all(layer and all(len(head) == len(layer[0]) > 0 for head in layer) for layer in made.key_rms):
        raise ValueError("its key_rms disagree on the width of keys")
    if abs(math.fsum(made.layer_errors) - 1) > _SUM_TOLERANCE:
        raise ValueError(f"layer_errors sum to {math.fsum(made.layer_errors):g}, expected 1")
    return made


def _row(values: list[float]) -> Row:
    """Return finite numbers of at least 0."""
    row = tuple(float(value) for value in values)
    if not all(0 <= value < math.inf for value in row):
        raise ValueError("a number is negative or not finite")
    return row
