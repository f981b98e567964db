"""Bytes and speeds of a KV plan at one length: what `elbowroom compare` measures before it asks anything.

Equal contexts are read and decoded behind, one after the other, and all are held: then the store says what they take
and the operating system what the process took. They end at the stated length, so that a plan which keeps its newest
tokens apart holds some of those, as it nearly always does.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from elbowroom.bench.machine import ForeignCPU
from elbowroom.bench.patching import replaced
from elbowroom.core import STRIP_TOKENS, LayerSpec, PageFormat
from elbowroom.engine.llm import LLM
from elbowroom.engine.output import RequestOutput
from elbowroom.engine.sampling_params import SamplingParams
from elbowroom.engine.session import Session
from elbowroom.errors import IntegrityError, RequestError
from elbowroom.evals.comparison.table import Footprint
from elbowroom.evals.heldout import heldout_texts
from elbowroom.kernels.base import LayerStrips, Progress
from elbowroom.kv.read_count import plane_reads

NEW_TOKENS = 32
"""Tokens decoded behind each context; with them it has the stated length."""
_LETTERS_A_TOKEN = 8
"""Text that is certainly enough."""

StripsOf = Callable[..., LayerStrips | None]


def measure_footprint(llm: LLM, length: int, num_contexts: int, advance: Callable[[int, int], None]) -> Footprint:
    """Read ``num_contexts`` equal contexts, decode behind each up to ``length`` tokens, and measure.

    Args:
        llm: loaded without a prefix cache and not used before, since a process has one peak only.
        length: tokens of each sequence.
        num_contexts: sequences held at once; as many runs are timed, behind one that is not.
        advance: told the contexts that are done and all.

    Raises:
        RequestError: the KV cache does not hold them all.
    """
    tokens = _tokens(llm, length - NEW_TOKENS)
    read_bytes = _warm_up(llm, tokens)
    sessions: list[Session] = []
    prefill, decode = [], []
    with ForeignCPU() as foreign:
        for number in range(num_contexts):
            sessions.append(llm.session())
            output = _ask(sessions[-1], tokens)
            assert output.ttft_s is not None
            prefill.append(len(tokens) / output.ttft_s)
            decode.append((NEW_TOKENS - 1) / (output.duration_s - output.ttft_s))
            advance(number + 1, num_contexts)
    report, meter = llm.engine.kv_report(), llm.engine.parts.meter
    if report.num_sequences < num_contexts:
        raise RequestError(
            f"the KV cache holds {report.num_sequences} of {num_contexts} contexts of {length} tokens",
            "raise --memory, or lower --contexts or --length",
        )
    if report.num_shared_strips:
        raise IntegrityError(f"{report.num_shared_strips} strips of contexts that have nothing in common are shared")
    held = llm.engine.ledger()["kv"]["host"]
    footprint = Footprint(
        length=length,
        num_contexts=num_contexts,
        kv_bytes=report.live_bytes,
        kv_peak_bytes=held["peak_bytes"],
        peak_over_baseline_bytes=meter.peak_over_baseline_bytes,
        baseline_bytes=meter.baseline_bytes,
        read_bytes_per_token=read_bytes,
        prefill_tokens_per_s=statistics.median(prefill),
        decode_tokens_per_s=statistics.median(decode),
        prefill_range=(min(prefill), max(prefill)),
        decode_range=(min(decode), max(decode)),
        foreign_cpu_share=foreign.share,
    )
    for session in sessions:
        session.close()
    return footprint


def strips_read_bytes(strips: LayerStrips, layer: LayerSpec) -> int:
    """Return the bytes of all strips that the step's last token reads in ``layer``: formats times blocks.

    A strip counts whole, with its scales, although of the newest one only the tokens so far are read. Where the token
    selects, it reads the bounds on the keys of all others, and as many of those as it may. Where it reads plane by
    plane, this is what was counted, the mean over all tokens so far.
    """
    position, first_slot = int(strips.step.positions[-1]), int(strips.step.first_slots[-1])
    if layer.window is not None:
        first_slot = max(first_slot, position - layer.window + 1)
    before, selection, fmt = position // STRIP_TOKENS - first_slot // STRIP_TOKENS, strips.selection, strips.fmt
    if isinstance(selection, Progress):
        return _plane_bytes(strips)
    if selection is None or not selection.rows[-1] or before < selection.num_blocks:
        opened = _content_bytes(strips.open_fmt) * fmt.stored_heads // fmt.num_kv_heads  # others are not read there
        return before * _content_bytes(fmt) + opened
    return (
        (selection.num_blocks - 1) * _content_bytes(fmt)
        + _content_bytes(strips.open_fmt)
        + (before - 1) * _bound_bytes(fmt)
    )


def _plane_bytes(strips: LayerStrips) -> int:
    """Return the bytes that a token has read on average, of keys plane by plane and of values."""
    assert strips.tally is not None
    reads = plane_reads(strips.tally[None], [strips.fmt])
    return 0 if reads is None else round(reads.bytes * strips.fmt.num_kv_heads / reads.num_reads)


def _content_bytes(fmt: PageFormat) -> int:
    """Return the bytes of keys and values of a strip, with what decodes them."""
    return fmt.strip_bytes - fmt.digest_bytes


def _bound_bytes(fmt: PageFormat) -> int:
    """Return the bytes that bound the keys of a strip: its digest, or scales and minima where it is sealed."""
    return fmt.digest_bytes or fmt.num_kv_heads * fmt.head_dim * 4 * STRIP_TOKENS // fmt.block


def _tokens(llm: LLM, count: int) -> list[int]:
    """Return ``count`` tokens of held-out text, again from its beginning where it ends."""
    text = "".join(heldout_texts())[: count * _LETTERS_A_TOKEN]
    found = llm.tokenizer.encode(text, add_special_tokens=False)
    return [found[number % len(found)] for number in range(count)]


def _ask(session: Session, tokens: Sequence[int]) -> RequestOutput:
    return session.ask(tokens, SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True))


def _warm_up(llm: LLM, tokens: Sequence[int]) -> int | None:
    """Run once without a clock; return the bytes of the strips that the last decoded token read."""
    store, layers = llm.engine.parts.store, llm.engine.parts.plan.layers
    read: dict[int, LayerStrips | None] = {}
    with replaced(store, "strips", _noting(store.strips, read)), llm.session() as session:
        _ask(session, tokens)
    found = [None if each is None else strips_read_bytes(each, layers[layer]) for layer, each in read.items()]
    if len(found) < len(layers) or None in found:
        return None
    return sum(each for each in found if each is not None)


def _noting(function: StripsOf, into: dict[int, LayerStrips | None]) -> StripsOf:
    """Return ``strips`` of a store, with what it said last of each layer kept."""

    def call(layer: int, *rest: object) -> LayerStrips | None:
        into[layer] = function(layer, *rest)
        return into[layer]

    return call
