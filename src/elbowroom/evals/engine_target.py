"""An engine as the target of evaluations: contexts become sessions, questions become forks, decoding is greedy."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from elbowroom.engine.llm import LLM
from elbowroom.engine.sampling_params import SamplingParams
from elbowroom.engine.session import Session
from elbowroom.evals.base import Reply, Sample
from elbowroom.evals.parallel import in_order
from elbowroom.evals.retrieval import Outcome, RetrievalResult, run, summarize
from elbowroom.models.tokenizer import Tokenizer

MAX_CONTEXTS = 8
"""Contexts that are worked on at once, if the KV cache holds them."""
TASK_BYTES = 16 * 2**20
"""What the held-out text, its lines and the tokenizer's memory of them take in this process."""


class EngineSession:
    """A session of the engine, seen through the protocol of evaluations.

    Args:
        session: what has been read and asked.
        tokenizer: of the model.
        by_token: whether questions are read as decoded tokens are, one by one, and not as prompts. A prompt reads
            everything, so a plan that reads a part would find what is asked for with the question, and only repeat it.
    """

    def __init__(self, session: Session, tokenizer: PlainTokenizer, *, by_token: bool = False) -> None:
        self._session, self._tokenizer, self._by_token = session, tokenizer, by_token

    def ask(self, prompt: str, max_tokens: int) -> Reply:
        """Append ``prompt``, generate greedily and keep both."""
        if self._by_token and prompt and self._session.token_ids:
            return self._ask_by_token(self._tokenizer.encode(prompt), max_tokens)
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
        sample = self._session.ask(prompt, sampling).outputs[0]
        return Reply(sample.text, tuple(sample.token_ids))

    def _ask_by_token(self, prompt: list[int], max_tokens: int) -> Reply:
        """Ask with all tokens of the question but the first decoded: a request has to read something."""
        first, *forced = prompt
        sampling = SamplingParams(max_tokens=len(forced) + max_tokens, temperature=0.0, forced=tuple(forced))
        reply = self._session.ask([first], sampling).outputs[0].token_ids[len(forced) :]
        return Reply(self._tokenizer.decode(reply), tuple(reply))

    def push(self, text: str) -> None:
        """Append ``text`` without generating."""
        self._session.push(text)

    def fork(self) -> EngineSession:
        """Return a copy that shares what has been read."""
        return EngineSession(self._session.fork(), self._tokenizer, by_token=self._by_token)

    def close(self) -> None:
        """Free the session."""
        self._session.close()


class EngineTarget:
    """A loaded model under evaluation.

    Args:
        llm: its memory budget decides how many contexts fit at once.

    Raises:
        OutOfBudget: no room for the task's own text beside the model.
    """

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        parts = llm.engine.parts
        # The task lives in the same process, so it pays from the same budget; the KV cache gets what is left.
        parts.ledger.charge("tasks", "host", TASK_BYTES)
        llm.engine.set_budget(parts.memory.budget_bytes)

    def open(self, context: str) -> EngineSession:
        """Read ``context`` into a new session."""
        by_token = self._llm.engine.parts.plan.plan.reads is not None
        return EngineSession(self._llm.session(context), PlainTokenizer(self._llm.tokenizer), by_token=by_token)

    def num_parallel(self, context_tokens: int) -> int:
        """Return how many contexts of ``context_tokens`` the KV cache holds at once, 1 to ``MAX_CONTEXTS``."""
        parts = self._llm.engine.parts
        curve = parts.plan.curve(context_tokens, np.array([context_tokens + 64]), parts.memory.max_step_tokens)
        each = int(curve.resident_bytes[0]) + curve.transient_bytes + 2 * parts.plan.block_bytes
        return max(1, min(MAX_CONTEXTS, self._llm.engine.stats().kv_capacity_bytes // each))


class PlainTokenizer:
    """A model's tokenizer that adds no special tokens: what the generators of tasks count with."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        """Return token ids without adding any."""
        return self._tokenizer.encode(text, add_special_tokens=False)

    def decode(self, token_ids: list[int]) -> str:
        """Return the text of token ids."""
        return self._tokenizer.decode(token_ids)


def run_parallel(
    target: EngineTarget, samples: Iterable[Sample], num_parallel: int, advance: Callable[[int], None]
) -> RetrievalResult:
    """Ask every question of ``samples``, several contexts at a time, and return the summary.

    Args:
        target: who is asked.
        samples: made one by one, as they are needed.
        num_parallel: contexts at a time.
        advance: called with the number of questions answered so far.
    """
    outcomes: list[Outcome] = []
    longest = 0
    for result, asked in in_order(lambda sample: run(target, [sample]), samples, num_parallel):
        longest = max(longest, result.max_tokens)
        outcomes += asked
        advance(len(outcomes))
    return summarize(outcomes, longest)
