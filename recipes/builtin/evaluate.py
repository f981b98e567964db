"""Evaluate a trained or exported built-in model: ``python -m recipes.builtin.evaluate --queries 400``.

The dense reference: the context is read once, then all its questions in one batch with the reference answers behind
them (teacher forcing). A question counts when every token of its reference answer is the most likely one, which is
what greedy decoding without any cache compression would write.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from elbowroom.core import LayerSpec
from elbowroom.evals import samples
from elbowroom.evals.base import Sample, TextTokenizer
from elbowroom.evals.bits_per_byte import bits_per_byte
from elbowroom.evals.retrieval import Outcome, RetrievalResult, summarize
from elbowroom.models.decoder import Decoder
from elbowroom.models.dense import DenseContext
from elbowroom.weights.resident import ResidentWeights
from recipes.builtin.export import BUILT_IN
from recipes.builtin.model import tied_config, untied_config


class PlainTokenizer:
    """The ``tokenizers`` library's tokenizer behind the two calls that tasks need."""

    def __init__(self, path: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(path))

    def encode(self, text: str) -> list[int]:
        """Return token ids; special tokens in the text become themselves."""
        return list(self._tokenizer.encode(text).ids)

    def decode(self, token_ids: list[int]) -> str:
        """Return the text, special tokens included."""
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=False))


class PrefixContext:
    """Dense attention of B tails of T tokens over one shared prefix of P tokens and over themselves.

    The first pass (``batch=1``, no prefix) records keys and values per layer; the second reads them.
    """

    def __init__(self, layers: Sequence[LayerSpec], prefix: PrefixContext | None, batch: int, length: int) -> None:
        self._layers, self._prefix, self._batch, self.length = layers, prefix, batch, length
        start = 0 if prefix is None else prefix.length
        self._positions = torch.arange(start, start + length).repeat(batch)
        self._mask = torch.ones(length, start + length, dtype=torch.bool).tril(start)
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def positions(self) -> Tensor:
        """int64 ``[B * T]``."""
        return self._positions

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return attention ``[B * T, Hq, Dv]``."""
        spec = self._layers[layer]
        q, k, v = (x.view(self._batch, self.length, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
        if self._prefix is None:
            self.kept[layer] = (k, v)
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=spec.scale, enable_gqa=True)
        else:
            past_k, past_v = (x.expand(self._batch, -1, -1, -1) for x in self._prefix.kept[layer])
            k, v = torch.cat((past_k, k), dim=2), torch.cat((past_v, v), dim=2)
            out = F.scaled_dot_product_attention(q, k, v, self._mask, scale=spec.scale, enable_gqa=True)
        return out.transpose(1, 2).reshape(self._batch * self.length, spec.num_q_heads, spec.v_head_dim)

    def end_layer(self, layer: int) -> None:
        """Keys and values of the prefix stay for the tails."""


class DenseReference:
    """A model read from a checkpoint of the training or from an exported folder, in float32."""

    def __init__(self, path: Path) -> None:
        if path.is_dir():
            config, tensors = untied_config(), load_file(path / "model.safetensors")
            tensors = {name.removeprefix("model."): tensor.float() for name, tensor in tensors.items()}
            tokenizer = path / "tokenizer.json"
        else:
            config, tensors = tied_config(), torch.load(path, weights_only=True)["weights"]
            tokenizer = path.parent / "tokenizer.json"
        self.tokenizer: TextTokenizer = PlainTokenizer(tokenizer)
        self._layers = config.layers
        self._decoder = Decoder(config, ResidentWeights(tensors, config.activation))

    @torch.inference_mode()
    def outcomes(self, sample: Sample) -> Iterator[Outcome]:
        """Yield one outcome per question of ``sample``."""
        encode = self.tokenizer.encode
        prompts = [encode(turn.prompt) for turn in sample.turns]
        answers = [encode(turn.reference) for turn in sample.turns]
        if sample.follow_up:
            tails = [[token for pair in zip(prompts, answers, strict=True) for part in pair for token in part]]
        else:
            tails = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        predicted = self._predict(encode(sample.context), tails)
        start = 0
        for index, (turn, prompt, answer) in enumerate(zip(sample.turns, prompts, answers, strict=True)):
            row = predicted[0 if sample.follow_up else index]
            start = (start if sample.follow_up else 0) + len(prompt)
            said = row[start - 1 : start - 1 + len(answer)].tolist()
            start += len(answer)
            yield Outcome(sample.id, turn.target, self.tokenizer.decode(said), said == answer, turn.depth)

    @torch.inference_mode()
    def log_probs(self, tokens: list[int]) -> list[float]:
        """Return the natural log probability of every token after the first, given all before."""
        ids = torch.tensor(tokens)
        hidden = self._decoder(ids, DenseContext(self._layers, 1, len(tokens)))
        logits = self._decoder.logits(hidden[:-1])
        return [float(x) for x in -F.cross_entropy(logits, ids[1:], reduction="none")]

    def _predict(self, context: list[int], tails: list[list[int]]) -> Tensor:
        """Return the most likely next token at every place of every tail, int64 ``[B, T]``."""
        prefix = PrefixContext(self._layers, None, 1, len(context))
        self._decoder(torch.tensor(context), prefix)
        length = max(map(len, tails))
        padded = torch.tensor([tail + [0] * (length - len(tail)) for tail in tails])
        hidden = self._decoder(padded.reshape(-1), PrefixContext(self._layers, prefix, len(tails), length))
        return self._decoder.logits(hidden).argmax(dim=-1).view(len(tails), length)


Generator = Callable[[TextTokenizer, samples.TaskSpec], Iterable[Sample]]
CELLS: tuple[tuple[str, Generator, int, int], ...] = (
    ("retrieval, 1 fact", samples.retrieval, 1, 1),
    ("retrieval, 4 facts", samples.retrieval, 4, 1),
    ("retrieval, 16 facts", samples.retrieval, 16, 1),
    ("chat, 4 facts", samples.chat, 4, 1),
    ("follow-ups, 4 facts", samples.follow_ups, 4, 1),
    ("chains, 4 x 1 hop", samples.chains, 4, 1),
    ("chains, 4 x 2 hops", samples.chains, 4, 2),
    ("chains, 4 x 3 hops", samples.chains, 4, 3),
    ("many-shot, 16 items", samples.many_shot, 16, 1),
)
"""Name, generator, facts per context, hops."""


def measure(model: DenseReference, cell: tuple[str, Generator, int, int], spec: samples.TaskSpec) -> RetrievalResult:
    """Return the dense accuracy of ``model`` in one cell."""
    generated = list(cell[1](model.tokenizer, spec))
    outcomes = [outcome for sample in generated for outcome in model.outcomes(sample)]
    return summarize(outcomes, max(sample.num_tokens for sample in generated))


def main() -> None:
    """Parse the command line, print one JSON line per cell and write all of them to ``--out``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=BUILT_IN, help="exported folder or checkpoint.pt")
    parser.add_argument("--lengths", type=int, nargs="*", default=[512, 1024, 2048, 4096])
    parser.add_argument("--cells", nargs="+", default=[cell[0] for cell in CELLS], help="beginnings of cell names")
    parser.add_argument("--queries", type=int, default=400)
    parser.add_argument("--windows", type=int, default=60, help="windows of the bits per byte, 0 to skip them")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/evaluation.jsonl"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model, rows = DenseReference(arguments.model), []
    for length in arguments.lengths:
        for cell in CELLS:
            if any(cell[0].startswith(name) for name in arguments.cells):
                start = time.perf_counter()
                spec = samples.TaskSpec(
                    context_tokens=length, num_queries=arguments.queries, num_facts=cell[2], hops=cell[3]
                )
                result = measure(model, cell, spec)
                rows.append({"cell": cell[0], "context_tokens": length} | result.to_json())
                low = result.lowest_decile()
                print(
                    f"{length:5} {cell[0]:20} {result.accuracy:.3f} {result.interval[0]:.3f}-{result.interval[1]:.3f}"
                    f" lowest decile {low if low is None else round(low, 3)}"
                    f" n {result.num_queries} ({time.perf_counter() - start:.0f} s)",
                    flush=True,
                )
    if arguments.windows:
        text = bits_per_byte(model.log_probs, model.tokenizer, num_windows=arguments.windows)
        rows.append({"cell": "bits per byte", "bits_per_byte": text.bits_per_byte, "num_bytes": text.num_bytes})
        print(f"bits per byte {text.bits_per_byte:.3f} over {text.num_bytes} bytes")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
