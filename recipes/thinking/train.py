"""Train the thinking model on one core: ``python -m recipes.thinking.train --out runs/thinking``.

The schedule, the rows and the weights are functions of the seed and the step, so that a run can be repeated on the
same machine. Runs on from ``OUT/checkpoint.pt`` when there is one.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from elbowroom.evals.sums import INSTRUCTION, MAX_TERMS, random_sum
from elbowroom.models.decoder import Decoder
from elbowroom.weights.resident import ResidentWeights
from recipes.builtin.model import SkipContext
from recipes.thinking.model import MAX_POSITIONS, config, initial_tensors
from recipes.thinking.tokenizer import PAD_ID, build_tokenizer

STEP_TOKENS = 2560
EARLY, EARLY_TERMS = 0.16, 8
"""Share of the steps with short sums only, and their most terms."""
INSTRUCTED_SHARE, SHIFTED_SHARE, CUT_SHARE = 0.2, 0.3, 0.15
"""Rows with the system prompt; steps that start at a later position; rows whose working stops somewhere."""
CUT_WEIGHT = 0.2
"""Weight in the loss of an answer behind working that was cut: mostly it cannot be known."""

Row = tuple[list[int], list[float]]


def make_row(tokenizer: Tokenizer, rng: np.random.Generator, num_terms: int, instructed: bool) -> Row:
    """Return the tokens of one conversation and the weight of each in the loss."""
    example = random_sum(rng, num_terms)
    system = f"<|system|>{INSTRUCTION}<|end|>" if instructed else ""
    prompt = tokenizer.encode(f"{system}<|user|>{example.question}<|end|><|assistant|>").ids
    working = tokenizer.encode(f"<think>{example.working}").ids
    ending = tokenizer.encode(f"</think>{example.answer}<|end|>").ids
    if rng.random() >= CUT_SHARE:
        return prompt + working + ending, [0.0] * len(prompt) + [1.0] * (len(working) + len(ending))
    working = working[: int(rng.integers(1, len(working) + 1))]
    weights = [0.0] * len(prompt) + [1.0] * len(working) + [0.0] + [CUT_WEIGHT] * (len(ending) - 1)
    return prompt + working + ending, weights


def learning_rate(share: float, step: int, peak: float) -> float:
    """Return the rate: 100 steps of warm-up, then constant, then linear to 1 % over the last half of the steps."""
    return peak * min(1.0, (step + 1) / 100) * max(0.01, min(1.0, (1.0 - share) / 0.5))


class Trainer:
    """Model, optimizer, data and statistics.

    Args:
        out: folder of checkpoint and log.
        num_steps: length of the schedule.
        peak_rate: highest learning rate.
        seed: of weights and data.
    """

    def __init__(self, out: Path, num_steps: int, peak_rate: float, seed: int) -> None:
        self.out, self.num_steps, self.peak_rate, self.seed = out, num_steps, peak_rate, seed
        self.tokenizer, self.config = build_tokenizer(), config()
        self.weights = ResidentWeights(initial_tensors(seed), self.config.activation, requires_grad=True)
        self.decoder = Decoder(self.config, self.weights)
        parameters = list(self.weights.parameters())
        groups = [([p for p in parameters if p.ndim > 1], 0.01), ([p for p in parameters if p.ndim == 1], 0.0)]
        self.optimizer = torch.optim.AdamW(
            [{"params": part, "weight_decay": decay} for part, decay in groups], betas=(0.9, 0.98), fused=True
        )
        self.step, self.seconds, self.means = 0, 0.0, dict[str, float]()
        self._resume()

    def train(self) -> None:
        """Train to the end of the schedule, with a checkpoint and a line in the log every 100 steps."""
        clock = time.perf_counter()
        while self.step < self.num_steps:
            self._step()
            if self.step % 100 == 0 or self.step == self.num_steps:
                self.seconds += time.perf_counter() - clock
                clock = time.perf_counter()
                self._log()
                self.save()

    def save(self) -> None:
        """Write the checkpoint under a temporary name and move it into place."""
        state = {
            "weights": {name: tensor.detach() for name, tensor in self.weights.named_tensors().items()},
            "optimizer": self.optimizer.state_dict(),
            "counters": (self.step, self.seconds),
        }
        torch.save(state, self.out / "checkpoint.tmp")
        (self.out / "checkpoint.tmp").rename(self.out / "checkpoint.pt")

    def _resume(self) -> None:
        path = self.out / "checkpoint.pt"
        if not path.is_file():
            return
        state = torch.load(path, weights_only=True)
        with torch.no_grad():
            for name, tensor in self.weights.named_tensors().items():
                tensor.copy_(state["weights"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["counters"]

    def _rows(self, rng: np.random.Generator) -> list[Row]:
        """Return rows of about equal length, ``STEP_TOKENS`` in all."""
        most = EARLY_TERMS if self.step < EARLY * self.num_steps else MAX_TERMS
        middle, instructed = int(rng.integers(1, most + 1)), bool(rng.random() < INSTRUCTED_SHARE)
        counts = range(max(middle - 2, 1), min(middle + 2, most) + 1)
        length = 6 * counts[-1] + 10 + 150 * instructed
        terms = rng.choice(list(counts), size=max(STEP_TOKENS // length, 1)).tolist()
        return [make_row(self.tokenizer, rng, num_terms, instructed) for num_terms in terms]

    def _step(self) -> None:
        rng = np.random.default_rng([self.seed, self.step])
        share = self.step / self.num_steps
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(share, self.step, self.peak_rate)
        rows = self._rows(rng)
        length = max(len(tokens) for tokens, _ in rows)
        first = int(rng.integers(MAX_POSITIONS - length)) if rng.random() < SHIFTED_SHARE else 0
        self.optimizer.zero_grad(set_to_none=False)
        torch.autograd.backward(self._loss(rows, length, first))
        torch.nn.utils.clip_grad_norm_(list(self.weights.parameters()), 1.0)
        self.optimizer.step()
        self.step += 1

    def _loss(self, rows: Sequence[Row], length: int, first: int) -> Tensor:
        tokens = torch.tensor([ids + [PAD_ID] * (length - len(ids)) for ids, _ in rows])
        weights = torch.tensor([weight + [0.0] * (length - len(weight)) for _, weight in rows])
        positions = torch.arange(first, first + length).expand(len(rows), -1)
        targets = F.pad(tokens[:, 1:], (0, 1)).reshape(-1)
        weights = F.pad(weights[:, 1:], (0, 1)).reshape(-1)
        chosen = weights.nonzero()[:, 0]
        hidden = self.decoder(tokens.reshape(-1), SkipContext(self.config.layers, positions))
        logits = self.decoder.logits(hidden[chosen])
        losses = F.cross_entropy(logits, targets[chosen], reduction="none")
        loss = (losses * weights[chosen]).sum() / weights.sum()
        sure = weights[chosen] == 1.0
        right = (logits.detach().argmax(dim=-1) == targets[chosen])[sure]
        self._note("loss", loss.item())
        self._note("right", right.float().mean().item())
        return loss

    def _note(self, name: str, value: float) -> None:
        self.means[name] = 0.97 * self.means.get(name, value) + 0.03 * value

    def _log(self) -> None:
        entry = {"step": self.step, "seconds": round(self.seconds)}
        line = json.dumps(entry | {name: round(value, 5) for name, value in self.means.items()})
        with (self.out / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        print(line, flush=True)


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/thinking"))
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    Trainer(arguments.out, arguments.steps, arguments.rate, arguments.seed).train()


if __name__ == "__main__":
    main()
