"""decode8: tokens a second of eight streams together, against transformers (one batch) and llama.cpp (eight sequences).

As ``decode``. Ours gets eight requests at once; what counts is the time in which all eight decode.
"""

from __future__ import annotations

from elbowroom.bench.base import BenchOptions, BenchResult
from elbowroom.bench.decode import measure

NUM_STREAMS = 8
TARGETS = {"transformers": 2.0, "llamacpp": 1.5}


def run(options: BenchOptions) -> BenchResult:
    """Measure five rounds (quick: two, of a small model)."""
    return measure("decode8", NUM_STREAMS, TARGETS, options)
