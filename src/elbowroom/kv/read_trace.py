"""Traces of reads in the form that SpAtten's authors published: a CSV line for each step, layer and head.

Columns as in the workloads of mit-han-lab/spatten: -1 stands for "not quantized", the last line names the run. Heads
that are pruned have no line.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from elbowroom.errors import IntegrityError, RequestError
from elbowroom.kv.read_count import HeadRead, ReadCount, count_reads

_STEP, _LAYER, _HEAD = "iteration_id", "layer_id", "head_id"


@dataclass(frozen=True, slots=True)
class ReadTrace:
    """What a model read in a run: step 0 is the prompt, the others decode a token each."""

    run: str
    """What the trace says of itself."""
    reads: tuple[HeadRead, ...]

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return 1 + max(read.layer for read in self.reads)

    @property
    def num_heads(self) -> int:
        """Heads of a layer before any was pruned."""
        return 1 + max(read.head for read in self.reads)

    def count(self, dense_bits: int, *, decode_only: bool = False) -> ReadCount:
        """Return the totals, beside a dense cache of ``dense_bits``; with ``decode_only`` without the prompt."""
        reads = [read for read in self.reads if read.step > 0 or not decode_only]
        return count_reads(reads, self.num_layers, self.num_heads, dense_bits)


def read_trace(path: Path) -> ReadTrace:
    """Read a trace.

    Raises:
        RequestError: the file is no such trace; the message names the line.
    """
    run, reads = "", []
    with path.open(newline="", encoding="utf-8") as file:
        for number, row in enumerate(csv.DictReader(file), start=2):
            if not row.get(_LAYER):
                run = row.get(_STEP) or ""
                continue
            try:
                reads.append(_head_read(row))
            except (KeyError, TypeError, ValueError, IntegrityError) as error:
                raise RequestError(f"{path}, line {number}: {error}", _HINT) from error
    if not reads:
        raise RequestError(f"{path} has no line with a step, a layer and a head", _HINT)
    return ReadTrace(run, tuple(reads))


_HINT = "give a CSV file as in spatten_hardware/hardware/workloads of mit-han-lab/spatten"


def _head_read(row: Mapping[str, str]) -> HeadRead:
    again = {"True": True, "False": False}[row["if_requant"]]
    return HeadRead(
        step=int(row[_STEP]),
        layer=int(row[_LAYER]),
        head=int(row[_HEAD]),
        num_tokens=int(row["sentence_length_L"]),
        width=int(float(row["embedding_length_D"])),
        num_keys=int(row["key_fetch_num"]),
        num_values=int(row["value_fetch_num"]),
        key_bits=_bits(row["quant_key_bit"]),
        refetch_bits=int(row["auto_requant_incre"]) if again else 0,
        value_bits=_bits(row["quant_value_bit"]),
    )


def _bits(text: str) -> int | None:
    return None if int(text) == -1 else int(text)
