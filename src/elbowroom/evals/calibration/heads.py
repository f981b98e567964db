"""Scores of query heads: who looks at the fact while the model repeats it.

Semantic retrieval heads are those of CompressKV (Lin et al., arXiv 2508.02401): attention to the whole fact, added for
every token of the fact that is written. Classic ones are those of Wu et al. (arXiv 2404.15574): the token looked at
most is the very one that is written.
"""

from __future__ import annotations

import torch
from torch import Tensor

from elbowroom.core import LayerSpec
from elbowroom.evals.base import score_reply
from elbowroom.evals.calibration.needles import Needle
from elbowroom.evals.calibration.reader import LayerSight, Reader
from elbowroom.kv.base import KVHandle


class HeadScores:
    """Means over the questions that were answered.

    Args:
        layers: shape of every layer; those with a sliding window keep a score of 0.
    """

    def __init__(self, layers: tuple[LayerSpec, ...]) -> None:
        self._layers = layers
        self._semantic, self._copying = _zeros(layers), _zeros(layers)
        self.num_runs = self.num_successes = 0

    def ask(self, reader: Reader, context: KVHandle, needle: Needle) -> bool:
        """Ask for a fact in a fork of its context; count what the heads did and return True if the answer is right."""
        fork = reader.fork(context)
        try:
            run = _Run(self._layers, needle)
            reader.read(fork, needle.prompt_ids[:-1])
            token, answer = needle.prompt_ids[-1], list[int]()
            for _ in range(needle.max_new_tokens):
                token = reader.read(fork, [token], run.look)
                if token in reader.eos_token_ids:
                    break
                run.wrote(token)
                answer.append(token)
        finally:
            reader.close(fork)
        self.num_runs += 1
        text = reader.model.tokenizer.decode(answer)
        if score_reply(text, needle.answer).value != 1.0:
            return False
        self.num_successes += 1
        for total, found in ((self._semantic, run.semantic), (self._copying, run.copying)):
            for layer, scores in enumerate(found):
                total[layer] += scores
        return True

    def semantic(self) -> list[list[float]]:
        """Return the scores of semantic retrieval heads ``[layers][Hq]``; needs a success."""
        return [(scores / self.num_successes).tolist() for scores in self._semantic]

    def copying(self) -> list[list[float]]:
        """Return the scores of classic retrieval heads ``[layers][Hq]``; needs a success."""
        return [(scores / self.num_successes).tolist() for scores in self._copying]


class _Run:
    """One question: what each head looked at in the step that wrote each token."""

    def __init__(self, layers: tuple[LayerSpec, ...], needle: Needle) -> None:
        self._needle = needle
        self.semantic, self.copying = _zeros(layers), _zeros(layers)
        self._mass: dict[int, Tensor] = {}
        self._top: dict[int, Tensor] = {}

    def look(self, sight: LayerSight) -> None:
        """Note how much each head of a layer attends to the fact, and where it attends most."""
        if sight.spec.window is not None:
            return
        view = sight.view(sight.queries)
        heads = [view.window_attention(head)[:, -1] for head in range(sight.spec.num_kv_heads)]
        self._mass[sight.layer] = torch.cat([part[:, self._needle.start : self._needle.stop].sum(1) for part in heads])
        self._top[sight.layer] = torch.cat([part.argmax(1) for part in heads])

    def wrote(self, token: int) -> None:
        """Count what was noted, now that the token of the step is known."""
        needle = self._needle
        times = needle.token_ids.count(token)
        holds = torch.tensor([each == token for each in needle.token_ids])
        for layer, mass in self._mass.items():
            self.semantic[layer] += times * mass
            place = self._top[layer] - needle.start
            inside = (place >= 0) & (place < len(needle.token_ids))
            hits = inside & holds[place.clamp(0, len(needle.token_ids) - 1)]
            self.copying[layer] += hits.float() / len(needle.token_ids)


def _zeros(layers: tuple[LayerSpec, ...]) -> list[Tensor]:
    return [torch.zeros(spec.num_q_heads) for spec in layers]
