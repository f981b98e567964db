"""Write examples/workshop.txt, the document of the demonstration: a workshop's notes with a dozen codes in them.

The text is made from the lists below with a fixed seed, so that it can be made again:
``python examples/make_document.py``. The sentences that state a code are worded as the built-in model knows them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from elbowroom.evals.facts import SENTENCE, random_key, random_value

NUM_NOTES = 122
NUM_FACTS = 12
OUTPUT = Path(__file__).with_name("workshop.txt")

PARTS = (
    "brass hinges", "oak dowels", "copper pipes", "steel springs", "rubber seals", "glass tubes", "pine boards",
    "lead weights", "cotton belts", "iron hooks", "tin plates", "clay moulds", "spare blades", "wooden wedges",
)  # fmt: skip
PLACES = (
    "the upper shelf", "the long bench", "the left drawer", "the green cabinet", "the box by the door",
    "the rack near the lathe", "the crate under the stairs", "the case with the files",
)  # fmt: skip
PEOPLE = ("Mara", "Tom", "Ines", "Paul", "Ruth", "Olaf")
TASKS = (
    "swept the floor and emptied the bin", "cleaned the drill press", "set the clock again", "mended the small saw",
    "sorted the screws by length", "put oil on the vice", "painted the handle of the plane", "washed the brushes",
)  # fmt: skip
NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "twelve", "twenty")


def note(rng: np.random.Generator) -> str:
    """Return one line of the notes."""

    def pick(words: tuple[str, ...]) -> str:
        return words[int(rng.integers(len(words)))]

    kinds = (
        lambda: f"There are {pick(NUMBERS)} {pick(PARTS)} in {pick(PLACES)}.",
        lambda: f"{pick(PEOPLE)} {pick(TASKS)} before lunch.",
        lambda: f"{pick(PEOPLE)} took {pick(NUMBERS)} {pick(PARTS)} from {pick(PLACES)}.",
        lambda: f"Order more {pick(PARTS)} if fewer than {pick(NUMBERS)} are left.",
        lambda: f"The {pick(PARTS)} were moved to {pick(PLACES)} and counted by {pick(PEOPLE)}.",
        lambda: f"Nobody has used the {pick(PARTS)} since {pick(PEOPLE)} {pick(TASKS)}.",
    )
    return kinds[int(rng.integers(len(kinds)))]()


def document(seed: int = 7) -> tuple[str, dict[str, str]]:
    """Return the text and the code of every key in it."""
    rng = np.random.default_rng(seed)
    codes = {random_key(rng): random_value(rng) for _ in range(NUM_FACTS)}
    lines = [note(rng) for _ in range(NUM_NOTES)]
    places = np.linspace(2, NUM_NOTES - 2, NUM_FACTS).astype(int)
    for place, (key, value) in sorted(zip(places.tolist(), codes.items(), strict=True), reverse=True):
        lines.insert(place, SENTENCE.fact(key, value))
    return "Notes of the workshop\n\n" + "\n".join(lines) + "\n", codes


if __name__ == "__main__":
    text, _ = document()
    OUTPUT.write_text(text, encoding="utf-8")
