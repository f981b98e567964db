"""Policy ``spatten``: the tokens that all heads look at; each layer keeps fewer, out of what the last one keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d

from elbowroom.core import STRIP_TOKENS, LayerSpec
from elbowroom.errors import PlanError
from elbowroom.kv.calibration import Calibration
from elbowroom.kv.policies.base import NO_LIMIT, LayerView
from elbowroom.kv.policies.parameters import READING, check_budget, check_interval, one_of, whole

_RANKS = ("cascade", "layer")


@dataclass(frozen=True, slots=True)
class SpattenPolicy:
    """SpAtten's cascade token pruning (Wang et al., HPCA 2021, arXiv 2012.09852) at a prompt's end.

    A token's importance is the attention that it receives from the last queries of all heads, as the mean over the
    layers so far; what one layer drops, deeper layers drop as well. Budgets fall linearly with depth, in whole blocks.
    Earlier prompts of a session count half as much with each later one. While a long prompt is read in parts, four
    times the budgets stay behind each part.

    Deviations: tokens go at the end of a prompt and behind parts of long ones, and only with ``every`` while tokens are
    generated; their queries are computed to the last layer; the last queries vote instead of all (of generated tokens,
    one in ``every``, with the memory of earlier choices); layers that keep everything do not
    vote; sinks and the newest tokens always stay; importance is smoothed along the prompt, without which half of a
    fact stays (SnapKV, arXiv 2404.14469). Its head pruning is the policy ``heads``.

    Args:
        tokens: most tokens that a layer holds, as the mean of those that drop any.
        last: most tokens that the last layer holds; 0: half of ``tokens``.
        keep: leading layers that drop nothing.
        w: newest tokens, which stay and whose queries vote.
        sinks: leading tokens that stay.
        kernel: width of the average pooling of importance along the prompt; odd; 1: none, as in the paper.
        rank: ``cascade``, or ``layer``: each layer chooses by itself, with the same budgets (for comparison).
        every: generated tokens behind which it chooses anew, a multiple of 64; 0: never.
    """

    tokens: int | str = 512
    last: int | str = 0
    keep: int | str = 0
    w: int | str = 32
    sinks: int | str = 4
    kernel: int | str = 5
    rank: str = "cascade"
    every: int | str = 0
    budgets: tuple[int, ...] = field(default=(), init=False)
    """Of each layer, once bound to a model."""
    name: ClassVar[str] = "spatten"
    needs_calibration: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Read the parameters as numbers."""
        whole(self, "tokens", "w", "sinks", "kernel")
        whole(self, "last", "keep", least=0)
        one_of(self, "rank", _RANKS)
        if int(self.kernel) % 2 == 0:
            raise PlanError(
                f"KV policy {self.name!r} cannot centre kernel={self.kernel} on a token", "give an odd kernel"
            )
        tokens, always = int(self.tokens), int(self.w) + int(self.sinks)
        check_budget(self.name, tokens, always)
        last = int(self.last) or max(tokens // 2, always + STRIP_TOKENS)
        check_budget(self.name, last, always, "last")
        check_interval(self)
        if last > tokens:
            raise PlanError(
                f"KV policy {self.name!r} cannot hold {last} tokens in the last layer and only {tokens} on average",
                f"give last={tokens} or less",
            )
        object.__setattr__(self, "last", last)

    @property
    def window(self) -> int:
        """Newest queries that vote."""
        return int(self.w)

    @property
    def cascades(self) -> bool:
        """Whether layers choose from what the layer before keeps."""
        return self.rank == "cascade"

    @property
    def interval(self) -> int:
        """Generated tokens from choice to choice."""
        return int(self.every)

    def calibrated(self, layers: Sequence[LayerSpec], calibration: Calibration | None) -> SpattenPolicy:
        """Return the policy with the budgets of a model's layers.

        Raises:
            PlanError: no layer is left to drop anything, or layers read the keys of others, behind which they choose.
        """
        chosen = [index for index, spec in enumerate(layers) if spec.window is None and spec.kv_source is None]
        late = [spec.kv_source for spec in layers if spec.kv_source in chosen]
        if late:
            raise PlanError(
                f"KV policy {self.name!r} goes from layer to layer, but later layers read the keys of layer {late[0]}",
                "use snapkv or streaming",
            )
        keep = int(self.keep)
        if keep >= len(chosen):
            raise PlanError(
                f"KV policy {self.name!r} with keep={keep} drops nothing of a model with {len(chosen)} such layers",
                f"give keep={len(chosen) - 1} or less",
            )
        budgets = [NO_LIMIT] * len(layers)
        for index, budget in zip(
            chosen[keep:], falling(int(self.tokens), int(self.last), len(chosen) - keep), strict=True
        ):
            budgets[index] = budget
        made = replace(self)
        object.__setattr__(made, "budgets", tuple(budgets))
        return made

    def limit(self, layer: int, ends_prompt: bool) -> int:
        """Return the layer's budget, four times of it within a prompt: its end may ask for something else."""
        budget = self.budgets[layer]
        return budget if ends_prompt or budget == NO_LIMIT else READING * budget

    def select(self, view: LayerView, count: int) -> Tensor:
        """Return the most important tokens that may stay, the same for all heads."""
        importance = view.received() if view.cascade is None else view.cascade.importance
        older, width = max(view.num_held - int(self.w), 0), int(self.kernel)
        ranks = torch.full((view.num_held,), torch.inf)
        if older:
            ranks[:older] = avg_pool1d(importance[None, :older], width, stride=1, padding=width // 2)[0]
        ranks[: int(self.sinks)] = torch.inf
        if view.cascade is None:
            return ranks.topk(count).indices.sort().values[None]
        return view.cascade.best(ranks)[None]


def falling(mean: int, last: int, num_layers: int) -> list[int]:
    """Return budgets that fall linearly to ``last`` with at most ``mean`` on average.

    They differ by whole blocks, so that all layers drop tokens at the same lengths of a prompt.
    """
    if num_layers == 1:
        return [mean]
    total = num_layers * (mean - last) // STRIP_TOKENS
    steps = [2 * total * (num_layers - 1 - index) // (num_layers * (num_layers - 1)) for index in range(num_layers)]
    rest = total - sum(steps)
    return [last + STRIP_TOKENS * (step + (index < rest)) for index, step in enumerate(steps)]
