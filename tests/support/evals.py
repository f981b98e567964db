"""Tokenizers and targets of evaluations whose behaviour is known."""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass, field, replace

from elbowroom.evals.base import Reply, Sample, Session, Target
from elbowroom.evals.tasks.base import Task
from elbowroom.evals.tasks.kv import samples as kv_samples


class PieceTokenizer:
    """Words, single digits and other characters are tokens; ids are remembered, so that they can be decoded."""

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._ids: dict[str, int] = {}

    def encode(self, text: str) -> list[int]:
        return [self._id(piece) for piece in re.findall(r"[a-zA-Z_]+|.|\n", text)]

    def decode(self, token_ids: list[int]) -> str:
        return "".join(self._pieces[each] for each in token_ids)

    def _id(self, piece: str) -> int:
        if piece not in self._ids:
            self._ids[piece] = len(self._pieces)
            self._pieces.append(piece)
        return self._ids[piece]


class ByteTokenizer:
    """Every byte is a token, and every text begins with one more, as some tokenizers have it."""

    def encode(self, text: str) -> list[int]:
        return [256, *text.encode()]

    def decode(self, token_ids: list[int]) -> str:
        return bytes(each for each in token_ids if each < 256).decode(errors="replace")


@dataclass
class Loggings:
    """What the sessions of a target were told, in order; ``closed`` counts sessions."""

    calls: list[tuple[str, str]] = field(default_factory=list)
    closed: int = 0
    opened: int = 0


class LoggedSession:
    def __init__(self, inner: Session, log: Loggings, name: str) -> None:
        self.inner, self.log, self.name = inner, log, name
        log.opened += 1

    def ask(self, prompt: str, max_tokens: int) -> Reply:
        self.log.calls.append((f"{self.name} ask", prompt))
        return self.inner.ask(prompt, max_tokens)

    def push(self, text: str) -> None:
        self.log.calls.append((f"{self.name} push", text))
        self.inner.push(text)

    def fork(self) -> LoggedSession:
        return LoggedSession(self.inner.fork(), self.log, "fork")

    def close(self) -> None:
        self.log.closed += 1
        self.inner.close()


class LoggedTarget:
    """Passes everything on, and fails with ``errors[n]`` when the n-th context is opened."""

    def __init__(self, inner: Target, errors: dict[int, BaseException] | None = None) -> None:
        self.inner, self.errors = inner, errors or {}
        self.log = Loggings()
        self.contexts: list[str] = []

    def open(self, context: str) -> LoggedSession:
        self.contexts.append(context)
        error = self.errors.get(len(self.contexts) - 1)
        if error is not None:
            raise error
        return LoggedSession(self.inner.open(context), self.log, "main")


class FickleTarget:
    """Never writes the same twice."""

    def __init__(self) -> None:
        self.count = 0

    def open(self, context: str) -> FickleTarget:
        return self

    def ask(self, prompt: str, max_tokens: int) -> Reply:
        self.count += 1
        return Reply(str(self.count), (self.count,))

    def push(self, text: str) -> None: ...

    def fork(self) -> FickleTarget:
        return self

    def close(self) -> None: ...


class ForgetfulTarget:
    """Says what another target says, but often not to the end: the same for the same prompt, whatever came before."""

    def __init__(self, inner: Target | Session) -> None:
        self.inner = inner

    def open(self, context: str) -> ForgetfulTarget:
        return ForgetfulTarget(self.inner.open(context))

    def ask(self, prompt: str, max_tokens: int) -> Reply:
        reply = self.inner.ask(prompt, max_tokens)
        kept = len(reply.text) * (1 + zlib.crc32(prompt.encode()) % 4) // 4
        return Reply(reply.text[:kept], reply.token_ids)

    def push(self, text: str) -> None: ...

    def fork(self) -> ForgetfulTarget:
        return self

    def close(self) -> None: ...


def _cut_short(sample: Sample) -> Sample:
    return replace(sample, turns=tuple(replace(turn, max_new_tokens=1) for turn in sample.turns))


TOO_SHORT = Task(asks="what its limits let nobody answer", samples=lambda *each: map(_cut_short, kv_samples(*each)))
