"""RunDirectory: a run on disk, which can be interrupted at any moment and goes on where it was.

``spec.json`` says what is run, ``env.json`` where, ``samples.jsonl`` has a line for each question, ``controls.json``
what the controls said and ``summary.json`` the result. Lines are only ever appended, a context at a time; what a
crash left incomplete is dropped when the directory is opened again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from elbowroom.errors import RequestError
from elbowroom.evals.base import Sample
from elbowroom.evals.retrieval import Outcome

_OURS = frozenset({"env.json", "env.json.new", "spec.json.new"})
"""What a crash can leave before there is a spec."""
_OTHER = "give another --out, or ask for the same as before"


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

    def lines(self) -> str:
        """Return a line of JSON for each question."""
        head = {"task": self.task, "num_turns": len(self.outcomes), "num_tokens": self.num_tokens}
        return "".join(json.dumps(head | asdict(outcome), allow_nan=False) + "\n" for outcome in self.outcomes)


class RunDirectory:
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
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._check_spec(spec, env)
            self.asked = {asked.key: asked for asked in self._read(retry_errors)}
            """Complete samples."""
            self._file = self._samples.open("a", encoding="utf-8")
        except OSError as reason:
            raise RequestError(f"--out {path}: {os.strerror(reason.errno or 0)}", "give another directory") from reason

    @property
    def _samples(self) -> Path:
        return self.path / "samples.jsonl"

    def append(self, asked: AskedSample) -> None:
        """Write the outcomes of a sample; they are in the hands of the operating system when this returns."""
        self._file.write(asked.lines())
        self._file.flush()
        self.asked[asked.key] = asked

    def read(self, name: str) -> Any:
        """Return what ``write`` wrote, or None."""
        path = self.path / f"{name}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def write(self, name: str, value: Mapping[str, object]) -> None:
        """Write ``NAME.json``, whole or not at all."""
        self._replace(f"{name}.json", json.dumps(value, indent=1, allow_nan=False) + "\n")

    def close(self) -> None:
        """Close the file of samples."""
        self._file.close()

    def _check_spec(self, spec: Mapping[str, object], env: Mapping[str, object]) -> None:
        wanted = json.loads(json.dumps(spec))
        found = self.read("spec")
        if found is None:
            if any(path.name not in _OURS for path in self.path.iterdir()):
                raise RequestError(f"--out {self.path} holds other files", "give a new or an empty directory")
            self.write("env", env)
            self.write("spec", spec)
        elif found != wanted:
            names = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
            changes = "; ".join(f"{name} was {found.get(name)!r}, is {wanted.get(name)!r}" for name in names)
            raise RequestError(f"--out {self.path} holds a run of another kind: {changes}", _OTHER)

    def _read(self, retry_errors: bool) -> list[AskedSample]:
        """Return the complete samples; if the file holds anything else, write it anew with only those."""
        text = self._samples.read_text(encoding="utf-8", errors="replace") if self._samples.is_file() else ""
        groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for line in text.splitlines():
            fields = _parsed(line)
            if fields is not None:
                groups.setdefault((fields["task"], fields["sample_id"]), []).append(fields)
        complete = [asked for group in groups.values() if (asked := _complete(group, retry_errors)) is not None]
        clean = "".join(asked.lines() for asked in complete)
        if clean != text:
            self._replace("samples.jsonl", clean)
        return complete

    def _replace(self, name: str, text: str) -> None:
        draft = self.path / f"{name}.new"
        draft.write_text(text, encoding="utf-8")
        draft.replace(self.path / name)


def _parsed(line: str) -> dict[str, Any] | None:
    """Return the fields of a line; None if it was cut off."""
    try:
        fields = json.loads(line)
    except ValueError:
        return None
    return fields if isinstance(fields, dict) and {"task", "sample_id", "num_turns"} <= fields.keys() else None


def _complete(lines: list[dict[str, Any]], retry_errors: bool) -> AskedSample | None:
    head = ("task", "num_turns", "num_tokens")
    if len(lines) != lines[0]["num_turns"] or (retry_errors and any(line["error"] for line in lines)):
        return None
    fields = ({name: value for name, value in line.items() if name not in head} for line in lines)
    outcomes = (Outcome(**each | {"token_ids": tuple(each["token_ids"])}) for each in fields)
    return AskedSample(lines[0]["task"], lines[0]["num_tokens"], tuple(outcomes))
