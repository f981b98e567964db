"""Memory and queue over the time of a run: samples, each valid until the next one."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class Level:
    """Of bytes over time, each moment counted alike."""

    mean: float
    std: float
    most: float


@dataclass(slots=True)
class Timeline:
    """Columns of samples."""

    times_s: array[float] = field(default_factory=lambda: array("d"))
    waiting: array[int] = field(default_factory=lambda: array("q"))
    """Requests that have come and hold no memory."""
    running: array[int] = field(default_factory=lambda: array("q"))
    owners: dict[str, array[int]] = field(default_factory=dict)
    """Bytes by owner."""
    counted: tuple[str, ...] = ()
    """Owners whose bytes are the KV cache; empty: all."""

    def add(self, time_s: float, waiting: int, running: int, held: Mapping[str, int]) -> None:
        """Note how things are from ``time_s`` on; owners that are not named hold nothing."""
        count = len(self.times_s)
        self.times_s.append(time_s)
        self.waiting.append(waiting)
        self.running.append(running)
        for owner, num_bytes in held.items():
            column = self.owners.get(owner)
            if column is None:
                column = self.owners[owner] = array("q", bytes(8 * count))
            column.append(num_bytes)
        for column in self.owners.values():
            if len(column) == count:
                column.append(0)

    @property
    def kv_bytes(self) -> npt.NDArray[np.int64]:
        """Bytes of the KV cache at each sample, int64 ``[samples]``."""
        columns = [self.owners[name] for name in self.counted or self.owners if name in self.owners]
        total = np.zeros(len(self.times_s), dtype=np.int64)
        for column in columns:
            total += np.frombuffer(column, dtype=np.int64)
        return total

    def statistics(self) -> Level:
        """Return mean, standard deviation and peak of the KV cache's bytes, weighted by time."""
        values = self.kv_bytes.astype(np.float64)
        if not values.size:
            return Level(0.0, 0.0, 0.0)
        mean = self._mean(values)
        return Level(mean, max(self._mean(values**2) - mean**2, 0.0) ** 0.5, float(values.max()))

    @property
    def mean_waiting(self) -> float:
        """Requests that wait, weighted by time."""
        return self._mean(np.frombuffer(self.waiting, dtype=np.int64).astype(np.float64)) if self.waiting else 0.0

    def _mean(self, values: npt.NDArray[np.float64]) -> float:
        """Each sample lasts until the next one; the last, which ends the run, has no length."""
        spans = np.diff(np.frombuffer(self.times_s, dtype=np.float64))
        total = float(spans.sum())
        return float((values[:-1] * spans).sum()) / total if total > 0 else float(values.mean())
