"""PrefixTree: a compact radix tree over the token ids of all prompts of a job; says what could be computed once."""

from __future__ import annotations

from array import array
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from elbowroom.engine.offline.prompts import Ids, Prompts

ROOT = 0


class PrefixTree:
    """Nodes are numbered, the root is 0; the edge into a node is a run of tokens of one of the prompts below it.

    Sharing is multi-level: whatever two prompts have in common lies on edges that both pass (BatchLLM, arXiv
    2412.03594). Nothing here recurses, as a tree of turns can be thousands of nodes deep.

    Args:
        prompts: token ids; read again and again while the tree grows.
    """

    def __init__(self, prompts: Prompts) -> None:
        self._prompts = prompts
        self.depth = array("q", [0])
        """Tokens from the root to the end of each node's edge."""
        self.parent = array("q", [ROOT])
        self.prompt = array("q", [-1])
        """A prompt that begins with the tokens of the node."""
        self._children: list[dict[int, int] | None] = [{}]
        self.ends: dict[int, int] = {}
        """Prompt -> node where it ends."""
        self.weight: dict[int, int] = {}
        """Samples of the prompts that have more than one."""

    def __len__(self) -> int:
        """Return the number of nodes."""
        return len(self.depth)

    def children(self, node: int) -> Iterator[int]:
        """Yield the nodes right below ``node``."""
        yield from (self._children[node] or {}).values()

    def insert(self, prompt: int, num_samples: int = 1) -> None:
        """Add a prompt, which ``num_samples`` sequences will begin with."""
        tokens = self._prompts.read(prompt, 0, self._prompts.length(prompt))
        node = ROOT
        while self.depth[node] < len(tokens):
            at = self.depth[node]
            child = (self._children[node] or {}).get(int(tokens[at]))
            if child is None:
                node = self._add(node, int(tokens[at]), len(tokens), prompt)
                break
            common = at + self._common(child, tokens, at)
            node = child if common == self.depth[child] else self._split(child, common, int(tokens[at]))
        self.ends[prompt] = node
        if num_samples != 1:
            self.weight[prompt] = num_samples

    def path(self, prompt: int) -> list[int]:
        """Return the nodes from below the root to where ``prompt`` ends."""
        node, found = self.ends[prompt], []
        while node != ROOT:
            found.append(node)
            node = self.parent[node]
        return found[::-1]

    def upwards(self) -> npt.NDArray[np.int64]:
        """Return all nodes but the root, each before its parent."""
        order: npt.NDArray[np.int64] = np.argsort(-np.asarray(self.depth, dtype=np.int64), kind="stable")
        return order[:-1]  # the root, of depth 0, is the last

    def members(self) -> npt.NDArray[np.int64]:
        """Return how many samples begin with the tokens of each node, int64 ``[nodes]``."""
        counts = np.zeros(len(self), dtype=np.int64)
        for prompt, node in self.ends.items():
            counts[node] += self.weight.get(prompt, 1)
        parent = np.asarray(self.parent)
        for node in self.upwards():
            counts[parent[node]] += counts[node]
        return counts

    def edge_tokens(self) -> npt.NDArray[np.int64]:
        """Return the tokens of the edge into each node, int64 ``[nodes]``; 0 for the root."""
        depth = np.asarray(self.depth)
        edges: npt.NDArray[np.int64] = depth - depth[np.asarray(self.parent)]
        return edges

    @property
    def total_tokens(self) -> int:
        """Prompt tokens of all samples."""
        return sum(self._prompts.length(prompt) * self.weight.get(prompt, 1) for prompt in self.ends)

    @property
    def least_tokens(self) -> int:
        """Tokens to compute when each shared one is computed once: the optimum of all levels."""
        return int(self.edge_tokens().sum())

    def least_tokens_in_blocks(self, grain: int) -> int:
        """Return the same for caches that share whole blocks of ``grain`` tokens only."""
        whole = np.asarray(self.depth) // grain
        blocks = int((whole - whole[np.asarray(self.parent)]).sum())
        rest = sum(self._prompts.length(prompt) % grain * self.weight.get(prompt, 1) for prompt in self.ends)
        return blocks * grain + rest

    def _add(self, parent: int, token: int, depth: int, prompt: int) -> int:
        self.depth.append(depth)
        self.parent.append(parent)
        self.prompt.append(prompt)
        self._children.append(None)
        below = self._children[parent]
        if below is None:
            below = self._children[parent] = {}
        below[token] = len(self) - 1
        return len(self) - 1

    def _split(self, node: int, depth: int, token: int) -> int:
        """Put a node into the edge of ``node``, which begins with ``token``, at ``depth``; return the new one."""
        prompt = self.prompt[node]
        upper = self._add(self.parent[node], token, depth, prompt)
        self._children[upper] = {int(self._prompts.read(prompt, depth, depth + 1)[0]): node}
        self.parent[node] = upper
        return upper

    def _common(self, child: int, tokens: Ids, at: int) -> int:
        """Return how many tokens of the edge into ``child`` match ``tokens`` from ``at`` on."""
        stop = min(self.depth[child], len(tokens))
        edge = self._prompts.read(self.prompt[child], at, stop)
        differing = np.flatnonzero(edge != tokens[at:stop])
        return int(differing[0]) if differing.size else stop - at
