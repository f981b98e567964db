"""Trace layout ``sharegpt``: conversations as JSON; lengths come from a tokenizer, arrivals are Poisson."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from elbowroom.errors import RequestError
from elbowroom.workloads.arrivals import PoissonArrivals
from elbowroom.workloads.base import TimedRequest, Workload
from elbowroom.workloads.traces.base import Fields, TraceOptions, by_arrival, json_keys, json_rows

THINK_S = 30.0
"""Mean seconds between two turns of a conversation: the files do not say."""


class ShareGPTLayout:
    """Each conversation is a session, each answer in it a request whose prompt is all before it."""

    name = "sharegpt"
    description = 'JSON list or lines of {"id", "conversations": [{"from": "human"|"gpt", "value"}]}'

    def matches(self, path: Path, head: str) -> bool:
        """Return whether conversations are in its beginning."""
        return "conversations" in json_keys(head) or (
            head.lstrip().startswith("[") and '"conversations"' in _start(path)
        )

    def read(self, path: Path, options: TraceOptions) -> Workload:
        """Return the workload."""
        count = options.count_tokens
        if count is None:
            raise RequestError(
                f"{path} holds texts, whose tokens must be counted", "name a model whose tokenizer counts them"
            )
        generator = np.random.default_rng(options.seed)
        conversations = _all(path)
        starts = PoissonArrivals(options.rate).times(len(conversations), generator).tolist()
        made: list[TimedRequest] = []
        for number, (fields, start) in enumerate(zip(conversations, starts, strict=True), start=1):
            try:
                made += _turns(fields, str(fields.get("id", number)), start, count, generator)
            except (KeyError, TypeError, AttributeError) as error:
                raise RequestError(f"{path}, conversation {number}: {error!r}", "repair or delete it") from error
            if options.num_requests is not None and len(made) >= options.num_requests:
                break
        return by_arrival(path.stem, made[: options.num_requests])


def _start(path: Path) -> str:
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        return file.read(4096)


def _all(path: Path) -> list[Fields]:
    made: list[Fields] = []
    try:
        for fields in _conversations(path):
            made.append(fields)  # noqa: PERF402  (how many there are says where the next one is broken)
    except ValueError as error:
        raise RequestError(f"{path}, behind conversation {len(made)}: {error}", "repair or delete it") from error
    return made


def _conversations(path: Path) -> Iterator[Fields]:
    if not _start(path).lstrip().startswith("["):
        yield from json_rows(path)
        return
    yield from json.loads(path.read_text(encoding="utf-8-sig"))


def _turns(
    fields: Fields, session: str, start: float, count: Callable[[str], int], generator: np.random.Generator
) -> list[TimedRequest]:
    made: list[TimedRequest] = []
    known, arrival = 0, start
    for message in fields["conversations"]:
        tokens = count(message["value"])
        if message["from"] in ("gpt", "assistant", "chatgpt", "bing", "bard") and known and tokens:
            made.append(TimedRequest(arrival, known, tokens, session=session))
            arrival += float(generator.exponential(THINK_S))
        known += tokens
    return made
