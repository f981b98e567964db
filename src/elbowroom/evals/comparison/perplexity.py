"""Perplexity through the KV store, without any question: bits per byte of what follows a context.

The first tokens of a window are read as a prompt, so that whatever a plan does at a prompt's end is done; the last ones
are scored one by one, each decoded behind those before it. Only the engine's public interface is used: true tokens are
forced, and a log-probability is that of the unchanged distribution.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from elbowroom.engine.llm import LLM
from elbowroom.engine.sampling_params import SamplingParams
from elbowroom.errors import IntegrityError, RequestError
from elbowroom.evals.base import TextTokenizer
from elbowroom.evals.bits_per_byte import text_windows

FILE = "perplexity.jsonl"
SCORED_TOKENS = 256
"""Most tokens of a window that are scored; at most half of it."""


@dataclass(frozen=True, slots=True)
class WindowScore:
    """One scored window."""

    window: int
    nats: float
    """Negative log-probability of the scored tokens, natural log."""
    num_bytes: int
    """Bytes of their text."""
    num_tokens: int

    @property
    def bits_per_byte(self) -> float:
        """Mean bits of a byte."""
        return self.nats / math.log(2) / max(1, self.num_bytes)


def windows(tokenizer: TextTokenizer, length: int, num_windows: int) -> list[list[int]]:
    """Return up to ``num_windows`` windows of ``length`` held-out tokens.

    Raises:
        RequestError: the text is shorter than a window.
    """
    found = [window for window in text_windows(tokenizer, length, num_windows) if len(window) == length]
    if not found:
        raise RequestError(f"the held-out text has less than {length} tokens", "lower --length, or drop perplexity")
    return found


def score_windows(
    llm: LLM,
    tokenizer: TextTokenizer,
    every: list[list[int]],
    path: Path,
    advance: Callable[[int, int], None],
) -> list[WindowScore]:
    """Score the windows that ``path`` lacks, one at a time, and append a line for each; return all.

    Sums depend in their last bits on what else is in a batch, so nothing is: the same plan gives the same numbers.

    Args:
        llm: who predicts.
        tokenizer: its tokenizer.
        every: tokens of all windows.
        path: lines of JSON; made if it is not there.
        advance: told the windows that are done and all.
    """
    known = {score.window: score for score in read_windows(path)}
    _rewrite(path, known)
    advance(len(known), len(every))
    with path.open("a", encoding="utf-8") as file:
        for number in sorted(set(range(len(every))) - known.keys()):
            known[number] = _score(llm, tokenizer, number, every[number])
            file.write(_line(known[number]))
            file.flush()
            advance(len(known), len(every))
    return [known[number] for number in range(len(every))]


def read_windows(path: Path) -> list[WindowScore]:
    """Return the windows of a file; a line that a crash cut off is no window."""
    return list(_complete(path.read_text(encoding="utf-8"))) if path.is_file() else []


def _complete(text: str) -> Iterator[WindowScore]:
    for line in text.splitlines(keepends=True):
        if line.endswith("\n"):
            yield WindowScore(**json.loads(line))


def _rewrite(path: Path, known: dict[int, WindowScore]) -> None:
    draft = path.with_name(path.name + ".new")
    draft.write_text("".join(map(_line, known.values())), encoding="utf-8")
    draft.replace(path)


def _line(score: WindowScore) -> str:
    return json.dumps(asdict(score), allow_nan=False) + "\n"


def _score(llm: LLM, tokenizer: TextTokenizer, number: int, tokens: list[int]) -> WindowScore:
    count = min(SCORED_TOKENS, len(tokens) // 2)
    asked = tokens[-count:]
    forced = SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True, logprobs=0, forced=tuple(asked))
    sample = llm.generate({"prompt_token_ids": tokens[:-count]}, forced)[0].outputs[0]
    if sample.token_ids != asked or sample.logprobs is None:
        raise IntegrityError(f"window {number} of the held-out text was not decoded as it is written")
    nats = -math.fsum(each.logprob for each in sample.logprobs)
    return WindowScore(number, nats, len(tokenizer.decode(asked).encode("utf-8")), count)
