"""SamplingParams: how the tokens of one request are chosen, checked on construction."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from elbowroom.errors import RequestError

MAX_SAMPLES = 128
MAX_TOP_LOGPROBS = 20
MAX_STOP_STRINGS = 16
RANGES: Mapping[str, tuple[float, float]] = {
    "n": (1, MAX_SAMPLES),
    "top_k": (-1, 2**31),
    "max_tokens": (0, 2**31),
    "logprobs": (0, MAX_TOP_LOGPROBS),
    "seed": (-(2**63), 2**64 - 1),
    "thinking_budget": (0, 2**31),
    "answer_reserve": (0, 2**31),
    "temperature": (0.0, 100.0),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 100.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
}
"""Lowest and highest value of each number; ``top_p`` must also be above 0."""
_WHOLE = ("n", "top_k", "max_tokens", "logprobs", "seed", "thinking_budget", "answer_reserve")
_OPTIONAL = ("max_tokens", "logprobs", "seed", "thinking_budget")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Sampling of one request; the names are those of the OpenAI API and of common engines.

    Raises:
        RequestError: a value is out of range or not a number; the message names the range.
    """

    n: int = 1
    """Samples of the same prompt."""
    max_tokens: int | None = None
    """Most new tokens; None means what is left of the context (and of the KV budget). 0 only prefills."""
    temperature: float = 1.0
    """0 is greedy."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 or -1 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens with this much probability."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the most likely one."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens seen in prompt or output (CTRL, arXiv 1909.05858)."""
    presence_penalty: float = 0.0
    """Subtracted once from logits of generated tokens."""
    frequency_penalty: float = 0.0
    """Subtracted for every occurrence among generated tokens."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these token ids."""
    seed: int | None = None
    """None draws a fresh seed for the request; equal seeds give equal tokens whatever else runs."""
    stop: tuple[str, ...] = ()
    """Generation ends before the first of these strings."""
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    forced: tuple[int, ...] = ()
    """The first new tokens, whatever their logits: to score a text, or to read it as decoding reads. They count in
    ``max_tokens``, and end what others would end."""
    thinking_budget: int | None = None
    """Most tokens of thinking (between the model's marks of it, over the whole answer); then its end is forced."""
    answer_reserve: int = 0
    """Of ``max_tokens``, those kept for the answer: thinking is ended in time."""
    logprobs: int | None = None
    """None: none. k: the log-probability of each chosen token and of the k most likely ones."""

    def __post_init__(self) -> None:
        """Check every value."""
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        else:
            object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        object.__setattr__(self, "forced", tuple(self.forced))
        self._check_integers()
        self._check_ranges()
        if len(self.stop) > MAX_STOP_STRINGS or any(not text for text in self.stop):
            raise RequestError(f"stop takes up to {MAX_STOP_STRINGS} strings, none of them empty")
        if not all(math.isfinite(bias) and -100 <= bias <= 100 for bias in self.logit_bias.values()):
            raise RequestError("logit_bias values must be between -100 and 100")

    def _check_integers(self) -> None:
        for name in _WHOLE:
            value = getattr(self, name)
            if value is not None or name not in _OPTIONAL:
                _integer(name, value)
        if self.max_tokens is not None and self.answer_reserve and self.answer_reserve >= self.max_tokens:
            raise RequestError(
                f"answer_reserve must be below max_tokens={self.max_tokens}, not {self.answer_reserve}",
                "lower answer_reserve or raise max_tokens",
            )

    def _check_ranges(self) -> None:
        for name, (low, high) in RANGES.items():
            if name in _WHOLE:
                continue
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
                raise RequestError(f"{name} must be a number from {low:g} to {high:g}, not {value!r}")
        if self.top_p == 0.0:
            raise RequestError("top_p must be above 0", "use temperature=0 for greedy decoding")

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature < 1e-5

    @property
    def limits_thinking(self) -> bool:
        """Whether thinking may have to be ended."""
        return self.thinking_budget is not None or self.answer_reserve > 0

    @property
    def has_penalties(self) -> bool:
        """Whether logits depend on the tokens seen so far."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


def _integer(name: str, value: object) -> None:
    low, high = RANGES[name]
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise RequestError(f"{name} must be a whole number from {low} to {high}, not {value!r}")
