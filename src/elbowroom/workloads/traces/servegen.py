"""Trace layout ``servegen``: ServeGen's clients (arXiv 2505.09999), distributions from which requests are drawn.

A folder holds two files for each client: ``chunk-N-trace.csv`` says, for every ten minutes of a day, how many requests
come a second and how unevenly; ``chunk-N-dataset.json`` holds histograms of prompt and answer lengths, and of the share
of an answer that is reasoning, for parts of the day.
"""

from __future__ import annotations

import ast
import csv
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from elbowroom.errors import RequestError
from elbowroom.workloads.arrivals import Arrivals, GammaArrivals, WeibullArrivals
from elbowroom.workloads.base import TimedRequest, Workload
from elbowroom.workloads.lengths import HistogramLengths
from elbowroom.workloads.traces.base import TraceOptions, by_arrival

WINDOW_S = 600
REQUESTS = 1000
"""Drawn, unless told otherwise."""


class ServeGenLayout:
    """Requests of all clients, drawn window by window of the day from the first busy one."""

    name = "servegen"
    description = "a folder of chunk-N-trace.csv and chunk-N-dataset.json"

    def matches(self, path: Path, head: str) -> bool:
        """Return whether the folder has such files."""
        return path.is_dir() and any(path.glob("chunk-*-dataset.json"))

    def read(self, path: Path, options: TraceOptions) -> Workload:
        """Return a workload of ``num_requests`` (1,000 if not said), drawn with ``seed``."""
        clients = [ServeGenClient.load(each) for each in sorted(path.glob("chunk-*-dataset.json"))]
        generator = np.random.default_rng(options.seed)
        most, made = options.num_requests or REQUESTS, list[TimedRequest]()
        for start in sorted({start for client in clients for start in client.arrivals}):
            for client in clients:
                made += client.draw(start, generator)
            if len(made) >= most:
                break
        made.sort(key=lambda each: each.arrival_s)
        return by_arrival(path.name, made[:most])


@dataclass(frozen=True, slots=True)
class ServeGenClient:
    """One client of the service that was observed."""

    name: str
    arrivals: dict[int, Arrivals]
    """By the second of the day at which their window begins; windows without requests are left out."""
    rates: dict[int, float]
    prompts: dict[int, HistogramLengths]
    """By the second of the day from which on they hold."""
    outputs: dict[int, HistogramLengths]
    reasoning: dict[int, tuple[tuple[float, ...], tuple[float, ...]]]
    """Shares and their weights."""

    @classmethod
    def load(cls, dataset: Path) -> ServeGenClient:
        """Read a client's two files.

        Raises:
            RequestError: one is missing or malformed.
        """
        trace = dataset.with_name(dataset.name.replace("-dataset.json", "-trace.csv"))
        name = dataset.name.removesuffix("-dataset.json")
        try:
            parts = json.loads(dataset.read_text(encoding="utf-8"))
            prompts, outputs, reasoning = {}, {}, {}
            for start, fields in parts.items():
                if not (inputs := ast.literal_eval(fields["input_tokens"])):
                    continue  # nobody asked in this part of the day
                prompts[int(start)] = HistogramLengths.of(inputs)
                outputs[int(start)] = HistogramLengths.of(ast.literal_eval(fields["output_tokens"]))
                shares = ast.literal_eval(fields.get("reason_ratio") or "{}") or {0.0: 1.0}
                reasoning[int(start)] = tuple(shares), tuple(shares.values())
        except (OSError, ValueError, SyntaxError, KeyError, AttributeError) as error:
            raise RequestError(f"{dataset}: {error!r}", "take the file from ServeGen's data folder again") from error
        arrivals, rates = _arrivals(trace)
        return cls(name, arrivals, rates, prompts, outputs, reasoning)

    def draw(self, start: int, generator: np.random.Generator) -> list[TimedRequest]:
        """Return the requests of the window that begins at ``start``."""
        arrivals = self.arrivals.get(start)
        if arrivals is None:
            return []
        times = arrivals.times(int(self.rates[start] * WINDOW_S * 2) + 8, generator)
        times = times[times < WINDOW_S]
        return self.lengths(times.size, generator, start, (start + times).tolist())

    def lengths(
        self, count: int, generator: np.random.Generator, start: int | None = None, times: list[float] | None = None
    ) -> list[TimedRequest]:
        """Return ``count`` requests as long as those of a part of the day (None: the first), at ``times`` (None: 0)."""
        part = max((each for each in self.prompts if start is None or each <= start), default=min(self.prompts))
        part = min(self.prompts) if start is None else part
        prompts, outputs = self.prompts[part].draw(count, generator), self.outputs[part].draw(count, generator)
        shares, weights = self.reasoning[part]
        chances = np.asarray(weights) / sum(weights) if sum(weights) > 0 else None
        reasoning = generator.choice(np.asarray(shares), count, p=chances) * outputs
        return [
            TimedRequest(
                arrival_s=0.0 if times is None else times[i],
                num_prompt_tokens=int(prompts[i]),
                num_output_tokens=int(outputs[i]),
                tenant=self.name,
                num_reasoning_tokens=min(int(reasoning[i]), int(outputs[i])),
            )
            for i in range(count)
        ]


def _arrivals(trace: Path) -> tuple[dict[int, Arrivals], dict[int, float]]:
    made: dict[int, Arrivals] = {}
    rates: dict[int, float] = {}
    number = 0
    try:
        with trace.open(encoding="utf-8", newline="") as lines:
            for row in csv.reader(lines):
                number += 1
                start, rate, cv, family = int(float(row[0])), float(row[1]), float(row[2] or 0), row[3]
                if rate <= 0 or cv <= 0:
                    continue
                rates[start] = rate
                weibull = family.lower() == "weibull" and float(row[4]) > 0
                made[start] = WeibullArrivals(rate, float(row[4])) if weibull else GammaArrivals(rate, cv)
    except (OSError, ValueError, IndexError) as error:
        raise RequestError(
            f"{trace}, line {number}: {error}", "take the file from ServeGen's data folder again"
        ) from error
    return made, rates
