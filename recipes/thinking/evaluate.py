"""Exact answers by number of terms, through the engine: ``python -m recipes.thinking.evaluate --questions 100``."""

from __future__ import annotations

import argparse

import numpy as np

from elbowroom.engine.llm import LLM
from elbowroom.engine.sampling_params import SamplingParams
from elbowroom.evals.stats import wilson_interval
from elbowroom.evals.sums import INSTRUCTION, random_sum

TERMS = (1, 2, 4, 8, 12, 16, 20, 24, 26)


def main() -> None:
    """Ask greedily, with and without the system prompt, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="builtin-thinking")
    parser.add_argument("--questions", type=int, default=100, help="of each number of terms")
    parser.add_argument("--seed", type=int, default=1_000_000, help="training uses seeds from 0 on, with the step")
    arguments = parser.parse_args()
    rng, sampling = np.random.default_rng(arguments.seed), SamplingParams(temperature=0.0, max_tokens=128)
    print("| Terms | without the system prompt | with it |\n|---|---|---|")
    with LLM(arguments.model, memory="96MiB") as llm:
        for num_terms in TERMS:
            asked = [random_sum(rng, num_terms) for _ in range(arguments.questions)]
            cells = []
            for system in ([], [{"role": "system", "content": INSTRUCTION}]):
                turns = [[*system, {"role": "user", "content": each.question}] for each in asked]
                outputs = llm.chat(turns, sampling)
                right = sum(out.outputs[0].answer == each.answer for out, each in zip(outputs, asked, strict=True))
                low, high = wilson_interval(right, len(asked))
                cells.append(f"{right / len(asked):.3f} [{low:.3f}-{high:.3f}]")
            print(f"| {num_terms} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
