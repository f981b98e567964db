"""Several questions about one text: the common beginning is read once, every question is asked in its own fork."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from elbowroom.errors import RequestError

if TYPE_CHECKING:
    from elbowroom.commands.terminal import Bar
    from elbowroom.engine.llm import LLM
    from elbowroom.engine.output import RequestOutput
    from elbowroom.engine.sampling_params import SamplingParams
    from elbowroom.engine.session import Session
    from elbowroom.models.tokenizer import Tokenizer

MIN_SHARED_TOKENS = 64
"""Prompts that share fewer tokens are computed side by side without a session."""
MAX_THREADS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """Outputs of all prompts, in their order."""

    outputs: list[RequestOutput]
    prompt_tokens: int
    """Tokens that the model read: a shared beginning counts once."""
    ttft_s: float | None
    """Seconds from the start until the first token of any answer."""


def read_prompts(prompts: Sequence[str]) -> list[str]:
    """Return the prompts, with ``-`` replaced by what stdin holds.

    Raises:
        RequestError: a prompt is empty, or stdin is asked for twice or is no UTF-8.
    """
    if prompts.count("-") > 1:
        raise RequestError("stdin can be read once, but `-` is given more than once", "give `-` once")
    texts = [_read_stdin() if prompt == "-" else prompt for prompt in prompts]
    if any(not text.strip() for text in texts):
        raise RequestError("a prompt is empty", "write a question or the beginning of a text")
    return texts


def read_document(path: str | None) -> str:
    """Return the text of ``path``; none gives the empty text.

    Raises:
        RequestError: no such file, not readable, not UTF-8, or empty.
    """
    if path is None:
        return ""
    try:
        text = Path(path).read_bytes().decode()
    except FileNotFoundError as reason:
        raise RequestError(f"there is no file {path}", "give --file the path of a text file") from reason
    except OSError as reason:
        raise RequestError(f"{path} cannot be read: {os.strerror(reason.errno or 0)}", "check the path") from reason
    except UnicodeDecodeError as reason:
        raise RequestError(f"{path} is not UTF-8 text (byte {reason.start})", "convert the file to UTF-8") from reason
    if not text.strip():
        raise RequestError(f"{path} is empty", "give --file a file with text, or leave it out")
    return text


def encode_prompts(tokenizer: Tokenizer, document: str, prompts: Sequence[str], chat: bool | None) -> list[list[int]]:
    """Return the token ids of every prompt behind the document.

    Args:
        tokenizer: of the model.
        document: text in front of every prompt, or empty.
        prompts: questions, or beginnings of a text.
        chat: whether to use the chat template; None means if the model has one.
    """
    from elbowroom.engine.prompts import chat_ids

    head = document.rstrip("\n") + "\n" if document else ""
    if tokenizer.chat_template.available if chat is None else chat:
        return [chat_ids(tokenizer, [{"role": "user", "content": head + prompt}]) for prompt in prompts]
    return [tokenizer.encode(head + prompt) for prompt in prompts]


def answer(llm: LLM, prompts: list[list[int]], sampling: SamplingParams, bar: Bar) -> Answers:
    """Answer every prompt (token ids), reading what all of them begin with once."""
    started = time.monotonic()
    shared = common_length(prompts)
    if len(prompts) == 1 or shared < MIN_SHARED_TOKENS:
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling)
        times = [output.ttft_s for output in outputs if output.ttft_s is not None]
        return Answers(outputs=outputs, prompt_tokens=sum(map(len, prompts)), ttft_s=min(times, default=None))
    with llm.session(prompts[0][:shared]) as session:
        outputs, first = _ask_forks(session, [ids[shared:] for ids in prompts], sampling, bar)
    tokens = shared + sum(len(ids) - shared for ids in prompts)
    return Answers(outputs=outputs, prompt_tokens=tokens, ttft_s=None if first is None else first - started)


def common_length(prompts: Sequence[Sequence[int]]) -> int:
    """Return the tokens that all prompts begin with; at least one of each is left over."""
    shortest = min(map(len, prompts)) - 1
    columns = zip(*(ids[:shortest] for ids in prompts), strict=True)
    return next((index for index, column in enumerate(columns) if len(set(column)) > 1), max(shortest, 0))


def _ask_forks(
    session: Session, questions: list[list[int]], sampling: SamplingParams, bar: Bar
) -> tuple[list[RequestOutput], float | None]:
    """Ask every question in its own fork, at the same time; return outputs and the moment of the first token."""
    pool = ThreadPoolExecutor(min(len(questions), MAX_THREADS))
    try:
        asked = [pool.submit(_ask_fork, session, question, sampling) for question in questions]
        _watch(asked, bar)
        results = [future.result() for future in asked]
    finally:
        # After Ctrl-C nobody waits for the rest; closing the engine ends it.
        pool.shutdown(wait=False, cancel_futures=True)
    moments = [moment for _, moment in results if moment is not None]
    return [output for output, _ in results], min(moments, default=None)


def _ask_fork(session: Session, question: list[int], sampling: SamplingParams) -> tuple[RequestOutput, float | None]:
    with session.fork() as fork:
        started = time.monotonic()
        output = fork.ask(question, sampling)
        return output, None if output.ttft_s is None else started + output.ttft_s


def _watch(asked: list[Future[tuple[RequestOutput, float | None]]], bar: Bar) -> None:
    for done, _ in enumerate(as_completed(asked), start=1):
        bar(done, len(asked))


def _read_stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode().rstrip("\n")
    except UnicodeDecodeError as reason:
        raise RequestError(f"stdin is not UTF-8 text (byte {reason.start})", "send UTF-8") from reason
