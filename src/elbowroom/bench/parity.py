"""parity: does the engine compute what the model says, whatever the schedule?

Everything is compared on each compute path: all passes on torch, decode native and prefill on torch, all native.
``parity.logits``: float32 logits of every family through the KV store, in chunks, against transformers, on prompts of
1 to 1,000 tokens; the value is the worst error over 1e-4 x max(1, max|reference|). ``parity.schedules``: greedy tokens
of every family (and of the trained stories260K where its files are) under every schedule of ``schedules``, against a
plain loop that recomputes everything; the value is the number of tokens that differ without excuse. ``native.parity``:
the same of the native paths alone. Printed without a claim: how often bfloat16 chooses the token of float32.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from elbowroom.bench.base import BenchOptions, BenchResult, Claim, Row
from elbowroom.bench.families import FAMILIES, write_family
from elbowroom.bench.machine import machine_info
from elbowroom.bench.paged_logits import paged_logits
from elbowroom.bench.schedules import SCHEDULES, Difference, Subject, reference_tokens
from elbowroom.kernels import backend_name
from elbowroom.models.decoder import Decoder
from elbowroom.models.loader import load_model
from elbowroom.models.path import ANY, ComputePath

PROMPT_TOKENS = (1, 17, 64, 65, 300, 1000)
SCHEDULED_PROMPTS = (100, 170, 333)
NEW_TOKENS = 64
PATHS = {"torch": ComputePath(0), "native decode": ComputePath(8), "native": ComputePath(ANY)}
MAX_EXCUSED = 1e-3
"""Share of tokens that may differ because the reference's top two were closer than 2e-4."""


def run(options: BenchOptions) -> BenchResult:
    """Compare every family (quick: two, with short prompts)."""
    machine = machine_info()
    rows: list[Row] = []
    found = {name: Difference() for name in _paths()}
    if importlib.util.find_spec("transformers") is None:
        claims = [_unmeasured(name) for name in ("parity.logits", "parity.schedules", "native.parity")]
        return BenchResult(name="parity", machine=machine, rows=rows, claims=claims)
    names = list(FAMILIES)[:2] if options.quick else list(FAMILIES)
    ratios: list[float] = []
    with tempfile.TemporaryDirectory() as scratch, torch.inference_mode():
        for name in names:
            directory = Path(scratch) / name
            model = write_family(name, directory, options.seed)
            decoder = load_model(directory, torch.float32)
            rows += _logits_rows(name, model, decoder, ratios, options)
            rows += _schedule_rows(name, decoder, found, options)
            rows.append(_bf16_row(name, decoder, load_model(directory, torch.bfloat16), options))
        rows += _stories_rows(Path(scratch) / "stories", found, options)
    return BenchResult(
        name="parity", machine=machine, rows=rows, claims=[_logits_claim(ratios), *_tokens_claims(found)]
    )


def _prompt(vocab_size: int, length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(1000 * seed + length)
    tokens: list[int] = torch.randint(0, vocab_size, (length,), generator=generator).tolist()
    return tokens


def _paths() -> dict[str, ComputePath]:
    """Return the paths that can run here."""
    return PATHS if backend_name() == "native" else {"torch": PATHS["torch"]}


def _logits_rows(name: str, model: Any, decoder: Decoder, ratios: list[float], options: BenchOptions) -> list[Row]:
    rows: list[Row] = []
    for length in PROMPT_TOKENS[:3] if options.quick else PROMPT_TOKENS:
        tokens = _prompt(decoder.config.vocab_size, length, options.seed)
        reference = model(torch.tensor([tokens]), use_cache=False).logits[0]
        highest = max(1.0, reference.abs().max().item())
        for path_name, path in _paths().items():
            error = (paged_logits(decoder, tokens, 200, path) - reference).abs().max().item()
            ratios.append(error / (1e-4 * highest))
            measured = {"prompt_tokens": length, "max_error": error, "ratio": ratios[-1]}
            rows.append({"family": name, "path": path_name, **measured})
    return rows


def _schedule_rows(name: str, decoder: Decoder, found: dict[str, Difference], options: BenchOptions) -> list[Row]:
    rows: list[Row] = []
    for seed, length in enumerate(SCHEDULED_PROMPTS[:1] if options.quick else SCHEDULED_PROMPTS):
        tokens = _prompt(decoder.config.vocab_size, length, options.seed + seed)
        reference = reference_tokens(decoder, tokens, NEW_TOKENS)
        for (path, of_path), schedule in itertools.product(_paths().items(), SCHEDULES):
            here = Difference()
            for made in SCHEDULES[schedule](Subject(decoder, of_path), tokens, NEW_TOKENS, options.seed + seed):
                here.add(made, reference)
            found[path].merge(here)
            counted = {"tokens": here.num_tokens, "unexcused": here.unexcused, "excused": here.excused}
            rows.append({"family": name, "path": path, "prompt_tokens": length, "schedule": schedule, **counted})
    return rows


def _bf16_row(name: str, exact: Decoder, rounded: Decoder, options: BenchOptions) -> Row:
    tokens = _prompt(exact.config.vocab_size, 64 if options.quick else 300, options.seed)
    paths = PATHS["torch"], ComputePath.choose(torch.bfloat16, exact.config.hidden_size)
    logits = [paged_logits(each, tokens, 200, path) for each, path in zip((exact, rounded), paths, strict=True)]
    choices = [each.argmax(dim=-1) for each in logits]
    return {"family": name, "bf16_agreement": float((choices[0] == choices[1]).float().mean()), "tokens": len(tokens)}


def _stories_rows(directory: Path, found: dict[str, Difference], options: BenchOptions) -> list[Row]:
    root = Path(__file__).parents[3]
    if not (root / "tests/support/llama2c.py").exists():
        return [{"family": "stories260K", "skipped": "the converter is in the source tree only"}]
    sys.path.insert(0, str(root))
    llama2c = importlib.import_module("tests.support.llama2c")
    sys.path.remove(str(root))
    if not llama2c.STORIES.exists():
        return [{"family": "stories260K", "skipped": f"no files at {llama2c.STORIES} (set ELBOWROOM_DATA)"}]
    llama2c.convert(llama2c.STORIES / "stories260K.bin", directory)
    return _schedule_rows("stories260K", load_model(directory, torch.float32), found, options)


def _logits_claim(ratios: list[float]) -> Claim:
    return Claim(
        id="parity.logits",
        value=max(ratios),
        op="<=",
        target=1,
        unit="worst error over 1e-4 x max(1, max|reference|)",
        num_runs=len(ratios),
        low=min(ratios),
        high=max(ratios),
    )


def _tokens_claims(found: dict[str, Difference]) -> list[Claim]:
    every, native = Difference(), Difference()
    for path, here in found.items():
        every.merge(here)
        if path != "torch":
            native.merge(here)
    made = [_tokens_claim("parity.schedules", every)]
    if not native.num_tokens:
        return [*made, _unmeasured("native.parity", "the native module was not built: `make install` builds it")]
    return [*made, _tokens_claim("native.parity", native)]


def _tokens_claim(name: str, found: Difference) -> Claim:
    excused = f"{found.excused} of {found.num_tokens} tokens excused"
    too_many = found.excused > MAX_EXCUSED * found.num_tokens
    value = found.unexcused + (found.excused if too_many else 0)
    reason = f"{excused}: more than 1 in 1,000, all counted" if too_many else excused
    return Claim(id=name, value=value, op="<=", target=0, unit="differing tokens", reason=reason)


def _unmeasured(name: str, reason: str = "transformers is not installed: `make bench` installs it") -> Claim:
    return Claim(id=name, value=None, op="<=", target=0, unit="not measured", num_runs=0, reason=reason)
