"""Plans: every token of every row once on its path, where it would stand and see what it would see if it ran alone."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trl_cdr.scoring import packing
from trl_cdr.scoring.packing import (
    MIN_PREFIX,
    Layout,
    PackLimits,
    common_prefix,
    group_rows,
    plan_batches,
    plan_packs,
    visible,
)
from trl_cdr.scoring.types import Row

tokens = st.integers(0, 3)  # few, so that prompts and completions repeat
completion = st.lists(tokens, min_size=1, max_size=9).map(tuple)
prompts = st.lists(st.lists(tokens, min_size=1, max_size=6).map(tuple), min_size=1, max_size=4)


def limits(tokens, good_tokens=None, entries=10**12):
    return PackLimits(tokens=tokens, entries=entries, good_tokens=good_tokens or tokens)


@pytest.fixture(params=[2, MIN_PREFIX], ids=["stems", "no stems"])
def shortest_stem(request, monkeypatch):
    """Prompts here are short: as long as these, and a tree that is too large is cut at its fork."""
    monkeypatch.setattr(packing, "MIN_PREFIX", request.param)


@st.composite
def calls(draw):
    """The rows of a call and the length of the prefix that all of them start with."""
    prefix = tuple(draw(st.lists(tokens, max_size=5)))
    choices = draw(prompts)
    count = draw(st.integers(1, 10))
    return [Row(prefix + draw(st.sampled_from(choices)), draw(completion)) for _ in range(count)], len(prefix)


@given(calls())
def test_num_unique_counts_each_token_once(call):
    rows, num_prefix = call
    layout = Layout(rows, constant=rows[0].prompt_ids[:num_prefix])
    assert layout.num_unique == num_prefix + sum(len(pack.ids) for pack in layout.packs(limits(10**9)))


@given(calls(), st.integers(1, 40), st.sampled_from([None, 1, 2, 5]))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@pytest.mark.usefixtures("shortest_stem")
def test_a_packed_row_is_the_row_run_alone(call, max_tokens, window):
    rows, num_constant = call
    packs = plan_packs(rows, limits(max_tokens), num_prefix=num_constant)
    assert sorted(index for pack in packs for index in pack.rows) == list(range(len(rows)))
    for pack in packs:
        num_prefix = num_constant + len(pack.stem)
        assert {rows[index].prompt_ids[num_constant:num_prefix] for index in pack.rows} <= {pack.stem, ()}
        seen = visible(pack, num_prefix=num_prefix, window=window)
        assert seen.shape == (len(pack.ids), num_prefix + len(pack.ids))
        ends = torch.tensor(pack.counts).cumsum(0).tolist()
        for index, count, end in zip(pack.rows, pack.counts, ends, strict=True):
            row = rows[index]
            assert pack.targets[end - count : end].tolist() == list(row.completion_ids)
            for place, position in zip(
                pack.predicting[end - count : end].tolist(), range(*row.predicting.indices(len(row.ids))), strict=True
            ):
                assert pack.positions[place] == position
                # What it sees is exactly its own row up to itself: as tokens, and by position.
                columns = seen[place].nonzero().squeeze(1)
                before, own = columns[columns < num_prefix], columns[columns >= num_prefix] - num_prefix
                first = 0 if window is None else max(0, position - window + 1)
                assert before.tolist() == list(range(first, num_prefix))
                assert pack.positions[own].tolist() == list(range(max(first, num_prefix), position + 1))
                assert pack.ids[own].tolist() == list(row.ids[max(first, num_prefix) : position + 1])


@given(calls(), st.integers(1, 40))
def test_packs_are_full_unique_and_deterministic(call, max_tokens):
    rows, num_prefix = call
    packs = plan_packs(rows, limits(max_tokens), num_prefix=num_prefix)
    for pack in packs:
        assert len(pack.ids) <= max_tokens or len(pack.rows) == 1
    unlimited = plan_packs(rows, limits(10**6), num_prefix=num_prefix)
    assert len(unlimited) == 1
    distinct = {row.prompt_ids for row in rows}
    unique = sum(len(prompt) - num_prefix for prompt in distinct) + sum(len(row.completion_ids) - 1 for row in rows)
    assert len(unlimited[0].ids) == unique
    again = plan_packs(list(rows), limits(max_tokens), num_prefix=num_prefix)
    assert [pack.ids.tolist() for pack in again] == [pack.ids.tolist() for pack in packs]


def test_a_tree_that_is_too_large_is_split_by_its_completions():
    rows = [Row((1, 2, 3), (4,) * length) for length in (5, 3, 7, 3)]
    packs = plan_packs(rows, limits(9), num_prefix=0)
    assert [pack.rows for pack in packs] == [(0, 1), (2,), (3,)]
    assert [len(pack.ids) for pack in packs] == [9, 9, 5]


def test_a_tree_with_a_long_prompt_is_cut_at_its_fork():
    long = tuple(range(MIN_PREFIX + 1))
    rows = [Row((50, 60, *long), (4,) * 4) for _ in range(4)] + [Row((50, 60, 1), (4,) * 4)]
    stemmed, other = plan_packs(rows, limits(MIN_PREFIX), num_prefix=2)
    assert (stemmed.stem, other.stem) == (long[:-1], ())
    assert stemmed.ids.tolist() == [long[-1], *[4] * 12]
    assert stemmed.positions.tolist() == [2 + MIN_PREFIX, *[3 + MIN_PREFIX, 4 + MIN_PREFIX, 5 + MIN_PREFIX] * 4]
    assert other.rows == (4,)


def test_limits_bound_what_a_mask_holds_and_what_is_seen():
    assert limits(100, entries=25).most(0) == 5
    assert limits(100, entries=36).most(5) == 4  # 4 x (5 + 4)
    assert limits(3, entries=36).most(5) == 3
    assert limits(100, entries=1).most(50) == 1
    assert PackLimits(tokens=100, entries=10**6, good_tokens=100, seen=60).most(20) == 40


def test_a_prompt_that_is_nothing_but_its_conditioning_keeps_a_token_of_its_own():
    """The last token predicts: it is no part of what is run apart."""
    constant = tuple(range(MIN_PREFIX))
    rows = [Row(constant, (7, 8)), Row((*constant, 5), (7, 8))]
    groups = group_rows(rows, [constant, constant])
    assert [(group.indices, group.layout.constant) for group in groups] == [((0,), ()), ((1,), constant)]
    for group in groups:
        for pack in group.layout.packs(limits(100)):
            assert min(pack.predicting.tolist()) >= 0
            assert -1 in pack.branch.tolist()  # a token of the prompt


def test_trees_share_a_pack_only_up_to_a_good_size():
    rows = [Row((prompt, 2, 3), (4,) * 4) for prompt in range(4)]
    packs = plan_packs(rows, limits(100, 13), num_prefix=0)
    assert [len(pack.ids) for pack in packs] == [12, 12]
    large = [Row((1, 2, 3), (4,) * 4) for _ in range(4)]  # one tree is not split for it
    assert [len(pack.ids) for pack in plan_packs(large, limits(100, 5), num_prefix=0)] == [15]


PREFIX = tuple(range(100, 100 + MIN_PREFIX))


@pytest.mark.parametrize(
    ("tails", "length"),
    [
        ([(1, 2), (3, 4)], MIN_PREFIX),
        ([(1, 2), (1, 3)], MIN_PREFIX + 1),
        ([(1,), (1, 3)], MIN_PREFIX),  # the last token of a prompt predicts, so it stays
        ([(), (1,)], 0),  # which leaves too little here
        ([(1, 2), (1, 2)], MIN_PREFIX + 1),
        ([(1, 2)], 0),  # a single row shares with nobody
    ],
)
def test_common_prefix(tails, length):
    rows = [Row(PREFIX + tail, (9,)) for tail in tails]
    assert common_prefix(rows) == (PREFIX + tails[0])[:length]
    assert Layout(rows).prefix == common_prefix(rows)


def test_no_rows():
    assert Layout([]).packs(limits(10)) == []
    assert Layout([]).prefix == ()


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 200))
def test_batches(lengths, budget):
    batches = plan_batches(lengths, budget)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= budget
    in_order = [lengths[index] for batch in batches for index in batch]
    assert in_order == sorted(lengths, reverse=True)
    assert plan_batches(lengths, budget) == batches


def test_batches_are_filled():
    assert plan_batches([4, 1, 4, 1, 1], 8) == [[0, 2], [1, 3, 4]]


def test_subset_keeps_the_constant_prefix():
    """Rows that are run again, after a lack of memory, are split as they were, and their prefix is kept."""
    rows = [Row((*PREFIX, number), (1, 2)) for number in range(3)]
    layout = Layout(rows, constant=PREFIX[:-2])
    part = layout.subset([2, 0])
    assert part.rows == (rows[2], rows[0])
    assert part.constant == part.prefix == PREFIX[:-2]
    assert layout.subset([1]).prefix == PREFIX[:-2]
