"""SeqState: one sample of a request while the scheduler works on it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from elbowroom.engine.accounting import Dropped, KVPricing, num_blocks
from elbowroom.engine.prefix import Node
from elbowroom.engine.types import FinishReason, Request, SampledToken, SampleSpec
from elbowroom.kv.base import PromptPart


@dataclass(frozen=True, slots=True)
class Saved:
    """What the swap tier holds of a sequence."""

    key: str
    plan: int
    """Number of the KV plan that it was stored under."""
    num_tokens: int


@dataclass(slots=True, eq=False)
class SeqState:
    """Tokens, progress and KV bookkeeping of one sample.

    ``tokens`` holds prompt and output; the first ``num_computed`` of them are in the store. A running sequence always
    has at least one token left to compute: the next row.
    """

    request: Request
    sample: int
    order: int
    """Arrival number; ties of priority are settled by it, and the youngest is preempted first."""
    seed: int
    max_new_tokens: int
    stop_token_ids: frozenset[int]
    """Tokens behind which it ends."""
    tokens: list[int]
    keys: list[bytes]
    """Block keys of the prompt's full blocks, then of generated ones as they fill."""
    plan: int
    """Number of the KV plan that it has now; not the one of its request where memory was short."""
    pricing: KVPricing
    """Of that plan."""
    num_computed: int = 0
    slot: int = -1
    shared: Node | None = None
    """Deepest cached node that this sequence shares; its blocks are paid by the index."""
    num_blocks: int = 0
    """Tokens of so many blocks can be computed without paying more, as long as nothing is chosen."""
    paid_bytes: int = 0
    """What is paid for them, shared ones included."""
    dropped: Dropped = ()
    """What the plan's policy has dropped."""
    num_cached_tokens: int = 0
    is_new_to_executor: bool = True
    saved: Saved | None = None
    is_leaving: bool = False
    """Whether it is being saved."""
    is_loading: bool = False
    """Whether it is being read back."""
    num_steps_run: int = 0
    """Steps that it got rows in since it began or came back."""
    num_preemptions: int = 0
    num_prompt: int = field(init=False)
    """Prompt tokens."""
    limit: int = field(init=False)
    """Tokens in all at which it ends."""
    rank: tuple[float, ...] = field(init=False)
    """Place in the order of service, as the order policy said last."""
    spec: SampleSpec = field(init=False)
    """What the executor needs for choosing the next token, once it knows the slot."""

    def __post_init__(self) -> None:
        """Derive what is asked for in every step."""
        self.num_prompt = len(self.request.prompt_token_ids)
        self.rank = (self.order, self.sample)
        self.limit = self.num_prompt + self.max_new_tokens
        request = self.request
        self.spec = SampleSpec(
            request.sampling,
            self.seed,
            self.sample,
            self.num_prompt,
            None,
            request.num_output_tokens,
            self.max_new_tokens,
        )

    @property
    def num_generated(self) -> int:
        """Output tokens so far."""
        return len(self.tokens) - self.num_prompt

    @property
    def num_left(self) -> int:
        """Tokens not yet computed."""
        return len(self.tokens) - self.num_computed

    @property
    def shared_blocks(self) -> int:
        """Leading blocks that the prefix index pays for."""
        return 0 if self.shared is None else self.shared.depth

    @property
    def is_relieved(self) -> bool:
        """Whether it has another plan than it asked for, because memory was short."""
        return self.plan != self.request.plan

    def price_at(self, stop: int, prompt: PromptPart) -> int:
        """Return the bytes that it has to have paid when it is computed up to ``stop``, ``prompt`` being that step."""
        if prompt is PromptPart.CHOICE:
            return self.pricing.renewal_bytes(stop, self.dropped)
        if prompt and self.pricing.chooses:
            return self.pricing.peak_bytes(stop, self.dropped, self.num_computed)
        return self.pricing.price(num_blocks(stop), self.dropped)

    def sample_spec(self) -> SampleSpec:
        """Return what the executor needs for choosing the next token."""
        if not self.is_new_to_executor:
            return self.spec
        self.is_new_to_executor = False
        return replace(self.spec, history=tuple(self.tokens))


def until_end(seq: SeqState, tokens: list[SampledToken]) -> tuple[list[SampledToken], FinishReason | None]:
    """Return those of its next tokens that ``seq`` keeps, and why it ends with the last of them, if it does."""
    room, stops = seq.limit - len(seq.tokens), seq.stop_token_ids
    if len(tokens) < room and stops.isdisjoint([token.token_id for token in tokens]):
        return tokens, None
    for count, token in enumerate(tokens, start=1):
        if token.token_id in stops:
            return tokens[:count], "stop"
        if count >= room:
            return tokens[:count], "length"
    return tokens, None


@dataclass(frozen=True, slots=True)
class Stowed:
    """A session between two requests that only the swap tier holds."""

    asked_plan: int
    """Number of the plan that its requests asked for."""
    tokens: list[int]
    """Exactly the tokens that are saved."""
    saved: Saved

    def suits(self, request: Request) -> bool:
        """Return whether a request may go on from here."""
        return self.asked_plan == request.plan and (self.saved.plan == request.plan or not request.keeps_plan)


@dataclass(slots=True, eq=False)
class Parked:
    """The stored sequence of a session between two requests."""

    slot: int
    asked_plan: int
    """Number of the plan that its requests asked for."""
    plan: int
    """Number of the plan that it has."""
    pricing: KVPricing
    tokens: list[int]
    """Exactly the tokens in the store."""
    shared: Node | None
    num_blocks: int
    paid_bytes: int
    dropped: Dropped
    last_used: int
    saved: Saved | None = None
    """What the swap tier holds of it."""

    def suits(self, request: Request) -> bool:
        """Return whether a request may go on from here: under the plan that it asks for, or relieved, if it may be."""
        return self.asked_plan == request.plan and (self.plan == request.plan or not request.keeps_plan)


StemKey = tuple[int, bytes, str, bytes]
"""Plan, salt, adapter and tokens."""


@dataclass(slots=True, eq=False)
class KeptStem:
    """A prefix that requests have in common."""

    to_come: int = 0
    """Requests with it that were announced and not added yet."""
    num_live: int = 0
    """Samples with it that wait or run."""
    stored: Parked | None = None
    """Its keys and values, once some sequence has computed them."""
