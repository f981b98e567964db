"""Thinking is split from the answer however text comes, and its budget holds exactly under every schedule."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.engine_world import StoreExecutor, World, bound, layer, next_token
from tests.support.tiny_model import write_byte_tokenizer

from elbowroom.engine.output import RequestProcessor
from elbowroom.engine.sampler import SlotSampler
from elbowroom.engine.sampling_params import SamplingParams
from elbowroom.engine.thinking import MarkFinder, ThinkingTracker
from elbowroom.engine.types import KVOp, Request, Row, SampledToken, SequenceUpdate
from elbowroom.errors import RequestError
from elbowroom.models.thinking import ThinkingMarks, find_marks
from elbowroom.models.tokenizer import Tokenizer

STRIP_BYTES = 8192
BEGIN, END = "(", "+)"
"""Bytes 40, 43 and 41: tokens that the world's model makes; it hardly ever writes the two of the end in a row."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("bytes")
    write_byte_tokenizer(directory)
    return Tokenizer.from_directory(directory)


@pytest.fixture(scope="module")
def marks(tokenizer: Tokenizer) -> ThinkingMarks:
    made = find_marks(tokenizer, f"{BEGIN},{END}")
    assert made is not None
    return made


def split(text: str, inside: bool) -> tuple[str, str]:
    """Return thinking and answer of a whole text, the slow way: one mark after the other."""
    parts, may_repeat = {True: "", False: ""}, False
    while text:
        sought = [END] if inside else [BEGIN, END] if may_repeat else [BEGIN]
        if (mark := next((each for each in sought if text.startswith(each)), None)) is not None:
            inside, may_repeat, text = mark == BEGIN, mark == END, text[len(mark) :]
            continue
        parts[inside] += text[0]
        may_repeat = may_repeat and text[0].isspace()
        text = text[1:]
    return parts[True], parts[False]


@given(st.text("(+) a", max_size=30), st.lists(st.integers(1, 4), max_size=30), st.booleans())
def test_text_is_split_alike_however_it_comes(
    marks: ThinkingMarks, text: str, lengths: list[int], inside: bool
) -> None:
    finder, parts, at = MarkFinder(marks, inside), [], 0
    for length in [*lengths, len(text) + 1]:
        parts += finder.push(text[at : at + length])
        at += length
    parts += finder.flush()

    made = tuple("".join(piece for is_thinking, piece in parts if is_thinking == side) for side in (True, False))
    assert made == split(text, inside)


def due_by_hand(prompt: list[int], output: list[int], budget: int | None, last: int | None) -> int | None:
    """Return the token that must come behind ``output``: everything is looked at again for every token."""
    inside, count, at = bytes(prompt).decode().rstrip().endswith(BEGIN), 0, 0
    text = bytes(output).decode()
    while at < len(text):
        if inside and text.startswith(END, at):
            inside, at = False, at + 2
        elif not inside and text[at] == BEGIN:
            inside, at = True, at + 1
        else:
            count, at = count + inside, at + 1
    if not inside:
        return None
    # The first half of the mark is forced once the budget or the reserve is reached, then the second.
    half = text.endswith(END[0]) and _was_forced(prompt, output, budget, last)
    over = (budget is not None and count >= budget) or (last is not None and len(output) >= last)
    return ord(END[1] if half else END[0]) if over else None


def _was_forced(prompt: list[int], output: list[int], budget: int | None, last: int | None) -> bool:
    return due_by_hand(prompt, output[:-1], budget, last) == ord(END[0])


def expected(request: Request, sample: int) -> list[int]:
    """Return what a request must generate with its limits on thinking."""
    params, prompt = request.sampling, list(request.prompt_token_ids)
    last = params.max_tokens - params.answer_reserve - len(END) if params.answer_reserve else None
    output: list[int] = []
    while len(output) < params.max_tokens:
        due = due_by_hand(prompt, output, params.thinking_budget, last)
        output.append(next_token(prompt + output, params.seed, sample) if due is None else due)
    return output


class ThinkingExecutor(StoreExecutor):
    """Takes tokens through samplers, which know of earlier ones by the history of new slots alone."""

    marks: ThinkingMarks
    samplers: dict[int, SlotSampler]

    def choose(self, row: Row, content: list[int]) -> int:
        """Return what the sampler makes of the world's token."""
        if row.sample.history is not None:
            self.samplers[row.slot] = SlotSampler.start(row.sample, self.marks)
        sampler = self.samplers[row.slot]
        token = sampler.chosen(super().choose(row, content))
        sampler.accept(token)
        return token

    def apply(self, op: KVOp) -> bool:
        """Forget the samplers of closed slots."""
        if op.kind == "close":
            self.samplers.pop(op.slot, None)
        return super().apply(op)


def world(marks: ThinkingMarks, blocks: int, step_tokens: int) -> World:
    made = World(bound(layer()), blocks * STRIP_BYTES, max_step_tokens=step_tokens)
    executor = ThinkingExecutor(made.store)
    executor.marks, executor.samplers = marks, {}
    made.executor = executor
    return made


@st.composite
def thinkers(draw: st.DrawFn) -> list[Request]:
    requests = []
    for number in range(draw(st.integers(1, 5))):
        max_tokens = draw(st.integers(4, 150))
        params = SamplingParams(
            n=draw(st.integers(1, 2)),
            max_tokens=max_tokens,
            seed=draw(st.integers(0, 99)),
            ignore_eos=True,
            thinking_budget=draw(st.none() | st.integers(0, 40)),
            answer_reserve=draw(st.integers(0, max_tokens - 1)),
        )
        prompt = draw(st.lists(st.integers(8, 30), min_size=1, max_size=90)) + draw(
            st.sampled_from([[], [40], [40, 10]])
        )
        requests.append(Request(id=number, prompt_token_ids=tuple(prompt), sampling=params))
    return requests


@settings(max_examples=25, deadline=None)
@given(thinkers(), st.integers(6, 20), st.sampled_from([7, 64, 512]))
def test_a_budget_holds_exactly_whatever_the_schedule(
    marks: ThinkingMarks, requests: list[Request], blocks: int, step_tokens: int
) -> None:
    made = world(marks, blocks, step_tokens).run_all(requests)

    for request in requests:
        for sample in range(request.sampling.n):
            assert made[request.id, sample] == expected(request, sample)


def test_sequences_that_are_preempted_keep_their_budgets(marks: ThinkingMarks) -> None:
    params = SamplingParams(max_tokens=150, seed=3, ignore_eos=True, thinking_budget=100)
    requests = [Request(id=n, prompt_token_ids=(9 + n, 40), sampling=params) for n in range(6)]
    small = world(marks, 6, 512)
    made = small.run_all(requests)

    assert small.scheduler.stats().preemptions > 0
    assert all(made[request.id, 0] == expected(request, 0) for request in requests)
    assert all(ord(END[0]) == made[n, 0][made[n, 0].index(43)] for n in range(6))
    for n in range(6):
        text = bytes(made[n, 0]).decode()
        assert text.index(END) <= 100


def tracked(marks: ThinkingMarks, text: str, prompt: str = "x") -> ThinkingTracker:
    tracker = ThinkingTracker(marks, list(prompt.encode()))
    for byte in text.encode():
        tracker.push(byte)
    return tracker


@pytest.mark.parametrize(
    ("text", "count"),
    [("(abc+)de", 3), ("abc", 0), ("(a+b", 3), ("(a+", 2), ("(a+)b(cd+)", 3), ("(++)", 1), ("(+)", 0)],
)
def test_tokens_of_marks_are_not_counted(marks: ThinkingMarks, text: str, count: int) -> None:
    assert tracked(marks, text).num_reasoning == count


def test_a_prompt_that_ends_with_the_mark_opens_the_thinking(marks: ThinkingMarks) -> None:
    assert tracked(marks, "abc", "say (\n").phase == "reasoning"
    assert tracked(marks, "abc", "say (this").phase == "answer", "a user's own text is no mark"


def outputs(
    tokenizer: Tokenizer, marks: ThinkingMarks | None, text: str, **params: object
) -> tuple[object, list[object]]:
    request = Request(id=1, prompt_token_ids=(65,), sampling=SamplingParams(**params))
    processor = RequestProcessor(request, [tokenizer.stream_decoder()], marks)
    deltas = []
    for number, byte in enumerate(text.encode(), start=1):
        reason = "length" if number == len(text.encode()) else None
        delta, hit = processor.push(SequenceUpdate(1, 0, [SampledToken(byte)], reason), float(number))
        deltas.append(delta)
        if hit:
            break
    return processor.output, deltas


def test_deltas_say_what_is_thinking_and_when_the_answer_is_seen(tokenizer: Tokenizer, marks: ThinkingMarks) -> None:
    output, deltas = outputs(tokenizer, marks, "so (wäre+) \nja")
    sample = output.outputs[0]

    assert (sample.text, sample.reasoning, sample.answer) == ("so (wäre+) \nja", "wäre", "so  \nja")
    assert sample.num_reasoning_tokens == 5
    assert "".join(delta.answer for delta in deltas) == sample.answer
    assert [delta.phase for delta in deltas][3:10] == ["reasoning"] * 7
    assert output.ttfvt_s == 1.0
    assert outputs(tokenizer, marks, "(ab+) \nja")[0].ttfvt_s == 8.0
    assert outputs(tokenizer, marks, "(abc")[0].ttfvt_s is None


def test_without_marks_all_is_answer(tokenizer: Tokenizer) -> None:
    sample = outputs(tokenizer, None, "(a+)b")[0].outputs[0]
    assert (sample.reasoning, sample.answer, sample.num_reasoning_tokens) == ("", "(a+)b", 0)


def test_stop_strings_end_thinking_too(tokenizer: Tokenizer, marks: ThinkingMarks) -> None:
    sample = outputs(tokenizer, marks, "(abcd+)e", stop=("cd",))[0].outputs[0]
    assert (sample.reasoning, sample.answer, sample.finish_reason) == ("ab", "", "stop")


@pytest.mark.parametrize("asked", ["<think>", "<think>,", ",</think>", "a,a"])
def test_malformed_marks_are_refused(tokenizer: Tokenizer, asked: str) -> None:
    with pytest.raises(RequestError, match="two different texts"):
        find_marks(tokenizer, asked)


def test_marks_are_found_where_a_model_has_them(tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert find_marks(tokenizer) is None
    write_byte_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ content.split('</think>') }}")
    found = find_marks(Tokenizer.from_directory(tmp_path))
    assert found is not None
    assert (found.begin, found.end) == ("<think>", "</think>")
    assert find_marks(Tokenizer.from_directory(tmp_path), "none") is None


@pytest.mark.parametrize("values", [{"thinking_budget": -1}, {"thinking_budget": True}, {"answer_reserve": -1}])
def test_limits_are_checked(values: dict[str, int]) -> None:
    with pytest.raises(RequestError, match=next(iter(values))):
        SamplingParams(**values)


def test_a_reserve_must_leave_room_for_thinking() -> None:
    with pytest.raises(RequestError, match="answer_reserve must be below max_tokens=8"):
        SamplingParams(max_tokens=8, answer_reserve=8)
