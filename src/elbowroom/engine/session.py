"""Session: a context that stays in the KV cache and can be asked, extended, forked and rolled back.

The stored sequence is parked between calls. When memory gets tight the engine may drop it; the next call then
prefills it again, so a session is never wrong, only slower.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Self

from elbowroom.engine.engine import Engine
from elbowroom.engine.output import RequestOutput
from elbowroom.engine.plans import PlanText
from elbowroom.engine.sampling_params import SamplingParams
from elbowroom.engine.types import SessionRef
from elbowroom.errors import RequestError

_PREFILL = SamplingParams(max_tokens=0)


class Session:
    """One growing token sequence; made by ``LLM.session``.

    Args:
        engine: who computes.
        context: text or token ids to read at once.
        parent: whose tokens it begins with, under the same plan.
        kv: the plan of the engine under which its tokens are kept.
    """

    def __init__(
        self,
        engine: Engine,
        context: str | Sequence[int] = "",
        parent: Session | None = None,
        kv: PlanText = None,
    ) -> None:
        self._engine = engine
        self.kv: PlanText = kv if parent is None else parent.kv
        engine.parts.plans.number(self.kv)  # one that the engine does not have is refused here
        self.key = engine.new_session_key()
        """Name of the parked sequence."""
        self._parent = None if parent is None else parent.key
        self._closed = False
        self.token_ids: list[int] = [] if parent is None else list(parent.token_ids)
        """Everything read and written so far."""
        self.last: RequestOutput | None = None
        """Output of the newest ``ask``, with its timings."""
        if context:
            self.push(context)

    @property
    def mark(self) -> int:
        """Tokens so far; a point to roll back to."""
        return len(self.token_ids)

    def push(self, text: str | Sequence[int]) -> None:
        """Read more context (text or token ids) without answering.

        Raises:
            RequestError: nothing to read, or it does not fit the context or the budget; the session is unchanged.
        """
        tokens = self.token_ids + self._ids(text)
        self._engine.generate(tokens, _PREFILL, self._ref(), self.kv).result()
        self.token_ids = tokens

    def ask(self, text: str | Sequence[int], sampling: SamplingParams | None = None) -> RequestOutput:
        """Read ``text``, generate, and keep both in the session; with n > 1 the first sample is kept.

        Raises:
            RequestError: nothing to read, or it does not fit the context or the budget; the session is unchanged.
        """
        tokens = self.token_ids + self._ids(text)
        chosen = sampling or SamplingParams(temperature=0.0)
        output = self._engine.generate(tokens, chosen, self._ref(), self.kv).result()
        self.token_ids = tokens + output.outputs[0].token_ids
        self.last = output
        return output

    def fork(self) -> Session:
        """Return a session with the same tokens that shares their memory, copy-on-write."""
        return Session(self._engine, parent=self)

    def rollback(self, mark: int) -> None:
        """Forget everything behind ``mark``.

        Raises:
            RequestError: the session is shorter than that.
        """
        if not 0 <= mark <= len(self.token_ids):
            raise RequestError(f"cannot roll a session of {len(self.token_ids)} tokens back to {mark}")
        del self.token_ids[mark:]

    def close(self) -> None:
        """Free the stored sequence."""
        if not self._closed:
            self._closed = True
            self._engine.close_session(self.key)

    def __enter__(self) -> Self:
        """Return itself; ``close`` runs at the end of the block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    def _ref(self) -> SessionRef:
        if self._closed:
            raise RequestError("the session is closed", "open a new one with llm.session()")
        return SessionRef(self.key, self._parent)

    def _ids(self, text: str | Sequence[int]) -> list[int]:
        if isinstance(text, str):
            return self._engine.parts.tokenizer.encode(text, add_special_tokens=not self.token_ids)
        return list(text)
