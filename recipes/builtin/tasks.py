"""Training rows of the built-in model: keyed facts, variable chains, many-shot labels, repeats, plain source text.

Every row has exactly T tokens. A code says what each token teaches when it is predicted: nothing (random facts
cannot be predicted), text, an answer that the context determines, or a repeat of a random block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from elbowroom.evals import facts as wording
from recipes.builtin.data import Corpus

SKIP, TEXT, ANSWER, REPEAT = 0, 1, 2, 3
"""What a token teaches."""


@dataclass(slots=True)
class Piece:
    """A run of tokens with their codes."""

    tokens: list[int] = field(default_factory=list)
    codes: list[int] = field(default_factory=list)

    def add(self, tokens: Sequence[int], code: int) -> Piece:
        """Append ``tokens`` that all teach ``code``; return self."""
        self.tokens += tokens
        self.codes += [code] * len(tokens)
        return self

    def extend(self, other: Piece) -> None:
        """Append another piece."""
        self.tokens += other.tokens
        self.codes += other.codes


@dataclass(slots=True)
class Row(Piece):
    """A whole row; positions may jump at ``joints`` (never inside a fact or a question)."""

    joints: list[int] = field(default_factory=list)


class RowMaker:
    """Makes rows of every task from one corpus and one random generator.

    Args:
        corpus: distractor text.
        tokenizer: the built-in model's tokenizer.
        words: words for the many-shot task.
        rng: source of all randomness.
    """

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer, words: Sequence[str], rng: np.random.Generator) -> None:
        self._corpus, self._tokenizer, self._words, self.rng = corpus, tokenizer, words, rng
        self._makers = {
            "facts": self.facts,
            "chat": self.chat,
            "chains": self.chains,
            "shots": self.shots,
            "repeat": self.repeat,
            "text": self.text,
        }

    def make(self, task: str, length: int) -> Row:
        """Return one row of ``task`` with ``length`` tokens."""
        return self._makers[task](length)

    def text(self, length: int) -> Row:
        """Plain source text."""
        tokens, _ = self._corpus.slice(self.rng, length)
        return Row(tokens, [TEXT] * length)

    def repeat(self, length: int) -> Row:
        """A random block repeated to the end; small alphabets force matching of more than one token."""
        rng = self.rng
        period = int(rng.integers(6, max(9, length // 3)))
        first, vocab = 5, self._tokenizer.get_vocab_size()
        if rng.random() < 0.4:
            alphabet = rng.integers(first, vocab, size=int(rng.integers(8, 65)))
            period = max(period, 12)
            block = alphabet[rng.integers(len(alphabet), size=period)]
        else:
            block = rng.integers(first, vocab, size=period)
        tokens = np.tile(block, -(-length // period))[:length].tolist()
        known = min(length, period + 3)
        return Row(tokens, [SKIP] * known + [REPEAT] * (length - known))

    def facts(self, length: int) -> Row:
        """Facts in distractor text, then questions as plain completions."""
        rng = self.rng
        pairs, form = self._pairs(length, per_fact=26), self._form()
        lines = [self._fact_line(form, key, value) for key, value in pairs]
        tail = Piece()
        same_form = rng.random() < 0.75
        for index in rng.permutation(len(pairs)):
            key, value = pairs[index]
            asked = form if same_form else self._form()
            tail.add(self._encode("\n" + asked.prompt.format(key=key)), SKIP)
            tail.add(self._encode(" " + value), ANSWER).add(self._encode(asked.ending), TEXT)
        return self._assemble(length, Piece(), lines, tail)

    def chat(self, length: int) -> Row:
        """Facts in a user message, questions and answers as chat turns."""
        rng = self.rng
        pairs = self._pairs(length, per_fact=42)
        lines = [self._fact_line(wording.SENTENCE, key, value) for key, value in pairs]
        head, tail = Piece().add(self._encode("<|user|>"), SKIP), Piece()
        for turn, index in enumerate(rng.permutation(len(pairs))):
            key, value = pairs[index]
            opening = "\n" if turn == 0 else "<|user|>"
            question = wording.CHAT_QUESTION.format(key=key)
            tail.add(self._encode(f"{opening}{question}<|end|><|assistant|>"), SKIP)
            tail.add(self._encode(f"{wording.SENTENCE.fact(key, value)}<|end|>"), ANSWER)
        return self._assemble(length, head, lines, tail)

    def chains(self, length: int) -> Row:
        """Variables assigned numbers or other variables, then traces of the last variable of each chain."""
        rng = self.rng
        hops = int(rng.integers(1, 4))
        per_chain = 10 + 22 * hops
        chains = []
        for _ in range(int(rng.integers(1, max(2, min(12, (length - 16) // per_chain) + 1)))):
            names = [wording.random_key(rng) for _ in range(hops)]
            chains.append((names, [wording.random_value(rng), *names]))
        order = rng.permutation([number for number, _ in enumerate(chains) for _ in range(hops)])
        done = [0] * len(chains)
        lines = []
        for number in order:
            names, values = chains[number]
            lines.append(self._fact_line(wording.VARIABLE, names[done[number]], values[done[number]]))
            done[number] += 1
        tail = Piece()
        for number in rng.permutation(len(chains)):
            prompt, answer = wording.trace(*chains[number])
            tail.add(self._encode("\n" + prompt), SKIP).add(self._encode(answer), ANSWER)
        return self._assemble(length, Piece(), lines, tail)

    def shots(self, length: int) -> Row:
        """Items with labels; every label of an item seen before is an answer."""
        rng = self.rng
        share = 1.0 if rng.random() < 0.5 else rng.uniform(0.3, 0.8)
        count = int(rng.integers(4, max(6, length // 14)))
        words = [self._words[index] for index in rng.choice(len(self._words), size=count, replace=False)]
        labels = [wording.LABELS[index] for index in rng.integers(len(wording.LABELS), size=count)]
        seen: set[int] = set()
        first, second = Piece(), Piece()
        budget = int((length - 8) * share)
        while len(first.tokens) + len(second.tokens) < budget - 12:
            index = int(rng.integers(count))
            target = first if len(first.tokens) < 0.6 * budget else second
            target.add(self._encode(wording.SHOT.prompt.format(key=words[index])), SKIP)
            target.add(self._encode(" " + labels[index]), ANSWER if index in seen else SKIP)
            target.add(self._encode("\n"), SKIP)
            seen.add(index)
        return self._assemble(length, Piece(), [first], Piece().add(self._encode("\n"), SKIP), second)

    def positions(self, row: Row, limit: int) -> NDArray[np.int64]:
        """Return positions ``[T]`` below ``limit`` that jump at up to three joints of ``row``."""
        positions = np.arange(len(row.tokens), dtype=np.int64)
        spare = limit - len(positions)
        if row.joints and spare > 0 and self.rng.random() < 0.5:
            jumps = self.rng.choice(row.joints, size=int(self.rng.integers(1, 4)))
            total = spare * self.rng.random() ** 2
            for joint, part in zip(jumps, self.rng.dirichlet(np.ones(len(jumps))), strict=True):
                positions[joint:] += int(total * part)
        return positions

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text).ids)

    def _form(self) -> wording.FactForm:
        return wording.FORMS[int(self.rng.choice(3, p=(0.6, 0.2, 0.2)))]

    def _pairs(self, length: int, per_fact: int) -> list[tuple[str, str]]:
        most = max(1, min(14 if length < 1024 else 24, int((length - 24) * 0.8) // per_fact))
        count = int(self.rng.integers(1, most + 1))
        return [(wording.random_key(self.rng), wording.random_value(self.rng)) for _ in range(count)]

    def _fact_line(self, form: wording.FactForm, key: str, value: str) -> Piece:
        return Piece().add(self._encode(form.fact(key, value) + "\n"), SKIP)

    def _assemble(self, length: int, head: Piece, lines: list[Piece], *tail: Piece) -> Row:
        """Return ``head``, source text with ``lines`` in between in order, then ``tail``, cut to ``length``."""
        row = Row()
        row.extend(head)
        fixed = len(head.tokens) + sum(len(piece.tokens) for piece in (*lines, *tail))
        filler = max(length - fixed, 1)
        tokens, starts = self._corpus.slice(self.rng, filler)
        depths = sorted(self.rng.integers(0, filler, size=len(lines)))
        begin = 0
        for line, depth in zip(lines, depths, strict=True):
            stop = starts[int(np.searchsorted(starts, depth, side="right")) - 1]
            row.joints += [len(row.tokens) + start - begin for start in starts if begin < start < stop]
            row.add(tokens[begin:stop], TEXT)
            row.joints.append(len(row.tokens))
            row.extend(line)
            begin = stop
        row.joints.append(len(row.tokens))
        row.add(tokens[begin:], TEXT)
        row.joints.append(len(row.tokens))
        for piece in tail:
            row.extend(piece)
        del row.tokens[length:], row.codes[length:]
        row.joints = [joint for joint in row.joints if 0 < joint < length]
        return row
