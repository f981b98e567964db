"""RunDirectory: a run on disk, which can be interrupted at any moment and goes on where it was.

``spec.json`` says what is run, ``env.json`` where, ``samples.jsonl`` has a line for each question, ``controls.json``
what the controls said and ``summary.json`` the result. Lines are only ever appended, a context at a time; what a
crash left incomplete is dropped when the directory is opened again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from elbowroom.evals.base import Sample
from elbowroom.evals.retrieval import Outcome
from elbowroom.evals.spec_directory import SpecDirectory


@dataclass(frozen=True, slots=True)
class AskedSample:
    """All outcomes of one context."""

    task: str
    num_tokens: int
    """Of the context with its prompts and answers."""
    outcomes: tuple[Outcome, ...]

    @classmethod
    def of(cls, task: str, sample: Sample, outcomes: Iterable[Outcome]) -> AskedSample:
        """Return the outcomes of ``sample``."""
        return cls(task, sample.num_tokens, tuple(outcomes))

    @property
    def key(self) -> tuple[str, str]:
        """Task and sample."""
        return self.task, self.outcomes[0].sample_id

    def without_replies(self) -> AskedSample:
        """Return what summaries need, in little memory."""
        small = (replace(outcome, answer="", reply="", token_ids=(), why="") for outcome in self.outcomes)
        return AskedSample(self.task, self.num_tokens, tuple(small))

    def lines(self) -> str:
        """Return a line of JSON for each question."""
        head = {"task": self.task, "num_turns": len(self.outcomes), "num_tokens": self.num_tokens}
        return "".join(json.dumps(head | asdict(outcome), allow_nan=False) + "\n" for outcome in self.outcomes)


class RunDirectory(SpecDirectory):
    """An open run.

    Args:
        path: made if it is not there.
        spec: what is run; plain values.
        env: where it is run; plain values.
        retry_errors: forget samples with errors, so that they are asked again.

    Raises:
        RequestError: the directory holds a run of another spec or files of something else, or is not writable.
    """

    def __init__(
        self, path: Path, spec: Mapping[str, object], env: Mapping[str, object], retry_errors: bool = False
    ) -> None:
        super().__init__(path, spec, env)
        self.asked: dict[tuple[str, str], AskedSample] = {}
        """Complete samples, without replies."""
        with self._file_errors():
            self._read(retry_errors)
            self._file = self._samples.open("a", encoding="utf-8")

    @property
    def _samples(self) -> Path:
        return self.path / "samples.jsonl"

    def append(self, asked: AskedSample) -> None:
        """Write the outcomes of a sample; they are in the hands of the operating system when this returns."""
        with self._file_errors():
            self._file.write(asked.lines())
            self._file.flush()
        self.asked[asked.key] = asked.without_replies()

    def close(self) -> None:
        """Close the file of samples."""
        self._file.close()

    def _read(self, retry_errors: bool) -> None:
        """Note the complete samples; if the file holds anything else, write it anew with only those."""
        if not self._samples.is_file():
            return
        clean = self.path / "samples.jsonl.new"
        with (
            self._samples.open(encoding="utf-8", errors="replace") as source,
            clean.open("w", encoding="utf-8") as copy,
        ):
            whole = ((line, fields) for line in source if line.endswith("\n") and (fields := _fields(line)))
            for _, group in groupby(whole, lambda each: (each[1]["task"], each[1]["sample_id"])):
                lines, found = zip(*group, strict=True)
                asked = _complete(found, retry_errors)
                if asked is not None and asked.key not in self.asked:
                    copy.writelines(lines)
                    self.asked[asked.key] = asked.without_replies()
        if clean.stat().st_size == self._samples.stat().st_size:
            clean.unlink()
        else:
            clean.replace(self._samples)


def _fields(line: str) -> dict[str, Any]:
    """Return the fields of a line that is no rest of one; of others, none."""
    try:
        fields = json.loads(line)
    except ValueError:
        return {}
    return fields if isinstance(fields, dict) and {"task", "sample_id", "num_turns"} <= fields.keys() else {}


def _complete(lines: Sequence[dict[str, Any]], retry_errors: bool) -> AskedSample | None:
    head = ("task", "num_turns", "num_tokens")
    if len(lines) != lines[0]["num_turns"] or (retry_errors and any(line["error"] for line in lines)):
        return None
    fields = ({name: value for name, value in line.items() if name not in head} for line in lines)
    outcomes = (Outcome(**each | {"token_ids": tuple(each["token_ids"])}) for each in fields)
    return AskedSample(lines[0]["task"], lines[0]["num_tokens"], tuple(outcomes))
