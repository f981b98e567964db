"""JobPlan: in which order the prompts of a job run, and which of their prefixes are kept for one another."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from elbowroom.core import STRIP_TOKENS
from elbowroom.engine.offline.prompts import Prompts
from elbowroom.engine.offline.tree import ROOT, PrefixTree
from elbowroom.engine.types import Stem

Order = Literal["planned", "sorted", "arrival"]
SHORTEST_STEM = STRIP_TOKENS // 4
"""Tokens that a stem must add to the one above it: its last block is mostly empty otherwise."""
LEAST_SPARED = STRIP_TOKENS // 2
"""Tokens that it must spare its members in all: it may take a block more than its tokens."""


@dataclass(frozen=True, slots=True)
class JobPlan:
    """What to run, one prompt after the other.

    ``planned`` walks the tree depth first, so that the members of a prefix run next to each other, those branches first
    that decode most for what they read: their long decoding runs beside the reading of later ones, and the job does
    not end in a thin tail. ``sorted`` walks it in the order of the first prompts, and ``arrival`` does not walk it;
    these two leave it to an LRU cache which prefixes stay.
    """

    tree: PrefixTree
    prompts: Prompts
    order: array[int]
    """Numbers of prompts."""
    stems: frozenset[int] | None
    """Nodes of the tree that are kept until their last member has ended; None: the LRU cache decides."""
    planned_tokens: int
    """Prompt tokens to compute if the plan works out; without stems, all."""

    @classmethod
    def of(cls, tree: PrefixTree, prompts: Prompts, new_tokens: Sequence[int], order: Order = "planned") -> JobPlan:
        """Return the plan of a job.

        Args:
            tree: of all prompts to run.
            prompts: their token ids.
            new_tokens: tokens that each prompt is expected to generate, by its number.
            order: see above.
        """
        if order == "arrival":
            return cls(tree, prompts, array("q", sorted(tree.ends)), None, tree.total_tokens)
        keys = _decode_shares(tree, new_tokens) if order == "planned" else np.asarray(tree.prompt, dtype=np.float64)
        walk = array("q", _walk(tree, keys))
        if order == "sorted":
            return cls(tree, prompts, walk, None, tree.total_tokens)
        stems, planned = _choose_stems(tree)
        return cls(tree, prompts, walk, stems, planned)

    def stem_nodes(self, prompt: int) -> list[int]:
        """Return the nodes above the end of ``prompt`` that are kept, shortest first."""
        return [] if self.stems is None else [node for node in self.tree.path(prompt) if node in self.stems]

    def feed(self) -> Iterator[tuple[int, tuple[Stem, ...] | None]]:
        """Yield each prompt in order, with its stems as ``Request.stems`` takes them."""
        if self.stems is None:
            yield from ((prompt, None) for prompt in self.order)
            return
        to_come: dict[int, int] = {}
        for prompt in self.order:
            for node in self.stem_nodes(prompt):
                to_come[node] = to_come.get(node, 0) + 1
        keys: dict[int, bytes] = {}
        for prompt in self.order:
            stems = []
            for node in self.stem_nodes(prompt):
                to_come[node] -= 1
                if node not in keys:
                    keys[node] = self._digest(node)
                stems.append(Stem(keys[node], self.tree.depth[node], to_come[node]))
                if to_come[node] == 0:
                    del keys[node]
            yield prompt, tuple(stems)

    def _digest(self, node: int) -> bytes:
        tokens = self.prompts.read(self.tree.prompt[node], 0, self.tree.depth[node])
        return hashlib.blake2b(tokens.astype("<i4").tobytes(), digest_size=16).digest()


def _decode_shares(tree: PrefixTree, new_tokens: Sequence[int]) -> npt.NDArray[np.float64]:
    """Return minus the tokens generated below each node over those read there, a shared one counted once."""
    generated, read = np.zeros(len(tree)), tree.edge_tokens().astype(np.float64)
    for prompt, node in tree.ends.items():
        generated[node] += new_tokens[prompt] * tree.weight.get(prompt, 1)
    parent = np.asarray(tree.parent)
    for node in tree.upwards():
        generated[parent[node]] += generated[node]
        read[parent[node]] += read[node]
    shares: npt.NDArray[np.float64] = -generated / np.maximum(read, 1.0)
    return shares


def _walk(tree: PrefixTree, keys: npt.NDArray[np.float64]) -> Iterator[int]:
    """Yield the prompts depth first, children by ascending key; what ends at a node comes before what goes on."""
    ending: dict[int, list[int]] = {}
    for prompt, node in sorted(tree.ends.items()):
        ending.setdefault(node, []).append(prompt)
    stack = [ROOT]
    while stack:
        node = stack.pop()
        yield from ending.get(node, ())
        stack += sorted(tree.children(node), key=lambda child: (keys[child], tree.prompt[child]), reverse=True)


def _choose_stems(tree: PrefixTree) -> tuple[frozenset[int], int]:
    """Return the nodes that are worth a place of their own, and the tokens to compute with them."""
    members = tree.members()
    kept = np.zeros(len(tree), dtype=np.int64)
    """Depth of the nearest stem at or above each node."""
    chosen, planned = [], 0
    for node in tree.upwards()[::-1]:
        above, depth = int(kept[tree.parent[node]]), tree.depth[node]
        kept[node] = above
        spared = (depth - above) * (members[node] - 1)
        if depth - above >= SHORTEST_STEM and spared >= LEAST_SPARED:
            kept[node] = depth
            chosen.append(int(node))
            planned += depth - above
    for prompt, node in tree.ends.items():
        # One token at least is computed for the sake of its logits.
        planned += max(tree.depth[node] - int(kept[node]), 1) * tree.weight.get(prompt, 1)
    return frozenset(chosen), planned
