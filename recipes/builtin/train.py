"""Train the built-in model on the CPU: ``python -m recipes.builtin.train --minutes 100 --out runs/builtin``.

Runs on from ``OUT/checkpoint.pt`` when there is one. The schedule is a function of the share of the minutes used.
Two processes of one thread each average their gradients: on two cores that was measured twice as fast as two threads.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from elbowroom.models.decoder import Decoder
from elbowroom.weights.resident import ResidentWeights
from recipes.builtin.data import Corpus, training_texts
from recipes.builtin.model import MAX_POSITIONS, OFFSETS, SkipContext, initial_tensors, tied_config
from recipes.builtin.tasks import ANSWER, REPEAT, SKIP, TEXT, Row, RowMaker
from recipes.builtin.tokenizer import load_tokenizer

TOKENS_PER_PASS = 2048
LOSS_WEIGHT = {ANSWER: 1.0, TEXT: 0.7, REPEAT: 0.5}
TEXT_SHARE = 0.3
"""Share of the distractor tokens whose loss is computed (the head is a fifth of the work)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """What is trained from a share of the time on; a step is one pass of 2,048 tokens in every worker."""

    start: float
    lengths: dict[int, float]
    """Share of the tokens of each row length."""
    mix: dict[str, float]
    """Share of the rows of each task."""


MIX = {"facts": 0.45, "chat": 0.15, "chains": 0.1, "shots": 0.07, "repeat": 0.08, "text": 0.15}
LATE_MIX = {"facts": 0.2, "chat": 0.14, "chains": 0.16, "shots": 0.08, "repeat": 0.04, "text": 0.38}
STAGES = (
    Stage(start=0.0, lengths={128: 1.0}, mix={"repeat": 1.0}),
    Stage(start=0.05, lengths={128: 0.7, 256: 0.3}, mix=MIX | {"repeat": 0.2}),
    Stage(start=0.09, lengths={128: 0.2, 256: 0.4, 512: 0.4}, mix=MIX),
    Stage(start=0.17, lengths={128: 0.15, 256: 0.25, 512: 0.35, 1024: 0.25}, mix=MIX),
    Stage(start=0.27, lengths={128: 0.1, 256: 0.2, 512: 0.3, 1024: 0.25, 2048: 0.15}, mix=LATE_MIX),
    Stage(start=0.6, lengths={256: 0.25, 512: 0.3, 1024: 0.25, 2048: 0.2}, mix=LATE_MIX),
)


def learning_rate(share: float, step: int, peak: float) -> float:
    """Return the rate: 50 steps of warm-up, then constant, then linear to 2 % over the last 45 % of the time."""
    return peak * min(1.0, (step + 1) / 50) * max(0.02, min(1.0, (1.0 - share) / 0.45))


class Trainer:
    """Model, optimizer, data and statistics of one worker; all workers hold the same weights.

    Args:
        out: folder of checkpoint, log and tokenizer.
        minutes: training time of the whole schedule.
        peak_rate: highest learning rate.
        seed: of weights and data.
        offsets: built-in previous-token heads.
        rank: number of this worker; worker 0 writes the files.
    """

    def __init__(
        self, out: Path, minutes: float, peak_rate: float, seed: int, offsets: tuple[int, ...], rank: int
    ) -> None:
        self.out, self.seconds_total, self.peak_rate, self.rank = out, minutes * 60, peak_rate, rank
        self.tokenizer = load_tokenizer(out)
        texts = list(training_texts())
        words = sorted({word for text in texts[:200] for word in text.split() if word.isalpha() and word.islower()})
        words = [word for word in words if word.isascii() and 4 <= len(word) <= 9]
        rng = np.random.default_rng([seed, rank, int(time.time())])
        self.maker = RowMaker(Corpus(texts, self.tokenizer), self.tokenizer, words, rng)
        self.config = tied_config()
        self.weights = ResidentWeights(initial_tensors(seed, offsets), self.config.activation, requires_grad=True)
        self.decoder = Decoder(self.config, self.weights)
        self.parameters = parameters = list(self.weights.parameters())
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.01},
                {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
            ],
            betas=(0.9, 0.98),
            fused=True,
        )
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self.means: dict[str, float] = {}
        self._resume()

    def train(self) -> None:
        """Train until the time is used, with a checkpoint every two minutes."""
        saved, clock = self.seconds, time.perf_counter()
        while self.seconds < self.seconds_total:
            now = time.perf_counter()
            self._step(now - clock)
            clock = now
            if self.rank == 0 and self.step % 50 == 0:
                self._log()
            if self.rank == 0 and self.seconds - saved > 120:
                self.save()
                saved = self.seconds
        if self.rank == 0:
            self.save()

    def save(self) -> None:
        """Write the checkpoint under a temporary name and move it into place."""
        state = {
            "weights": {name: tensor.detach() for name, tensor in self.weights.named_tensors().items()},
            "optimizer": self.optimizer.state_dict(),
            "counters": (self.step, self.tokens, self.seconds),
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
        self.step, self.tokens, self.seconds = state["counters"]

    def _step(self, last_s: float) -> None:
        share = self.seconds / self.seconds_total
        stage = [stage for stage in STAGES if share >= stage.start][-1]
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(share, self.step, self.peak_rate)
        common = np.random.default_rng(self.step)
        length = int(common.choice(list(stage.lengths), p=list(stage.lengths.values())))
        names, weights = list(stage.mix), np.array(list(stage.mix.values()))
        tasks = self.maker.rng.choice(names, p=weights / weights.sum(), size=max(1, TOKENS_PER_PASS // length))
        self.optimizer.zero_grad(set_to_none=False)
        torch.autograd.backward(self._loss([str(task) for task in tasks], length))
        self.seconds += self._average_gradients(last_s)
        self._note("norm", float(torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)))
        self.optimizer.step()
        self.step += 1

    def _average_gradients(self, seconds: float) -> float:
        """Replace the gradients by their mean over the workers; return the mean of ``seconds``."""
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.parameters]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients] + [torch.tensor([seconds])])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        sizes = [gradient.numel() for gradient in gradients]
        for parameter, part in zip(self.parameters, flat[:-1].split_with_sizes(sizes), strict=True):
            parameter.grad = part.view_as(parameter)
        return float(flat[-1])

    def _loss(self, tasks: list[str], length: int) -> Tensor:
        rows: list[Row] = [self.maker.make(task, length) for task in tasks]
        positions = torch.from_numpy(np.stack([self.maker.positions(row, MAX_POSITIONS) for row in rows]))
        tokens, codes = torch.tensor([row.tokens for row in rows]), torch.tensor([row.codes for row in rows])
        targets = F.pad(tokens[:, 1:], (0, 1)).reshape(-1)
        codes = F.pad(codes[:, 1:], (0, 1), value=SKIP).reshape(-1)
        share = torch.tensor([1.0 if task == "text" else TEXT_SHARE for task in tasks]).repeat_interleave(length)
        codes[(codes == TEXT) & (torch.rand(codes.shape) > share)] = SKIP
        chosen = codes.nonzero()[:, 0]
        hidden = self.decoder(tokens.reshape(-1), SkipContext(self.config.layers, positions))
        logits = self.decoder.logits(hidden[chosen])
        losses = F.cross_entropy(logits, targets[chosen], reduction="none")
        self.tokens += tokens.numel() * dist.get_world_size()
        right = logits.detach().argmax(dim=-1) == targets[chosen]
        self._note_tasks(tasks, length, chosen // length, codes[chosen], right)
        total = losses.new_zeros(())
        for code, name in ((ANSWER, "answer"), (TEXT, "text"), (REPEAT, "repeat")):
            part = losses[codes[chosen] == code]
            if part.numel():
                total = total + LOSS_WEIGHT[code] * part.mean()
                self._note(name, part.mean().item())
        return total

    def _note_tasks(self, tasks: list[str], length: int, rows: Tensor, codes: Tensor, right: Tensor) -> None:
        """Keep running token accuracies of the answers of every task and length."""
        for index, task in enumerate(tasks):
            mask = (rows == index) & ((codes == ANSWER) | (codes == REPEAT))
            if mask.any():
                self._note(f"{task}@{length}", right[mask].float().mean().item())

    def _note(self, name: str, value: float) -> None:
        self.means[name] = 0.94 * self.means.get(name, value) + 0.06 * value

    def _log(self) -> None:
        entry: dict[str, float] = {
            "step": self.step,
            "seconds": round(self.seconds),
            "mtokens": round(self.tokens / 1e6, 3),
        }
        entry |= {name: round(value, 3) for name, value in sorted(self.means.items())}
        with (self.out / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        print(json.dumps(entry), flush=True)


def work(rank: int, arguments: argparse.Namespace, meeting: str) -> None:
    """Run one worker; workers find each other through the file ``meeting``."""
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=arguments.workers)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed + rank)
    trainer = Trainer(arguments.out, arguments.minutes, arguments.rate, arguments.seed, arguments.offsets, rank)
    trainer.train()
    dist.destroy_process_group()


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=100.0)
    parser.add_argument("--out", type=Path, default=Path("runs/builtin"))
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="torch threads of each worker")
    parser.add_argument("--offsets", type=lambda text: tuple(map(int, text.split(","))), default=OFFSETS)
    arguments = parser.parse_args()
    load_tokenizer(arguments.out)
    with tempfile.TemporaryDirectory() as folder:
        meeting = str(Path(folder) / "meeting")
        spawn(work, args=(arguments, meeting), nprocs=arguments.workers)  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
