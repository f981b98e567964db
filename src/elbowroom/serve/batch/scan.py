"""Scan: reads the whole input once, and says which lines run and what they share; memory holds a few bytes of each."""

from __future__ import annotations

import errno
import hashlib
from array import array
from collections.abc import Container, Sequence
from dataclasses import dataclass, field

from elbowroom.engine.engine import Engine
from elbowroom.engine.offline.plan import JobPlan, Order
from elbowroom.engine.offline.prompts import PromptSpool
from elbowroom.engine.offline.tree import PrefixTree
from elbowroom.engine.types import Request
from elbowroom.errors import ElbowroomError
from elbowroom.serve.batch.journal import OutputFailed
from elbowroom.serve.batch.lines import call_of, parse_line
from elbowroom.serve.batch.source import BatchInput
from elbowroom.serve.call import Call
from elbowroom.serve.context import ServerContext

_LINE_BYTES, _PROMPT_BYTES, _NODE_BYTES = 200, 200, 160
"""What a line, a prompt and a node of the tree take here, about."""


@dataclass(slots=True)
class Scan:
    """Lines and prompts of a job, by number."""

    spool: PromptSpool
    tree: PrefixTree
    num_lines: int = 0
    """All that are not blank."""
    refused: array[int] = field(default_factory=lambda: array("q"))
    """Lines whose errors are their answers, but for duplicates."""
    duplicates: dict[int, str] = field(default_factory=dict)
    """Lines whose ``custom_id`` an earlier one has."""
    lines: array[int] = field(default_factory=lambda: array("q"))
    """Line of each prompt."""
    parts: array[int] = field(default_factory=lambda: array("q"))
    """Which of its line's prompts each is."""
    new_tokens: array[int] = field(default_factory=lambda: array("q"))
    """Tokens that each may generate."""
    kv_plans: array[int] = field(default_factory=lambda: array("q"))
    """Number of the KV plan of each."""
    longest: int = 1
    """Tokens of the longest prompt."""

    @property
    def held_bytes(self) -> int:
        """Bytes that the plan of the job keeps in memory, about."""
        return _LINE_BYTES * self.num_lines + _PROMPT_BYTES * len(self.lines) + _NODE_BYTES * len(self.tree)

    def plan(self, order: Order) -> JobPlan:
        """Return in which order the prompts run."""
        return JobPlan.of(self.tree, self.spool, self.new_tokens, order)


def scan(source: BatchInput, context: ServerContext, engine: Engine, spool: PromptSpool, done: Container[int]) -> Scan:
    """Read the input.

    Args:
        source: the input.
        context: models and limits, as of a server.
        engine: the one that will run it.
        spool: gets the prompts.
        done: lines that were answered before.

    Raises:
        OutputFailed: the disk has no room for the prompts' token ids.
    """
    found = Scan(spool, PrefixTree(spool))
    seen: set[bytes] = set()
    try:
        for number, data in source.lines():
            found.num_lines += 1
            try:
                line = parse_line(data, source.most_bytes)
                name = hashlib.blake2b(line.custom_id.encode("utf-8", "surrogatepass"), digest_size=12).digest()
                if name in seen:
                    found.duplicates[number] = line.custom_id
                    continue
                seen.add(name)
                if number not in done:
                    call = call_of(context, line)
                    prompts = call.encode()
                    limits = check(call, prompts, context, engine)
                    _note(found, number, call, prompts, limits)
            except ElbowroomError:
                found.refused.append(number)
        spool.flush()
        for prompt in range(len(spool)):
            found.tree.insert(prompt, found.tree.weight.get(prompt, 1))
    except OSError as reason:
        if reason.errno != errno.ENOSPC:
            raise
        hint = "free some space beside the output: 4 bytes for each prompt token"
        raise OutputFailed(f"cannot keep the prompts' tokens: {reason.strerror}", hint) from reason
    return found


def check(call: Call, prompts: list[list[int]], context: ServerContext, engine: Engine) -> list[int]:
    """Return the tokens that each prompt may generate.

    Raises:
        RequestError: the call is refused.
    """
    call.generation(context, prompts)
    parts = engine.parts
    number = parts.plans.number(call.body.kv)
    limits = []
    for ids in prompts:
        parts.tokenizer.check_ids(ids, parts.config.vocab_size)
        request = Request(id=0, prompt_token_ids=tuple(ids), sampling=call.sampling, plan=number)
        limits.append(parts.core.scheduler.most_new_tokens(request))
    return limits


def _note(found: Scan, number: int, call: Call, prompts: Sequence[list[int]], limits: Sequence[int]) -> None:
    kv_plan = call.model.llm.engine.parts.plans.number(call.body.kv)
    for part, (ids, limit) in enumerate(zip(prompts, limits, strict=True)):
        prompt = found.spool.append(ids)
        if call.sampling.n > 1:
            found.tree.weight[prompt] = call.sampling.n
        found.lines.append(number)
        found.parts.append(part)
        found.new_tokens.append(limit)
        found.kv_plans.append(kv_plan)
        found.longest = max(found.longest, len(ids))
