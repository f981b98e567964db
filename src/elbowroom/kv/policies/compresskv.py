"""Policy ``compresskv``: the tokens that a few retrieval heads of each layer look at, the same for all its heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from elbowroom.core import STRIP_TOKENS, LayerSpec
from elbowroom.errors import PlanError
from elbowroom.kv.calibration import Calibration
from elbowroom.kv.policies.base import LayerView
from elbowroom.kv.policies.budgets import LEAST_TOKENS, layer_budgets
from elbowroom.kv.policies.parameters import READING, check_budget, check_interval, one_of, whole
from elbowroom.kv.policies.voting import vote

_PICKS = ("srh", "classic", "random", "all")
_BUDGETS = ("error", "uniform")


@dataclass(frozen=True, slots=True)
class CompressKVPolicy:
    """CompressKV (Lin et al., arXiv 2508.02401): semantic retrieval heads vote, layers get budgets by their error.

    Which heads those are and what each layer loses without tokens is measured once a model (``elbowroom calibrate``).
    While a long prompt is read in parts, four times the budget stays behind each part. Deviation: no layer has a budget
    below what always stays, as tokens go in blocks. With ``every`` it chooses while tokens are generated, too, by the
    query of one token.

    Args:
        tokens: most tokens that a layer holds on average when a prompt has been read.
        w: newest tokens, which stay and whose queries vote.
        kernel: width of the average pooling along the prompt; odd.
        heads: query heads of each layer that vote.
        pick: which: ``srh`` (best semantic retrieval heads), ``classic`` (best copying heads), ``random``, ``all``.
        budgets: of the layers, by ``error`` or ``uniform``.
        every: generated tokens behind which it chooses anew, a multiple of 64; 0: never, as in the paper.
    """

    tokens: int | str = 256
    w: int | str = 8
    kernel: int | str = 5
    heads: int | str = 4
    pick: str = "srh"
    budgets: str = "error"
    every: int | str = 0
    voters: tuple[tuple[int, ...], ...] = field(default=(), init=False)
    """Of each layer, once bound to a model: the query heads that vote."""
    limits: tuple[int, ...] = field(default=(), init=False)
    """Of each layer, once bound to a model: its budget."""
    name: ClassVar[str] = "compresskv"
    cascades: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Read the parameters."""
        whole(self, "tokens", "w", "kernel", "heads")
        one_of(self, "pick", _PICKS)
        one_of(self, "budgets", _BUDGETS)
        if int(self.kernel) % 2 == 0:
            raise PlanError(
                f"KV policy {self.name!r} cannot centre kernel={self.kernel} on a token", "give an odd kernel"
            )
        check_budget(self.name, int(self.tokens), int(self.w))
        check_interval(self)

    @property
    def window(self) -> int:
        """Newest queries that vote."""
        return int(self.w)

    @property
    def needs_calibration(self) -> bool:
        """Whether heads or budgets come from measurements."""
        return self.pick in ("srh", "classic") or self.budgets == "error"

    @property
    def interval(self) -> int:
        """Generated tokens from choice to choice."""
        return int(self.every)

    def calibrated(self, layers: Sequence[LayerSpec], calibration: Calibration | None) -> CompressKVPolicy:
        """Return the policy with the heads and the budgets of a model's layers.

        Raises:
            PlanError: there is no calibration, or it is of another model.
        """
        if calibration is not None:
            calibration.check(layers)
        bound = replace(self)
        voters = tuple(self._voters(index, spec, calibration) for index, spec in enumerate(layers))
        object.__setattr__(bound, "voters", voters)
        object.__setattr__(bound, "limits", self._limits(layers, calibration))
        return bound

    def limit(self, layer: int, ends_prompt: bool) -> int:
        """Return the layer's budget, four times of it within a prompt: its end may ask for something else."""
        return self.limits[layer] * (1 if ends_prompt else READING)

    def select(self, view: LayerView, count: int) -> Tensor:
        """Return the best of the older tokens for the heads that vote, and the newest ones."""
        return vote(view, self.voters[view.layer], count, int(self.w), int(self.kernel))

    def _voters(self, layer: int, spec: LayerSpec, calibration: Calibration | None) -> tuple[int, ...]:
        if self.pick == "random":
            order = torch.randperm(spec.num_q_heads, generator=torch.Generator().manual_seed(layer)).tolist()
        elif self.pick == "all":
            return tuple(range(spec.num_q_heads))
        else:
            known = self._known(calibration)
            scores = (known.head_scores if self.pick == "srh" else known.copy_scores)[layer]
            order = sorted(range(spec.num_q_heads), key=lambda head: -scores[head])
        return tuple(sorted(order[: int(self.heads)]))

    def _limits(self, layers: Sequence[LayerSpec], calibration: Calibration | None) -> tuple[int, ...]:
        tokens = int(self.tokens)
        limits = [tokens] * len(layers)
        if self.budgets == "uniform":
            return tuple(limits)
        errors = self._known(calibration).layer_errors
        chosen = [index for index, spec in enumerate(layers) if spec.window is None and spec.kv_source is None]
        least = max(LEAST_TOKENS, int(self.w) + STRIP_TOKENS)
        budgets = layer_budgets([errors[index] for index in chosen], tokens, least)
        for index, budget in zip(chosen, budgets, strict=True):
            limits[index] = budget
        return tuple(limits)

    def _known(self, calibration: Calibration | None) -> Calibration:
        if calibration is None:
            raise PlanError(
                f"KV policy 'compresskv' with pick={self.pick} and budgets={self.budgets} needs a calibrated model",
                "run: elbowroom calibrate MODEL; or use snapkv, or compresskv(pick=all,budgets=uniform)",
            )
        return calibration
