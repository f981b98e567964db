"""LLM: the synchronous Python interface."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Self

from elbowroom.engine.build import build_engine
from elbowroom.engine.engine import Engine
from elbowroom.engine.output import RequestOutput
from elbowroom.engine.prompts import Message, Prompt, chat_ids, prompt_ids
from elbowroom.engine.resident import Progress
from elbowroom.engine.sampling_params import SamplingParams
from elbowroom.engine.scheduling import Scheduling
from elbowroom.engine.session import Session
from elbowroom.errors import RequestError
from elbowroom.kv.plan import KVPlan


class LLM:
    """A language model inside a memory budget.

    >>> llm = LLM(memory="256MiB")
    >>> llm.generate("def fib(n):", SamplingParams(max_tokens=32, temperature=0))[0].outputs[0].text

    The arguments are those of ``build_engine``.
    """

    def __init__(
        self,
        model: str | None = None,
        memory: str | int = "80%",
        kv: str | KVPlan | None = None,
        dtype: str = "auto",
        *,
        kv_choices: Sequence[str | KVPlan] = (),
        kv_relief: str | KVPlan | None = None,
        kv_store: str = "paged",
        max_sequences: int = 64,
        prefix_cache: bool = True,
        scheduling: Scheduling | None = None,
        seed: int = 0,
        thinking_marks: str | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.engine: Engine = build_engine(
            model,
            memory,
            kv,
            dtype,
            kv_choices=kv_choices,
            kv_relief=kv_relief,
            kv_store=kv_store,
            max_sequences=max_sequences,
            prefix_cache=prefix_cache,
            scheduling=scheduling,
            seed=seed,
            thinking_marks=thinking_marks,
            progress=progress,
        )
        self.tokenizer = self.engine.parts.tokenizer

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        kv: str | KVPlan | None = None,
        admission: str | None = None,
    ) -> list[RequestOutput]:
        """Complete one prompt or many, batched, and return one output for each, in order.

        Args:
            prompts: text or ``{"prompt_token_ids": [...]}``, or a list of them.
            sampling: for all prompts, or one for each.
            kv: one of the plans that the engine was started with (``kv``, ``kv_choices``); by default the first.
            admission: name of the admission policy that lets these begin; by default the engine's own.

        Raises:
            PlanError: there is no such admission policy.
            RequestError: a prompt is malformed or can never fit, or the engine has no plan ``kv``; the others are
                dropped then.
        """
        many = [prompts] if isinstance(prompts, str | Mapping) else list(prompts)
        return self._run([prompt_ids(self.tokenizer, prompt) for prompt in many], sampling, kv, admission)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        kv: str | KVPlan | None = None,
        admission: str | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation or many; a message is ``{"role": ..., "content": ...}``."""
        single = bool(messages) and isinstance(messages[0], Mapping)
        conversations = [messages] if single else messages
        return self._run([chat_ids(self.tokenizer, list(each)) for each in conversations], sampling, kv, admission)  # type: ignore[arg-type]

    def session(self, context: str | Sequence[int] = "", kv: str | KVPlan | None = None) -> Session:
        """Return a session that has read ``context`` (text or token ids) and can be asked, forked and rolled back.

        Its tokens are kept under ``kv``, one of the engine's plans.
        """
        return Session(self.engine, context, kv=kv)

    def clear_cache(self) -> int:
        """Forget cached prefixes and give their memory back; return the bytes."""
        return self.engine.clear_cache()

    def close(self) -> None:
        """Stop the engine and give all memory back."""
        self.engine.close()

    def __enter__(self) -> Self:
        """Return itself; ``close`` runs at the end of the block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    def _run(
        self,
        prompts: list[list[int]],
        sampling: SamplingParams | Sequence[SamplingParams] | None,
        kv: str | KVPlan | None,
        admission: str | None,
    ) -> list[RequestOutput]:
        futures: list[Future[RequestOutput]] = []
        try:
            for ids, params in zip(prompts, _each(sampling, len(prompts)), strict=True):
                futures.append(self.engine.generate(ids, params, kv=kv, admission=admission))
            return [future.result() for future in futures]
        finally:
            for future in futures:  # after an error or an interrupt nobody waits for the others
                future.cancel()


def _each(sampling: SamplingParams | Sequence[SamplingParams] | None, count: int) -> Iterator[SamplingParams]:
    if sampling is None or isinstance(sampling, SamplingParams):
        return iter([sampling or SamplingParams()] * count)
    if len(sampling) != count:
        raise RequestError(f"{count} prompts but {len(sampling)} sampling parameters", "give one for all, or one each")
    return iter(sampling)
