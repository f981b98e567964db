"""KVPlan: how a sequence's keys and values are kept, written as text and priced in bytes.

``KVPlan.parse("plain(bf16)")`` reads a plan; ``plan.bind(layers, dtype)`` fixes it to a model and gives ``curve``,
the bytes that admission and planning count with.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from elbowroom.core import STRIP_TOKENS, LayerSpec, PageFormat
from elbowroom.errors import ConfigError, PlanError
from elbowroom.kernels.digest import digest_bytes
from elbowroom.kv.codecs import CODECS, Codec
from elbowroom.kv.codecs.plain import PlainCodec
from elbowroom.kv.holding import ROLLBACK_TOKENS
from elbowroom.kv.policies import POLICIES, TokenPolicy
from elbowroom.kv.reads import READS, ReadPolicy

if TYPE_CHECKING:
    from elbowroom.kv.adapters.hf_cache import StoreCache

_Part = TypeVar("_Part")
_NO_LIMIT = 2**40
_PART = re.compile(r"\s*([a-z][a-z0-9_-]*)\s*(?:\(([^()]*)\))?\s*")
_HINT = 'a plan is parts joined by "|", e.g. "plain", "plain(bf16)" or "snapkv(tokens=512) | int8"'


@dataclass(frozen=True, slots=True)
class KVCurve:
    """Bytes of one sequence: resident after each length, and on top while a step runs."""

    resident_bytes: npt.NDArray[np.int64]
    """One value for every asked length."""
    transient_bytes: int
    """Extra bytes while a step appends ``step_tokens``: windows expire, strips are sealed, tokens chosen behind it."""


@dataclass(frozen=True, slots=True)
class KVPlan:
    """A parsed plan; immutable, comparable, printable."""

    codec: Codec
    policy: TokenPolicy | None = None
    """Which tokens of a prompt stay; None: all."""
    reads: ReadPolicy | None = None
    """Which of those that stay a decoding token reads; None: all."""

    @property
    def text(self) -> str:
        """The plan as text, one spelling for equal plans; ``parse`` reads it back."""
        return " | ".join(_canonical(part) for part in (self.policy, self.reads, self.codec) if part is not None)

    def __str__(self) -> str:
        """Return ``text``."""
        return self.text

    @classmethod
    def parse(cls, text: str | KVPlan | None) -> KVPlan:
        """Return the plan that ``text`` describes; None means ``plain``.

        Raises:
            PlanError: unknown part or parameter; the message names what there is.
        """
        if isinstance(text, KVPlan):
            return text
        codec: Codec | None = None
        policy: TokenPolicy | None = None
        reads: ReadPolicy | None = None
        for part in (text or "plain").split("|"):
            match = _PART.fullmatch(part)
            if match is None:
                raise PlanError(f"cannot read {part.strip()!r} in KV plan {text!r}", _HINT)
            name, arguments = match[1], match[2] or ""
            if name in POLICIES.names():
                if policy is not None:
                    raise PlanError(f"KV plan {text!r} names two policies", _HINT)
                policy = _make("policy", POLICIES.get(name), name, arguments)
            elif name in READS.names():
                if reads is not None:
                    raise PlanError(f"KV plan {text!r} names two read policies", _HINT)
                reads = _make("read policy", READS.get(name), name, arguments)
            else:
                if codec is not None:
                    raise PlanError(f"KV plan {text!r} names two codecs", _HINT)
                codec = _make("codec", _codec_called(name), name, arguments)
        return cls(codec or PlainCodec(), policy, reads)

    def bind(self, layers: Sequence[LayerSpec], dtype: str) -> BoundPlan:
        """Fix the plan to a model's layers and activation dtype (``float32``, ``bfloat16``, ``float16``).

        Raises:
            ConfigError: a layer reads keys and values of another one that does not hold them.
            PlanError: codec or policy do not suit the layers.
        """
        for index in range(len(layers)):
            _check_source(layers, index)
        if self.policy is not None:
            _check_choice(self.policy, layers)
        formats = tuple(
            self._with_digest(self.codec.page_format(layer, dtype), layers, index) for index, layer in enumerate(layers)
        )
        tails = tuple(PlainCodec().page_format(layer, dtype) for layer in layers) if self.codec.seals else ()
        plan = BoundPlan(self, tuple(layers), formats, tails)
        if self.reads is not None and not any(map(plan.selects, range(len(layers)))):
            raise PlanError(
                f"KV read policy {self.reads.name!r} has nothing to choose from: each of {len(layers)} layers reads a "
                "sliding window, or is one of the first that read everything",
                "lower skip, or leave the read policy out",
            )
        return plan

    def selects(self, layers: Sequence[LayerSpec], index: int) -> bool:
        """Return whether decoding tokens choose what they read in layer ``index`` of ``layers``."""
        if self.reads is None or not self.reads.selects(index):
            return False
        source = layers[index].kv_source
        return layers[index].window is None and (source is None or layers[source].window is None)

    def _with_digest(self, fmt: PageFormat, layers: Sequence[LayerSpec], index: int) -> PageFormat:
        """Return ``fmt`` with room for the bounds on a layer's keys, if some layer chooses by them.

        Sealed strips tell theirs without.
        """
        readers = [reader for reader, layer in enumerate(layers) if index in (reader, layer.kv_source)]
        if self.reads is None or self.codec.seals or not any(self.selects(layers, reader) for reader in readers):
            return fmt
        return replace(fmt, digest_bytes=digest_bytes(fmt.num_kv_heads, fmt.head_dim, self.reads.run_tokens))

    def for_hf(self, model: Any, memory: str | int = "80%") -> StoreCache:
        """Return a cache for ``model.generate(..., past_key_values=cache)`` of a transformers model on the CPU.

        Until ``cache.close()`` the model computes attention by this library.

        Args:
            model: a decoder as transformers has it.
            memory: most bytes of keys and values, such as ``512MiB``; a share is one of what is available now.

        Raises:
            PlanError: transformers is missing or too old, or this plan cannot keep what the model attends to.
            RequestError: ``memory`` is not an amount.
        """
        from elbowroom.kv.adapters.hf import open_cache

        return open_cache(self, model, memory)


@dataclass(frozen=True, slots=True)
class BoundPlan:
    """A plan and the model it is for."""

    plan: KVPlan
    layers: tuple[LayerSpec, ...]
    formats: tuple[PageFormat, ...]
    tails: tuple[PageFormat, ...] = ()
    """Formats of the strip that is not full yet, where full ones are sealed; else empty."""

    def selects(self, layer: int) -> bool:
        """Return whether decoding tokens choose what they read in ``layer``."""
        return self.plan.selects(self.layers, layer)

    @property
    def block_bytes(self) -> int:
        """Bytes of one token block (64 tokens) over all layers."""
        return sum(fmt.strip_bytes for layer, fmt in zip(self.layers, self.formats, strict=True) if _owns(layer))

    @property
    def tail_bytes(self) -> int:
        """Bytes of the one strip a layer of each sequence that is not sealed; 0 where tokens are written one by one."""
        return sum(fmt.strip_bytes for layer, fmt in zip(self.layers, self.tails, strict=False) if _owns(layer))

    @property
    def chosen_bytes(self) -> int:
        """Bytes of one token block over the layers that a policy chooses from."""
        pairs = zip(self.layers, self.formats, strict=True)
        return sum(fmt.strip_bytes for layer, fmt in pairs if _is_chosen(layer))

    @property
    def chosen_layers(self) -> list[int]:
        """Layers that the policy chooses from; empty without one."""
        if self.plan.policy is None:
            return []
        return [index for index, layer in enumerate(self.layers) if _is_chosen(layer)]

    @property
    def defers(self) -> bool:
        """Whether a prompt's blocks wait for its end to be sealed: a policy chooses before the codec rounds."""
        return bool(self.tails) and self.plan.policy is not None

    @property
    def has_windows(self) -> bool:
        """Whether some layer forgets tokens behind a sliding window."""
        return any(layer.window is not None for layer in self.layers)

    @property
    def shares_prefixes(self) -> bool:
        """Whether a prefix means the same to every sequence: no window expires it, no policy chose from it."""
        return not self.has_windows and self.plan.policy is None

    @property
    def rollback_grain(self) -> int:
        """A sequence can always go back to multiples of so many tokens; 0: only to its beginning."""
        if not self.shares_prefixes:
            return 0
        return STRIP_TOKENS if self.tails else 1

    def curve(self, prompt_tokens: int, total_tokens: npt.NDArray[np.int64], step_tokens: int = 1) -> KVCurve:
        """Return the bytes of a sequence at each of ``total_tokens``.

        Args:
            prompt_tokens: length of its prompt (plans that compress at the prompt's end depend on it).
            total_tokens: int64 ``[n]``, prompt and generated tokens.
            step_tokens: most tokens that one step appends.
        """
        totals = np.asarray(total_tokens, dtype=np.int64)
        resident = (totals % STRIP_TOKENS > 0) * self.tail_bytes
        transient = self._staging_bytes(step_tokens)
        for index, (layer, fmt) in enumerate(zip(self.layers, self.formats, strict=True)):
            if not _owns(layer):
                continue
            kept = self._kept_tokens(index, prompt_tokens, totals)
            if self.defers and _is_chosen(layer):
                waiting = np.minimum(totals, self._most_read(index, prompt_tokens))
                strips = -(-waiting // STRIP_TOKENS) * self.tails[index].strip_bytes
                sealed = kept // STRIP_TOKENS * fmt.strip_bytes
                resident = resident + np.where(totals > prompt_tokens, sealed, strips)
                continue
            blocks = kept // STRIP_TOKENS if self.tails else -(-kept // STRIP_TOKENS)
            if layer.window is not None:
                # A step that ends at n leaves blocks from (n - ROLLBACK_TOKENS - window + 1) // 64 on.
                blocks = np.minimum(blocks, (layer.window + ROLLBACK_TOKENS + STRIP_TOKENS - 3) // STRIP_TOKENS + 1)
                transient += fmt.strip_bytes * -(-step_tokens // STRIP_TOKENS)
            resident = resident + blocks * fmt.strip_bytes
        return KVCurve(resident, transient)

    def limits(self, *, ends_prompt: bool) -> npt.NDArray[np.int64]:
        """Return the most tokens that each layer holds behind a step which reads a prompt, or ends one.

        Layers from which nothing is chosen have a limit that no sequence reaches.
        """
        policy = self.plan.policy
        return np.asarray(
            [
                policy.limit(index, ends_prompt) if policy is not None and _is_chosen(layer) else _NO_LIMIT
                for index, layer in enumerate(self.layers)
            ],
            dtype=np.int64,
        )

    def dropped_blocks(
        self, dropped: npt.NDArray[np.int64], num_tokens: int, *, ends_prompt: bool
    ) -> npt.NDArray[np.int64]:
        """Return the blocks' worth of tokens that each layer has given up behind a step that reads a prompt.

        Args:
            dropped: int64 ``[num_layers]``, those before the step.
            num_tokens: tokens of the sequence behind it.
            ends_prompt: whether the step ends the prompt.
        """
        if self.plan.policy is None:
            return dropped
        above = num_tokens - STRIP_TOKENS * dropped - self.limits(ends_prompt=ends_prompt)
        gone: npt.NDArray[np.int64] = dropped + np.maximum(-(-above // STRIP_TOKENS), 0)
        return gone

    def _kept_tokens(self, index: int, prompt_tokens: int, totals: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the tokens that a layer holds at each of ``totals``: while a prompt is read and behind it."""
        policy = self.plan.policy
        if policy is None or not _is_chosen(self.layers[index]):
            return totals
        end_limit = policy.limit(index, ends_prompt=True)
        dropped = max(-(-(prompt_tokens - end_limit) // STRIP_TOKENS), 0)
        most = self._most_read(index, prompt_tokens)
        return np.where(totals > prompt_tokens, totals - dropped * STRIP_TOKENS, np.minimum(totals, most))

    def _most_read(self, index: int, prompt_tokens: int) -> int:
        """Return the most tokens of a chosen layer while a prompt is read: what stays, and where it is written anew."""
        policy = self.plan.policy
        assert policy is not None
        if prompt_tokens <= policy.limit(index, ends_prompt=True) and not self.defers:
            return prompt_tokens
        return 2 * min(prompt_tokens, policy.limit(index, ends_prompt=False) + STRIP_TOKENS)

    def choice_bytes(self, step_tokens: int) -> int:
        """Return the most temporary bytes while a policy chooses in one layer behind a step of ``step_tokens``.

        Keys of a head in float32 and as they are stored, three times the scores of the window's queries, the strips'
        bytes on their way, and attention, whose output then lies outside the workspace.
        """
        policy = self.plan.policy
        if policy is None:
            return 0
        most = 0
        for index, layer in enumerate(self.layers):
            tokens = policy.limit(index, ends_prompt=False) + step_tokens + STRIP_TOKENS
            scores = (12 * layer.group_size + 1) * policy.window
            moved = 8 * (layer.head_dim + layer.v_head_dim) * (layer.num_kv_heads if self.defers else 1)
            most = max(most, tokens * (scores + 8 * layer.head_dim + moved))
        return most + max(4 * step_tokens * layer.num_q_heads * (layer.v_head_dim + 1) for layer in self.layers)

    def _staging_bytes(self, step_tokens: int) -> int:
        """Return what a step holds on top: blocks that wait, in one layer a pool, to be sealed or chosen from."""
        if self.plan.policy is not None:
            formats = self.tails or self.formats
            chosen = {fmt for layer, fmt in zip(self.layers, formats, strict=True) if layer.window is None}
            staging = (-(-step_tokens // STRIP_TOKENS) + 1) * sum(fmt.strip_bytes for fmt in chosen)
            return staging + self._passing_bytes(step_tokens)
        return self._passing_bytes(step_tokens)

    def _passing_bytes(self, step_tokens: int) -> int:
        """Return the bytes of blocks that a step fills and seals at once, in one layer a pool."""
        staged = {
            (fmt, layer.window, tail) for layer, fmt, tail in zip(self.layers, self.formats, self.tails, strict=False)
        }
        passing = step_tokens // STRIP_TOKENS if step_tokens > ROLLBACK_TOKENS else 0
        return passing * sum(tail.strip_bytes for *_, tail in staged)

    def fingerprint(self) -> bytes:
        """Return 16 bytes that differ whenever stored strips would not be interchangeable."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(f"v1|{self.plan.text}|{self.formats}|{self.tails}|{self.layers}".encode())
        return digest.digest()


def _owns(layer: LayerSpec) -> bool:
    """Whether ``layer`` stores keys and values of its own."""
    return layer.kv_source is None


def _is_chosen(layer: LayerSpec) -> bool:
    """Whether a policy chooses among the tokens of ``layer``."""
    return _owns(layer) and layer.window is None


def _check_choice(policy: TokenPolicy, layers: Sequence[LayerSpec]) -> None:
    """A policy needs a layer that reads everything; what a window reads must not have been chosen from."""
    if all(layer.window is not None for layer in layers):
        raise PlanError(
            f"KV policy {policy.name!r} has nothing to choose: every layer reads a sliding window only",
            "leave the policy out: windows drop their tokens by themselves",
        )
    for index, layer in enumerate(layers):
        if layer.window is not None and layer.kv_source is not None and layers[layer.kv_source].window is None:
            raise PlanError(
                f"KV policy {policy.name!r} would drop keys of layer {layer.kv_source} that the window of layer "
                f"{index} reads",
                "use a plan of a codec alone",
            )


def _check_source(layers: Sequence[LayerSpec], index: int) -> None:
    """A layer that shares KV must read an earlier owner of the same shape, whose window keeps all that it reads."""
    layer, number = layers[index], layers[index].kv_source
    if number is None:
        return
    source = layers[number] if 0 <= number < index else None
    if source is None or not _owns(source):
        raise ConfigError(f"layer {index} reads the keys of layer {number}, which is no earlier layer with its own")
    shapes = [(each.num_kv_heads, each.head_dim, each.v_head_dim) for each in (layer, source)]
    windows = [math.inf if each.window is None else each.window for each in (layer, source)]
    if shapes[0] != shapes[1] or windows[0] > windows[1]:
        raise ConfigError(
            f"layer {index} (KV heads, head_dim, v_head_dim, window) {(*shapes[0], layer.window)} cannot read the keys "
            f"of layer {number} {(*shapes[1], source.window)}"
        )


def _codec_called(name: str) -> Callable[..., Codec]:
    try:
        return CODECS.get(name)
    except PlanError as error:
        names = ", ".join([*POLICIES.names(), *READS.names()])
        raise PlanError(error.message, f"{error.hint}; or a policy: {names}") from error


def _make(kind: str, make: Callable[..., _Part], name: str, arguments: str) -> _Part:
    positional: list[str] = []
    named: dict[str, str] = {}
    for argument in filter(None, (each.strip() for each in arguments.split(","))):
        key, equals, value = argument.partition("=")
        if equals and key.strip() in named:
            raise PlanError(f"{kind} {name!r} is given {key.strip()!r} twice", _HINT)
        if equals:
            named[key.strip()] = value.strip()
        else:
            positional.append(argument)
    try:
        return make(*positional, **named)
    except TypeError as error:
        raise PlanError(f"{kind} {name!r} does not take ({arguments})", _HINT) from error


def _canonical(part: Codec | TokenPolicy | ReadPolicy) -> str:
    """Return one spelling for equal parts."""
    names: list[str] = [each.name for each in fields(part)] if is_dataclass(part) else []
    inner = ",".join(f"{name}={getattr(part, name)}" for name in names)
    return f"{part.name}({inner})"
