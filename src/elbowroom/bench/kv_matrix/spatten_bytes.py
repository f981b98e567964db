"""[spatten.bytes]: does our counter of bytes read give the reductions of SpAtten's public traces, to the digit?

The traces (mit-han-lab/spatten, MIT) say how many keys and values each head fetched in each step, and in how many bits.
GPT-2 small on WikiText-2 prunes tokens, values and bits; GPT-2 medium on PTB prunes nothing and is the dense control.
The repository has a third one, GPT-2 medium on WikiText-2 with pruned heads: it is counted where it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from elbowroom.bench.base import BenchOptions, Row
from elbowroom.bench.kv_matrix.part import Part, claimed
from elbowroom.bench.shared_data import DATA
from elbowroom.kv.read_trace import ReadTrace, read_trace

NAME = "spatten.bytes"
CLAIM = claimed(NAME, "<=", 0.0, "reductions that differ in a published digit")
ELEMENTS, DECODE, BITS_32, BITS_16 = "elements", "elements, decode steps", "bits against 32", "bits against 16"
EXPECTED: Mapping[str, Mapping[str, str]] = {
    "summary-gpt2-small-wikitext2-per8.csv": {ELEMENTS: "6.04", DECODE: "6.59", BITS_32: "28.9", BITS_16: "14.4"},
    "summary-gpt2-medium-ptb-per0.csv": {ELEMENTS: "1.00", DECODE: "1.00", BITS_32: "1.00", BITS_16: "1.00"},
}
"""Reductions by trace, as many digits as are known; a dense one is 1 whatever it is compared with."""
OPTIONAL: Mapping[str, Mapping[str, str]] = {
    "summary-gpt2-medium-wikitext2-per0-hp-step5+dedic+glob_p+local_p+hp+topk+quant.csv": {
        ELEMENTS: "3.10",
        DECODE: "3.19",
        BITS_32: "8.96",
        BITS_16: "4.48",
    },
}


def measure(_options: BenchOptions, directory: Path | None = None) -> Part:
    """Count every trace that is in ``directory`` (default: ``spatten`` of the shared data)."""
    folder = DATA / "spatten" if directory is None else directory
    missing = [name for name in EXPECTED if not (folder / name).is_file()]
    if missing:
        reason = f"no {', '.join(missing)} in {folder} (set ELBOWROOM_DATA)"
        return Part([], [replace(CLAIM, reason=reason)])
    rows = [
        row
        for name, figures in (*EXPECTED.items(), *OPTIONAL.items())
        if (folder / name).is_file()
        for row in _rows(name, read_trace(folder / name), figures)
    ]
    wrong = [row for row in rows if not row["equal"]]
    absent = [name for name in OPTIONAL if not (folder / name).is_file()]
    notes = [f"{row['trace']}, {row['figure']}: {row['value']} instead of {row['expected']}" for row in wrong]
    claim = replace(
        CLAIM,
        value=float(len(wrong)),
        num_runs=len(rows),
        reason="; ".join([*notes, *(f"not there, not counted: {name}" for name in absent)]),
    )
    return Part(list[Row](rows), [claim])


def _rows(name: str, trace: ReadTrace, figures: Mapping[str, str]) -> Iterator[dict[str, object]]:
    """Yield a row for each figure; its ``value`` is what the counter says, unrounded."""
    half, full = trace.count(16), trace.count(32)
    found = {
        ELEMENTS: half.element_ratio,
        DECODE: trace.count(16, decode_only=True).element_ratio,
        BITS_32: full.byte_ratio,
        BITS_16: half.byte_ratio,
    }
    for figure, expected in figures.items():
        digits = len(expected.partition(".")[2])
        yield {
            "claim": NAME,
            "trace": name,
            "run": trace.run,
            "figure": figure,
            "value": found[figure],
            "expected": expected,
            "equal": f"{found[figure]:.{digits}f}" == expected,
            "bytes_read": half.bytes,
            "refetch_rate": half.refetch_rate,
        }
