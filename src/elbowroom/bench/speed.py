"""What the speed benchmarks share: one random model, all sides loaded on it, checked and asked in turns.

Every side is a process of its own (``side``), loaded once, with as many threads as the machine gives. Before anything
is timed each rival's log-probabilities are compared with ours: a rival on a broken file proves nothing.
"""

from __future__ import annotations

import contextlib
import random
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from elbowroom.bench.base import BenchOptions, Claim, Row
from elbowroom.bench.gguf_file import write_gguf
from elbowroom.bench.kv_shapes import KIVI2
from elbowroom.bench.machine import ForeignCPU, usable_threads
from elbowroom.bench.pairs import MedianInterval, Run, Turns, median_ratio, one_line, ratio_claim, take_turns
from elbowroom.bench.random_model import write_random_model
from elbowroom.bench.side import SIDES, Side, our_environment, rival_environment
from elbowroom.errors import ElbowroomError
from elbowroom.models.config import ModelConfig
from elbowroom.models.hf_config import read_config
from elbowroom.models.loader import weights_bytes

OURS = "ours"
TRANSFORMERS, TRANSFORMERS_FP32, LLAMACPP = "transformers-bf16", "transformers-fp32", "llamacpp-f16"
ITEM_BYTES = {OURS: 2, TRANSFORMERS: 2, TRANSFORMERS_FP32: 4, LLAMACPP: 2}
"""Side -> bytes of one weight."""
OURS_KIVI, QUANTO4, QUANTO2 = "ours-kivi2", "transformers-quanto4", "transformers-quanto2"
OUR_PLANS = {OURS: None, OURS_KIVI: KIVI2}
"""Our sides -> KV plan."""
CACHE_BITS = {QUANTO4: 4, QUANTO2: 2}
"""Sides of transformers with a quantized cache -> its bits."""
SPARE_BYTES = 2**30
"""What our own side gets beyond weights and KV cache; it asks for no more than it needs."""
MAX_LOGPROB_ERROR = 0.25
"""Sides that round differently differ by some hundredths here; another model differs by more than one."""
_CHECKED_TOKENS = 32
_CHECKED_STEPS = 4
_RATE = "tokens_per_s"


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What every side is asked to do."""

    size: str = "336M"
    prompt_tokens: int = 512
    new_tokens: int = 128
    num_rounds: int = 5

    @classmethod
    def of(cls, options: BenchOptions) -> Load:
        """Return the full load, or the quick one."""
        return cls(size="20M", prompt_tokens=64, new_tokens=8, num_rounds=2) if options.quick else cls()


class Contest:
    """All sides, loaded on one random model; those that could not be are in ``failures`` with the reason.

    Args:
        size: shape of the model.
        num_streams: sequences at once.
        stream_tokens: longest of them.
        rivals: names of the other sides.
        prefix_cache: whether ours keeps prefixes (a prompt is then read once only).
        seed: of weights and prompts.
    """

    def __init__(
        self,
        size: str,
        num_streams: int,
        stream_tokens: int,
        rivals: Sequence[str] = (TRANSFORMERS, TRANSFORMERS_FP32, LLAMACPP),
        *,
        prefix_cache: bool = False,
        seed: int = 0,
    ) -> None:
        self._size, self._num_streams, self._stream_tokens = size, num_streams, stream_tokens
        self._rivals, self._prefix_cache, self._seed = tuple(rivals), prefix_cache, seed
        self._cleanup = contextlib.ExitStack()
        self._threads = usable_threads()
        self.sides: dict[str, Side] = {}
        self.failures: dict[str, str] = {}
        self.about: dict[str, dict[str, Any]] = {}
        """Side -> version and how closely it agrees with ours."""
        self.other_cpu_share = 0.0
        """Of all CPU time in the last rounds: what went to processes that are no part of this benchmark."""
        self.config: ModelConfig

    def __enter__(self) -> Self:
        """Write the model, load every side, and drop those that compute something else."""
        with self._cleanup:
            scratch = Path(self._cleanup.enter_context(tempfile.TemporaryDirectory()))
            directory = write_random_model(scratch / "model", self._size, seed=self._seed)
            self.config = read_config(directory)
            loading = [name for name in (OURS, *self._rivals) if self._guard(name, lambda n: self._start(n, directory))]
            for name in loading:  # all load at the same time
                self._guard(name, lambda n: self.sides[n].receive())
            self._check()
            self._cleanup = self._cleanup.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End all sides and remove the model."""
        self._cleanup.close()

    def rounds(self, command: str, arguments: Callable[[int], Mapping[str, object]], num_rounds: int) -> Turns:
        """Ask each side once a round; every run has ``tokens_per_s``, and failed sides are listed.

        Args:
            command: what to ask.
            arguments: of the request in a round (below 0: warm-up); equal for all sides.
            num_rounds: rounds that count, behind one that does not.
        """

        def play(name: str) -> Callable[[int], Run]:
            return lambda number: self._ask(name, command, arguments(number))

        with ForeignCPU() as foreign:
            turns = take_turns({name: play(name) for name in self.sides if name not in self.failures}, num_rounds)
        self.other_cpu_share = foreign.share
        turns.failures |= self.failures
        self.failures = dict(turns.failures)
        return turns

    def tell(self, command: str, **arguments: object) -> None:
        """Ask every side that has not failed, one after the other, what nobody times."""
        for name in self.sides:
            if name not in self.failures:
                self._guard(name, lambda n: self.sides[n].ask(command, **arguments))

    def prompts(self, number: int, count: int, num_tokens: int) -> list[list[int]]:
        """Return ``count`` random prompts of round ``number``."""
        rng = random.Random(f"{self._seed}/{number}")
        return [[rng.randrange(self.config.vocab_size) for _ in range(num_tokens)] for _ in range(count)]

    def rate_row(self, name: str, turns: Turns) -> dict[str, object]:
        """Return the median rate of a side with its rounds, or why there is none."""
        if name in turns.failures:
            return {"side": name, _RATE: None, "reason": turns.failures[name]}
        rates = turns.figures(name, _RATE)
        rate = MedianInterval.of(rates)
        return {
            "side": name,
            _RATE: rate.median,
            "low": rate.low,
            "high": rate.high,
            "rounds": [round(each, 3) for each in rates],
            "other_cpu_share": self.other_cpu_share,
            "idle_cpu_s": round(self.sides[name].idle_cpu_s, 3),
            **self.about.get(name, {}),
        }

    def _start(self, name: str, directory: Path) -> None:
        """Start a side and send it what to load."""
        threads = self._threads
        if name in OUR_PLANS:
            self._open(name, "ours.py", our_environment(threads)).send(
                "load",
                directory=str(directory),
                memory=self._our_bytes(),
                dtype="bfloat16",
                num_streams=self._num_streams,
                prefix_cache=self._prefix_cache,
                kv=OUR_PLANS[name],
            )
        elif name == LLAMACPP:
            file = write_gguf(directory, directory.parent / "model.gguf")
            self._open(name, "llamacpp.py", rival_environment(threads)).send(
                "load",
                file=str(file),
                num_streams=self._num_streams,
                stream_tokens=self._stream_tokens,
                num_threads=threads,
            )
        else:
            dtype = "float32" if name == TRANSFORMERS_FP32 else "bfloat16"
            side = self._open(name, "hf.py", rival_environment(threads))
            bits = CACHE_BITS.get(name)
            side.send("load", directory=str(directory), dtype=dtype, num_threads=threads, cache_bits=bits)

    def _open(self, name: str, script: str, environment: Mapping[str, str]) -> Side:
        self.sides[name] = self._cleanup.enter_context(Side(SIDES / script, environment))
        return self.sides[name]

    def _our_bytes(self) -> int:
        width = sum(2 * layer.num_kv_heads * (layer.head_dim + layer.v_head_dim) for layer in self.config.layers)
        return (
            weights_bytes(self.config, torch.bfloat16) + self._num_streams * self._stream_tokens * width + SPARE_BYTES
        )

    def _check(self) -> None:
        """Compare the log-probabilities of our 20 most likely tokens behind a prompt and some decoded tokens.

        Ours with another KV plan is the same program, and may answer otherwise.
        """
        (prompt,) = self.prompts(-2, 1, _CHECKED_TOKENS)
        top: dict[str, Any] = {}  # tokens and log-probabilities of ours
        if OURS in self.failures or not self._guard(OURS, lambda n: top.update(self._top(n, prompt))):
            return
        for name in self._rivals:
            if name not in self.failures and name not in OUR_PLANS:
                self._guard(name, lambda n: self._compare(n, prompt, top))

    def _top(self, name: str, prompt: list[int]) -> dict[str, Any]:
        return self.sides[name].ask("top", prompt=prompt, num_tokens=_CHECKED_STEPS, count=20)

    def _compare(self, name: str, prompt: list[int], top: Mapping[str, Any]) -> None:
        side = self.sides[name]
        scored = side.ask("score", prompt=[*prompt, *top["token_ids"]], ids=top["ids"])["logprobs"]
        error = max(abs(ours - theirs) for ours, theirs in zip(top["logprobs"], scored, strict=True))
        if not error <= MAX_LOGPROB_ERROR:
            raise ElbowroomError(
                f"computes another model: log-probabilities differ from ours by {error:.3g}",
                f"at most {MAX_LOGPROB_ERROR} is rounding; compare both with `elbowroom bench parity`",
            )
        self.about[name] = side.ask("about") | {"max_logprob_error": error}

    def _ask(self, name: str, command: str, arguments: Mapping[str, object]) -> Run:
        answer = self.sides[name].ask(command, **arguments)
        rate = answer["tokens"] / answer["seconds"]
        sys.stderr.write(f"  {name} {rate:.1f} tokens/s\n")
        return {_RATE: rate}

    def _guard(self, name: str, step: Callable[[str], object]) -> bool:
        """Run a step of one side; note why it failed and return whether it did not."""
        try:
            step(name)
        except ElbowroomError as error:
            self.failures[name] = one_line(error)
            return False
        return True


def streamed_bytes(config: ModelConfig, item_bytes: int) -> int:
    """Return the bytes of weights that one decode step reads: all but the embedding, of which it reads a row."""
    return (config.num_parameters() - config.vocab_size * config.hidden_size) * item_bytes


def rival_claims(name: str, turns: Turns, targets: Mapping[str, float], unit: str = "x tokens/s") -> list[Claim]:
    """Return one claim for each rival: our rate over its rate is at least the target."""
    sides = {"transformers": TRANSFORMERS, "llamacpp": LLAMACPP}
    return [
        ratio_claim(f"{name}.vs_{rival}", turns, sides[rival], _RATE, target, unit) for rival, target in targets.items()
    ]


def best_dtype_row(turns: Turns) -> Row:
    """Return our rate over that of transformers in whichever dtype it is faster here; bfloat16 may be emulated."""
    rates = {name: turns.figures(name, _RATE) for name in (TRANSFORMERS, TRANSFORMERS_FP32)}
    medians = {name: MedianInterval.of(each).median for name, each in rates.items() if each}
    if not medians:
        return {"ratio": "ours / best of transformers", "value": None}
    best = max(medians, key=lambda name: medians[name])
    ratio = median_ratio(turns, OURS, best, _RATE)
    found = {} if ratio is None else {"value": ratio.median, "low": ratio.low, "high": ratio.high}
    return {"ratio": "ours / best of transformers", "best": best, "value": None, **found}
