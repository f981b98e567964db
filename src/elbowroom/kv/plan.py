"""KVPlan: how a sequence's keys and values are kept, written as text.

``KVPlan.parse("plain(bf16)")`` reads a plan; ``plan.bind(layers, dtype)`` fixes it to a model and gives ``curve``,
the bytes that admission and planning count with.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elbowroom.core import LayerSpec, PageFormat
from elbowroom.errors import PlanError
from elbowroom.kernels.digest import digest_bytes
from elbowroom.kv.bound import BoundPlan, is_chosen
from elbowroom.kv.calibration import Calibration
from elbowroom.kv.capabilities import check_choice, check_reads, check_sealing, check_source
from elbowroom.kv.codecs import CODECS, Codec
from elbowroom.kv.codecs.ordered import channel_orders
from elbowroom.kv.codecs.plain import PlainCodec
from elbowroom.kv.codecs.reduced import ReducedCodec
from elbowroom.kv.policies import CHANNELS, HEADS, POLICIES, ChannelPolicy, HeadPolicy, MergePolicy, TokenPolicy
from elbowroom.kv.reads import READS, ReadPolicy
from elbowroom.registry import Registry

if TYPE_CHECKING:
    from elbowroom.kv.adapters.hf_cache import StoreCache

_PART = re.compile(r"\s*([a-z][a-z0-9_-]*)\s*(?:\(([^()]*)\))?\s*")
_HINT = 'a plan is parts joined by "|", e.g. "plain", "plain(bf16)" or "snapkv(tokens=512) | int8"'


@dataclass(frozen=True, slots=True)
class KVPlan:
    """A parsed plan; immutable, comparable, printable."""

    codec: Codec
    policy: TokenPolicy | None = None
    """Which tokens of a prompt stay; None: all."""
    heads: HeadPolicy | None = None
    """Which KV heads of a sequence stay; None: all."""
    channels: ChannelPolicy | None = None
    """Which channels of its keys stay; None: all."""
    reads: ReadPolicy | None = None
    """Which of those that stay a decoding token reads; None: all."""

    @property
    def text(self) -> str:
        """The plan as text, one spelling for equal plans; ``parse`` reads it back."""
        parts = self.policy, self.heads, self.channels, self.reads, self.codec
        return " | ".join(_canonical(part) for part in parts if part is not None)

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
        found: dict[str, Any] = {}
        for part in (text or "plain").split("|"):
            match = _PART.fullmatch(part)
            if match is None:
                raise PlanError(f"cannot read {part.strip()!r} in KV plan {text!r}", _HINT)
            kind = _kind_of(match[1])
            if kind.field in found:
                raise PlanError(f"KV plan {text!r} names two {kind.plural}", _HINT)
            found[kind.field] = _make(kind, match[1], match[2] or "")
        plan = cls(**{"codec": PlainCodec()} | found)
        plan.check()
        return plan

    def check(self) -> None:
        """Refuse parts that cannot work together.

        Raises:
            PlanError: names both and the way out.
        """
        if self.reads is not None:
            self.reads.check(self.codec)
        if self.layout is self.codec:
            return
        part = self.heads or self.channels or self.policy
        assert part is not None
        if self.reads is not None:
            raise PlanError(
                f"KV read policy {self.reads.name!r} cannot choose among keys that {part.name!r} has changed",
                f"leave {self.reads.name} or {part.name} out",
            )
        if self.codec.name == "fp8":
            raise PlanError(
                f"KV policy {part.name!r} seals blocks at a prompt's end, which codec 'fp8' does not know",
                "use plain, int8, bfp or kivi with it",
            )

        if self.layout is not self.codec and self.codec.sorts:
            raise PlanError(
                f"codec {self.codec.name!r} cannot sort channels of keys in strips that a policy reduces",
                "leave out sort=on",
            )

    @property
    def layout(self) -> Codec:
        """How tokens lie in strips: those of the codec, and what policies have left of them."""
        merges = isinstance(self.policy, MergePolicy)
        if self.heads is None and self.channels is None and not merges:
            return self.codec
        counts = isinstance(self.policy, MergePolicy) and self.policy.bias == "on"
        return ReducedCodec(self.codec, None if self.channels is None else self.channels.share, counts)

    @property
    def needs_calibration(self) -> bool:
        """Whether ``bind`` needs measurements of the model."""
        return self.codec.sorts or (self.policy is not None and self.policy.needs_calibration)

    def bind(self, layers: Sequence[LayerSpec], dtype: str, calibration: Calibration | None = None) -> BoundPlan:
        """Fix the plan to a model's layers and activation dtype (``float32``, ``bfloat16``, ``float16``).

        Args:
            layers: of the model.
            dtype: of its activations.
            calibration: what was measured of it, for plans that need that.

        Raises:
            ConfigError: a layer reads keys and values of another one that does not hold them.
            PlanError: codec or policy do not suit the layers, or need a calibration.
        """
        for index in range(len(layers)):
            check_source(layers, index)
        for part in (self.policy, self.heads, self.channels):
            if part is not None:
                check_choice(part, layers)
        layout = self.layout
        opened = self.codec if isinstance(self.codec, PlainCodec) else PlainCodec()
        tails = tuple(opened.page_format(layer, dtype) for layer in layers) if layout.seals else ()
        kept = () if self.heads is None else self.heads.kept(layers)
        formats = []
        for index, layer in enumerate(layers):
            held = layout
            if isinstance(layout, ReducedCodec):
                held = replace(layout, heads=kept[index] if kept else None)
                held = held if is_chosen(layer) else ReducedCodec(self.codec)
            formats.append(held.page_format(layer, dtype))
        formats = [self._with_digest(fmt, layers, index) for index, fmt in enumerate(formats)]
        policy = None if self.policy is None else self.policy.calibrated(layers, calibration)
        orders = channel_orders(self.codec, layers, calibration)
        made = BoundPlan(self, tuple(layers), tuple(formats), tails, policy, orders, kept)
        if made.defers:
            check_sealing(made)
        check_reads(made)
        return made

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
        run = None if self.reads is None else self.reads.digest_run
        if run is None or self.codec.seals or not any(self.selects(layers, reader) for reader in readers):
            return fmt
        return replace(fmt, digest_bytes=digest_bytes(fmt.num_kv_heads, fmt.head_dim, run))

    def for_hf(
        self, model: Any, memory: str | int = "80%", calibration: Calibration | str | Path | None = None
    ) -> StoreCache:
        """Return a cache for ``model.generate(..., past_key_values=cache)`` of a transformers model on the CPU.

        Until ``cache.close()`` the model computes attention by this library.

        Args:
            model: a decoder as transformers has it.
            memory: most bytes of keys and values, such as ``512MiB``; a share is one of what is available now.
            calibration: for plans that need one, what ``elbowroom calibrate`` measured, or the directory where it is;
                by default the one that the model came from.

        Raises:
            ConfigError: the calibration is malformed.
            PlanError: transformers is missing or too old, or this plan cannot keep what the model attends to.
            RequestError: ``memory`` is not an amount.
        """
        from elbowroom.kv.adapters.hf import open_cache

        return open_cache(self, model, memory, calibration)


@dataclass(frozen=True, slots=True)
class _Kind:
    """Parts of which a plan names one at most."""

    field: str
    """Of ``KVPlan``."""
    name: str
    plural: str
    parts: Registry[Callable[..., Any]]


_CODEC = _Kind("codec", "codec", "codecs", CODECS)
_KINDS = (
    _Kind("policy", "policy", "policies", POLICIES),
    _Kind("heads", "head policy", "head policies", HEADS),
    _Kind("channels", "channel policy", "channel policies", CHANNELS),
    _Kind("reads", "read policy", "read policies", READS),
)


def _kind_of(name: str) -> _Kind:
    return next((kind for kind in _KINDS if name in kind.parts.names()), _CODEC)


def _part_called(kind: _Kind, name: str) -> Callable[..., Any]:
    try:
        return kind.parts.get(name)
    except PlanError as error:
        names = ", ".join([each for other in _KINDS for each in other.parts.names()])
        raise PlanError(error.message, f"{error.hint}; or a policy: {names}") from error


def _make(kind: _Kind, name: str, arguments: str) -> Any:
    make = _part_called(kind, name)
    positional: list[str] = []
    named: dict[str, str] = {}
    for argument in filter(None, (each.strip() for each in arguments.split(","))):
        key, equals, value = argument.partition("=")
        if equals and key.strip() in named:
            raise PlanError(f"{kind.name} {name!r} is given {key.strip()!r} twice", _HINT)
        if equals:
            named[key.strip()] = value.strip()
        else:
            positional.append(argument)
    try:
        return make(*positional, **named)
    except TypeError as error:
        raise PlanError(f"{kind.name} {name!r} does not take ({arguments})", _HINT) from error


def _canonical(part: Codec | TokenPolicy | HeadPolicy | ChannelPolicy | ReadPolicy) -> str:
    """Return one spelling for equal parts."""
    names: list[str] = [each.name for each in fields(part) if each.init] if is_dataclass(part) else []
    inner = ",".join(f"{name}={getattr(part, name)}" for name in names)
    return f"{part.name}({inner})"
