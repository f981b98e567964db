"""Every task: sizes for any tokenizer, references that score 1, answers that are what the context says."""

from __future__ import annotations

import json
import re
from collections import Counter
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.evals import ByteTokenizer, PieceTokenizer

from elbowroom.errors import PlanError, RequestError
from elbowroom.evals.base import Sample
from elbowroom.evals.functions import heldout_functions
from elbowroom.evals.run_plan import RunPlan, parse_tasks
from elbowroom.evals.samples import NUM_DECILES, TaskSpec
from elbowroom.evals.scorers import score_turn
from elbowroom.evals.sizing import Draft, Sizer, Units, stratum
from elbowroom.evals.tasks import TASKS

PIECES, BYTES = PieceTokenizer(), ByteTokenizer()
TRAINED = ("retrieval", "chat", "follow_ups", "chains", "many_shot")
GENERATED = tuple(name for name in TASKS.names() if name not in TRAINED)
LENGTHS = {PIECES: 2400, BYTES: 7000}


def make(name: str, tokenizer: PieceTokenizer | ByteTokenizer = PIECES, **changes: object) -> list[Sample]:
    spec = TaskSpec(**{"context_tokens": LENGTHS[tokenizer], "num_queries": 4, "num_facts": 2} | changes)
    return list(TASKS.get(name).samples(tokenizer, spec))


def num_tokens(sample: Sample, tokenizer: PieceTokenizer | ByteTokenizer) -> int:
    tails = [
        len(tokenizer.encode(turn.prompt)) + max(turn.max_new_tokens, len(tokenizer.encode(turn.reference)))
        for turn in sample.turns
    ]
    return len(tokenizer.encode(sample.context)) + (sum(tails) if sample.follow_up else max(tails))


@pytest.mark.parametrize("mode", ["multi_turn", "multi_request"])
@pytest.mark.parametrize("name", TASKS.names())
def test_samples_fill_their_size_and_never_exceed_it(name: str, mode: str):
    made = make(name, mode=mode)
    assert made == make(name, mode=mode)
    for sample in made:
        assert sample.follow_up == (mode == "multi_turn")
        assert 0.75 * 2400 < num_tokens(sample, PIECES) <= sample.num_tokens <= 2400


@pytest.mark.parametrize("name", GENERATED)
def test_a_tokenizer_that_splits_finely_gets_less_text_and_no_cut_answer(name: str):
    for sample in make(name, BYTES):
        assert num_tokens(sample, BYTES) <= sample.num_tokens <= 7000
        assert all(turn.max_new_tokens >= len(BYTES.encode(turn.reference)) for turn in sample.turns)


@pytest.mark.parametrize("name", TASKS.names())
def test_references_score_one_and_those_of_other_questions_do_not(name: str):
    samples = make(name, num_queries=6)
    task, spec = TASKS.get(name), TaskSpec(context_tokens=1, num_facts=2)
    assert sum(len(sample.turns) for sample in samples) >= 6
    for sample in samples:
        assert len(sample.turns) == task.num_questions(spec)
        for turn in sample.turns:
            assert score_turn(turn, turn.reference).value == 1.0
            assert score_turn(turn, "").value == 0.0
            assert turn.reference not in turn.prompt
    first, other = samples[0].turns[0], samples[-1].turns[0]
    if name != "many_shot":  # eight labels: chance
        assert score_turn(first, other.reference).value < 1.0


@pytest.mark.parametrize("name", TASKS.names())
def test_another_seed_asks_something_else(name: str):
    assert make(name, seed=1)[0].context != make(name, seed=2)[0].context


@pytest.mark.parametrize("name", TASKS.names())
def test_what_does_not_fit_is_refused_and_never_cut(name: str):
    plan = RunPlan(tasks=(name,), context_tokens=20, num_facts=2)
    with pytest.raises(RequestError, match=name) as refused:
        next(plan.samples(name, PIECES))
    assert "--length" in (refused.value.hint or "")


@pytest.mark.parametrize("name", [name for name in GENERATED if name.startswith("niah")])
def test_needles_are_in_the_context_once(name: str):
    for sample in make(name):
        for turn in sample.turns:
            assert all(sample.context.count(f" is: {target}.") == 1 for target in turn.targets)
            asked = turn.prompt.split(" for ")[1].split(" mentioned")[0]
            keys = re.split(r", and |, ", asked)
            found = [value for key in keys for value in re.findall(rf" for {key} is: ([\w-]+)\.", sample.context)]
            assert sorted(found) == sorted(turn.targets)


def test_needles_have_the_wording_and_the_limits_of_their_source():
    [sample] = make("niah_single_1", num_facts=1, num_queries=1)
    [turn] = sample.turns
    key = re.search(r"One of the special magic numbers for ([a-z]+-[a-z]+) is: \d{7}\.", sample.context)
    assert key is not None
    assert sample.context.startswith(
        "A special magic number is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the number afterwards.\n"
    )
    assert turn.prompt == (
        f"\nWhat is the special magic number for {key[1]} mentioned in the provided text?"
        f" The special magic number for {key[1]} mentioned in the provided text is"
    )
    assert turn.max_new_tokens == 128


def test_needles_lie_at_all_depths():
    depths = [turn.depth for sample in make("niah_single_1", num_queries=40, num_facts=1) for turn in sample.turns]
    tenths = Counter(min(int(depth * NUM_DECILES), 9) for depth in depths if depth is not None)
    assert len(tenths) == NUM_DECILES
    assert max(tenths.values()) <= 8


def test_variables_of_a_chain_have_the_asked_value():
    for sample in make("vt"):
        text = sample.context.rsplit("Memorize and track", 1)[1]
        links = dict(re.findall(r"^VAR (\w+) = (?:VAR )?(\w+) ?$", text, re.MULTILINE))
        values: dict[str, str] = {}
        for name, source in links.items():  # in order: nothing is used before it is assigned
            values[name] = source if source.isdigit() else values[source]
        for turn in sample.turns:
            value = turn.prompt.split("the value ")[1].split()[0]
            assert {name for name, found in values.items() if found == value} == set(turn.targets)
            assert len(turn.targets) == 5


@pytest.mark.parametrize(("length", "often", "seldom"), [(2400, 6, 1), (4800, 30, 3)])
def test_common_words_are_common(length: int, often: int, seldom: int):
    [sample, *_] = make("cwe", context_tokens=length)
    counts = Counter(re.findall(r"\d+\. (\w+)", sample.context.rsplit("Below is", 1)[1]))
    assert {word for word, count in counts.items() if count == often} == set(sample.turns[0].targets)
    assert set(counts.values()) == {often, seldom}
    assert len(sample.turns[0].targets) == 10


def test_frequent_words_are_the_most_frequent_but_for_the_dots():
    for sample in make("fwe"):
        counts = Counter(re.sub(r"^.*?coded words\. ", "", sample.context).split(" ")).most_common(5)
        assert [word for word, _ in counts[:4]] == ["...", *sample.turns[0].targets]
        assert counts[3][1] > counts[4][1]


def test_values_are_those_of_the_json_object():
    for sample in make("kv"):
        pairs = json.loads(sample.context[sample.context.index("{") :])
        for turn in sample.turns:
            assert pairs[turn.prompt.split('"')[1]] == turn.target


def test_one_string_has_the_given_beginning_and_end_and_others_have_one_of_them():
    for sample in make("prefix_suffix"):
        strings = sample.context.split("\n\n")[1].split("\n")
        for turn in sample.turns:
            prefix, suffix = turn.prompt.split('"')[1::2]
            assert [each for each in strings if each.startswith(prefix) and each.endswith(suffix)] == [turn.target]
            assert sum(each.startswith(prefix) for each in strings) == 2
            assert sum(each.endswith(suffix) for each in strings) == 2


def test_numbers_are_what_the_question_says():
    for sample in make("mf", num_facts=9):
        numbers = sorted(json.loads(sample.context[sample.context.index("[") :]))
        truth = {
            "largest": numbers[-1],
            "second largest": numbers[-2],
            "third largest": numbers[-3],
            "smallest": numbers[0],
            "second smallest": numbers[1],
            "median": median(numbers),
        }
        asked = {turn.prompt.removeprefix("\nThe ").split(" number")[0]: int(turn.target) for turn in sample.turns}
        assert asked == truth


@pytest.mark.parametrize("name", ["repoqa", "repoqa_and_kv"])
def test_functions_are_in_the_code_and_their_descriptions_are_not(name: str):
    for sample in make(name):
        for turn in sample.turns:
            assert sample.context.count(turn.target) == 1
            if turn.scorer == "function":
                description = turn.prompt.split("Description: ")[1].split("\n")[0]
                assert description not in " ".join(sample.context.split())
                assert turn.target not in turn.rivals
                assert all(rival in sample.context for rival in turn.rivals)


def test_descriptions_do_not_name_their_function():
    functions = heldout_functions()
    assert len({function.name for function in functions}) == len(functions) > 200
    assert not any(function.name.lower() in function.description.lower() for function in functions)
    assert not any(function.description in function.code for function in functions)


def test_depth_of_each_part_is_asked_equally_often():
    spec = TaskSpec(context_tokens=1, seed=5)
    places = [stratum(spec, question, 10) for question in range(30)]
    assert Counter(places) == dict.fromkeys(range(10), 3)
    assert places[:10] != places[10:20]


def test_units_are_a_beginning_of_more_units():
    units = Units(iter(range(100)))
    assert units.first(3) == [0, 1, 2]
    assert units.first(5) == [0, 1, 2, 3, 4]
    assert units.first(2) == [0, 1]


@given(st.lists(st.integers(1, 30), min_size=1, max_size=300), st.integers(0, 2000))
def test_as_many_units_are_taken_as_fit(sizes: list[int], budget: int):
    sizer = Sizer(PIECES, TaskSpec(context_tokens=budget))
    turn = sizer.turn("?", ("x",), "x", "share")
    tail = 1 + turn.max_new_tokens

    def draft(count: int) -> Draft:
        return Draft("." * sum(sizes[:count]), (turn,))

    if budget < tail or tail + sum(sizes) <= budget:
        with pytest.raises(RequestError, match=r"were asked for|not enough text"):
            sizer.fit("x", draft, len(sizes))
        return
    taken = max(count for count in range(len(sizes)) if sum(sizes[:count]) + tail <= budget)
    assert len(sizer.fit("x", draft, len(sizes)).context) == sum(sizes[:taken])


def test_names_of_tasks_are_checked():
    assert parse_tasks("retrieval, kv") == ("retrieval", "kv")
    assert parse_tasks("all") == tuple(TASKS.names())
    with pytest.raises(PlanError, match="unknown task 'nothing'"):
        parse_tasks("kv,nothing")
    for text in ("kv,kv", "", "kv,"):
        with pytest.raises(RequestError, match="--tasks"):
            parse_tasks(text)
