"""What scheduler, executors and the engine tell each other. Plain data: no tensors, no clocks, no I/O."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from elbowroom.engine.sampling_params import SamplingParams
from elbowroom.kv.base import PromptPart

FinishReason = Literal["stop", "length", "abort", "error"]
Phase = Literal["reasoning", "answer"]


@dataclass(frozen=True, slots=True)
class SessionRef:
    """The parked sequence that a request continues, and the one it branches from when its own is new."""

    key: int
    parent: int | None = None


class Stem(NamedTuple):
    """A prefix of a request's prompt that later requests begin with, too."""

    key: bytes
    """Names exactly these tokens."""
    num_tokens: int
    to_come: int
    """Requests with it that are still to be added after this one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request as the scheduler sees it; token ids only."""

    id: int
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    arrival_s: float = 0.0
    tenant: str = ""
    priority: int = 0
    """Lower runs first."""
    deadline_s: float | None = None
    """When its first token is due, on the clock of ``arrival_s``; what the order ``slo`` goes by."""
    salt: bytes = b""
    """Requests share cached prefixes only with equal salts (tenant isolation)."""
    adapter: str = ""
    tags: tuple[str, ...] = ()
    block_keys: tuple[bytes, ...] | None = None
    """Keys of the prompt's blocks where the tokens are unknown (some traces have only hashes)."""
    session: SessionRef | None = None
    plan: int = 0
    """Number of the KV plan that it asks for, of those that the engine has."""
    num_output_tokens: int | None = None
    """How long the answer will be, where a trace says so: for simulations, which end it there, and for oracles."""
    keeps_plan: bool = False
    """Whether it must not be turned into the relief plan when memory is short."""
    admission: str | None = None
    """Name of the admission policy that is asked about it; None: the scheduler's own."""
    stems: tuple[Stem, ...] | None = None
    """Where it is known what requests share: such prefixes, shortest first. Nothing else of it is cached then."""


RowKind = Literal["chunk", "decode", "verify", "repair"]
TransferKind = Literal["save", "load"]
OpKind = Literal["open", "fork", "truncate", "convert", "close", "save", "load", "forget"]


@dataclass(frozen=True, slots=True)
class KVOp:
    """One change of stored sequences, applied in order before the rows of a step.

    ``open`` makes ``slot`` empty, under ``plan`` (``num_tokens``: how long it may become, a hint); ``fork`` makes
    ``slot`` share the first ``num_tokens`` of ``source``; ``truncate`` keeps the first ``num_tokens`` of ``slot``;
    ``convert`` keeps the tokens of ``slot`` under another ``plan``; ``close`` forgets it.

    ``save`` makes the object ``key`` hold the first ``num_tokens`` of ``slot``; only what it does not hold of this
    sequence already is written. The slot stays as it is; changing it waits for the transfer. ``load`` makes ``slot``,
    under ``plan``, a sequence of the first ``num_tokens`` of the object ``key``; a row that names it waits for the
    transfer, and is not computed if that fails. ``forget`` deletes the object ``key``, once its transfer has ended.
    Transfers end in ``StepResult.moved``: those with ``is_async`` in any later result, others in that of the step.
    """

    kind: OpKind
    slot: int
    source: int = -1
    num_tokens: int = 0
    plan: int = 0
    key: str = ""
    """Name of the object that ``save``, ``load`` and ``forget`` mean."""
    is_async: bool = False
    """Whether steps go on while the tokens are written or read."""


class Moved(NamedTuple):
    """A transfer that has ended."""

    kind: TransferKind
    slot: int
    key: str
    num_tokens: int
    """Tokens that the object (``save``) or the slot (``load``) holds now."""
    seconds: float
    """From its start to its end."""
    num_bytes: int
    """Bytes written or read: of a save only what was new."""
    num_copies: int
    """Runs of bytes, side by side in memory, that they were moved as."""
    error: str | None = None
    """Why it failed. The slot is unchanged (``save``) or absent (``load``), and the object is gone."""


@dataclass(frozen=True, slots=True)
class SampleSpec:
    """What sampling needs to know of the sequence behind a row."""

    params: SamplingParams
    seed: int
    sample: int
    num_prompt_tokens: int
    history: Sequence[int] | None
    """Tokens before the new one (prompt and output), given when the slot is new to the executor."""
    num_output_tokens: int | None = None
    """How long the answer will be, where a trace says so."""
    max_new_tokens: int | None = None
    """Output tokens at which the sequence ends."""


class Row(NamedTuple):
    """Work for one slot in one step: compute positions ``start .. start + num_tokens - 1``."""

    slot: int
    kind: RowKind
    start: int
    num_tokens: int
    tokens: Sequence[int] | None
    """Their token ids; None means the last token sampled for this slot."""
    sample: SampleSpec | None
    """Set when a token is to be sampled behind the last position."""
    prompt: PromptPart = PromptPart.NONE
    """Whether the tokens are part of a prompt, or its end, or a policy chooses behind a generated one."""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step: changes of stored sequences, then one forward pass over the rows."""

    ops: tuple[KVOp, ...]
    rows: tuple[Row, ...]
    valid_for_steps: int = 1
    """The rows may be repeated this often (each time one token further) before the scheduler must decide again."""
    waits: bool = False
    """There is nothing to compute: the step may last until a transfer under way has ended, or for a moment of that."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the forward pass."""
        return sum(row.num_tokens for row in self.rows)


class SampledToken(NamedTuple):
    """A chosen token and, when asked for, log-probabilities (natural log, of the unchanged distribution)."""

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class StepResult:
    """What an executor made of a plan."""

    tokens: dict[int, list[SampledToken]]
    """Slot -> sampled tokens, one for each step done."""
    num_steps: int = 1
    duration_s: float = 0.0
    shortfall_bytes: int = 0
    """Above zero: the store lacked this many bytes and no row was computed."""
    stranded: tuple[int, ...] = ()
    """Slots that should have gone over to another plan and could not: no row of theirs was computed."""
    step_ends_s: tuple[float, ...] = ()
    """Seconds from the start to the end of each step done, where they are known one by one."""
    moved: tuple[Moved, ...] = ()
    """Transfers that have ended."""


@dataclass(slots=True)
class SequenceUpdate:
    """News of one sample of a request after a step."""

    request_id: int
    sample: int
    tokens: list[SampledToken]
    finish_reason: FinishReason | None = None
    error: Exception | None = None
    cached_tokens: int = 0
    """Prompt tokens that were not computed because a cached prefix held them."""
    is_relieved: bool = False
    """Whether its tokens are kept under the relief plan now, because memory was short."""


@dataclass(slots=True)
class SchedulerStats:
    """Counters and gauges; counters only grow."""

    num_waiting: int = 0
    num_running: int = 0
    num_parked: int = 0
    kv_used_bytes: int = 0
    kv_capacity_bytes: int = 0
    cached_blocks: int = 0
    preemptions: int = 0
    reliefs: int = 0
    """Sequences that were turned into the relief plan."""
    swaps_out: int = 0
    """Sequences that were saved to the swap tier, and those that came back from it."""
    swaps_in: int = 0
    swapped_bytes: int = 0
    failed_swaps: int = 0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    generated_tokens: int = 0
    evicted_blocks: int = 0
    finished: dict[str, int] = field(default_factory=dict)
