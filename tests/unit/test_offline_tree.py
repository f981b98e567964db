"""The prefix tree and the plan of an offline job, against brute force."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elbowroom.engine.offline import JobPlan, PrefixTree, PromptSpool
from elbowroom.engine.offline.plan import LEAST_SPARED, SHORTEST_STEM


class Lists:
    """Prompts in memory."""

    def __init__(self, prompts: Sequence[Sequence[int]]) -> None:
        self.prompts = [np.asarray(prompt, dtype=np.int32) for prompt in prompts]

    def __len__(self) -> int:
        return len(self.prompts)

    def read(self, prompt: int, start: int, stop: int) -> npt.NDArray[np.int32]:
        return self.prompts[prompt][start:stop]

    def length(self, prompt: int) -> int:
        return len(self.prompts[prompt])


def tree_of(prompts: Sequence[Sequence[int]], weights: Sequence[int] = ()) -> PrefixTree:
    tree = PrefixTree(Lists(prompts))
    for number in range(len(prompts)):
        tree.insert(number, weights[number] if weights else 1)
    return tree


PROMPTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=25)


@settings(max_examples=100, deadline=None)
@given(PROMPTS)
def test_the_least_tokens_are_the_distinct_prefixes(prompts: list[list[int]]) -> None:
    tree = tree_of(prompts)
    distinct = {tuple(prompt[:count]) for prompt in prompts for count in range(1, len(prompt) + 1)}

    assert tree.least_tokens == len(distinct)
    assert tree.total_tokens == sum(map(len, prompts))


@settings(max_examples=100, deadline=None)
@given(PROMPTS, st.integers(1, 5))
def test_in_blocks_only_whole_ones_are_shared(prompts: list[list[int]], grain: int) -> None:
    blocks = {tuple(prompt[: (at + 1) * grain]) for prompt in prompts for at in range(len(prompt) // grain)}

    expected = len(blocks) * grain + sum(len(prompt) % grain for prompt in prompts)
    assert tree_of(prompts).least_tokens_in_blocks(grain) == expected


@settings(max_examples=60, deadline=None)
@given(PROMPTS)
def test_every_node_is_a_prefix_of_all_below_it_and_counts_them(prompts: list[list[int]]) -> None:
    tree = tree_of(prompts)
    members = tree.members()
    for number, prompt in enumerate(prompts):
        path = tree.path(number)
        assert tree.depth[path[-1]] == len(prompt)
        for node in path:
            assert list(tree.path(number)).count(node) == 1
            assert prompts[tree.prompt[node]][: tree.depth[node]] == prompt[: tree.depth[node]]
            same = [other for other in prompts if other[: tree.depth[node]] == prompt[: tree.depth[node]]]
            assert members[node] == len(same)
    assert all(len(list(tree.children(node))) != 1 or node in tree.ends.values() for node in range(1, len(tree)))


@settings(max_examples=60, deadline=None)
@given(PROMPTS, st.sampled_from(["planned", "sorted", "arrival"]))
def test_an_order_has_every_prompt_once_and_members_next_to_each_other(prompts: list[list[int]], order: str) -> None:
    tree = tree_of(prompts)
    plan = JobPlan.of(tree, Lists(prompts), [1] * len(prompts), order)  # type: ignore[arg-type]

    assert sorted(plan.order) == list(range(len(prompts)))
    if order == "arrival":
        return
    for node in range(1, len(tree)):
        places = [place for place, prompt in enumerate(plan.order) if node in tree.path(prompt)]
        assert places == list(range(places[0], places[-1] + 1))


def test_branches_that_decode_much_for_what_they_read_come_first() -> None:
    prompts = [[1, 1, 1, 1, 5], [2, 2, 5], [1, 1, 1, 1, 6], [2, 2, 6]]
    plan = JobPlan.of(tree_of(prompts), Lists(prompts), [3, 40, 3, 10])

    assert list(plan.order) == [1, 3, 0, 2]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(1, 40)), min_size=2, max_size=20),
    st.lists(st.integers(1, 3), min_size=20, max_size=20),
)
def test_stems_count_down_to_their_last_member_and_are_worth_it(
    shapes: list[tuple[int, int, int]], weights: list[int]
) -> None:
    prompts = [[first] * 50 + [second + 3] * 30 + [7] * rest for first, second, rest in shapes]
    tree = tree_of(prompts, weights[: len(prompts)])
    plan = JobPlan.of(tree, Lists(prompts), [1] * len(prompts))
    left: dict[bytes, int] = {}
    tokens: dict[bytes, list[int]] = {}
    members, computed, kept = tree.members(), 0, set[bytes]()
    for prompt, stems in plan.feed():
        assert stems is not None
        above = 0
        for stem in stems:
            assert tokens.setdefault(stem.key, prompts[prompt][: stem.num_tokens]) == prompts[prompt][: stem.num_tokens]
            assert left.get(stem.key, stem.to_come + 1) == stem.to_come + 1
            assert stem.num_tokens - above >= SHORTEST_STEM
            left[stem.key] = stem.to_come
            computed += 0 if stem.key in kept else stem.num_tokens - above
            kept.add(stem.key)
            above = stem.num_tokens
        computed += max(len(prompts[prompt]) - above, 1) * tree.weight.get(prompt, 1)
        for node in tree.path(prompt):
            depth, parent = tree.depth[node], tree.depth[tree.parent[node]]
            if (depth - parent) * (members[node] - 1) >= LEAST_SPARED and depth - parent >= SHORTEST_STEM:
                assert any(stem.num_tokens == depth for stem in stems)
    assert all(count == 0 for count in left.values())
    assert computed == plan.planned_tokens


def test_a_deep_tree_needs_no_recursion() -> None:
    prompts = [[1] * count for count in range(1, 1500)]
    tree = tree_of(prompts[::-1])

    assert tree.least_tokens == 1499
    assert list(JobPlan.of(tree, Lists(prompts[::-1]), [1] * 1499).order) == list(range(1498, -1, -1))


@pytest.mark.parametrize("lengths", [[3, 1, 70_000]])
def test_a_spool_gives_back_what_it_was_given(tmp_path: Path, lengths: list[int]) -> None:
    prompts = [list(range(count)) for count in lengths]
    with PromptSpool(tmp_path) as spool:
        assert [spool.append(prompt) for prompt in prompts] == [0, 1, 2]
        spool.flush()

        assert [list(spool.tokens(number)) for number in range(3)] == prompts
        assert spool.read(2, 10, 13).tolist() == [10, 11, 12]
        assert not list(tmp_path.iterdir()), "the file has a name"
