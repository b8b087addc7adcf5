"""Which two of a group make its pair, and which pairs teach nothing."""

import math
import random
from collections import Counter

import pytest
import torch

from trl_cdr.scoring.selection import Pair, combine_rewards, select_all_pairs, select_pair

NAN, INF = math.nan, math.inf


def select(rewards, strategy="best_worst", **options):
    return select_pair(rewards, strategy=strategy, rng=random.Random(0), **options)


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ([1.0, 3.0, -2.0, 0.0], Pair(1, 2, 5.0, None)),
        ([3.0, 1.0, 3.0, 1.0], Pair(0, 1, 2.0, None)),  # of equals the first
        ([NAN, 1.0, -INF, 0.0], Pair(1, 3, 1.0, None)),  # what is missing is neither best nor worst
        ([INF, 1.0, 0.0], Pair(1, 2, 1.0, None)),
        ([2.0, 2.0], Pair(0, 1, 0.0, "tie")),
    ],
)
def test_best_and_worst(rewards, expected):
    assert select(rewards) == expected
    assert expected.weight == (0.0 if expected.skipped else 1.0)


@pytest.mark.parametrize("rewards", [[NAN, NAN, NAN], [NAN, 1.0, NAN], [INF, 1.0]])
def test_fewer_than_two_rewards_make_no_pair(rewards):
    pair = select(rewards)
    assert pair.skipped == "missing"
    assert pair.weight == 0
    assert pair.chosen != pair.rejected
    assert math.isnan(pair.margin)


def test_the_margin_that_is_asked_for():
    assert select([1.0, 0.5], min_margin=0.5).skipped is None
    assert select([1.0, 0.6], min_margin=0.5) == Pair(0, 1, 0.4, "min_margin")
    assert select([1.0, 1.0], min_margin=0.5).skipped == "tie"


def test_what_was_cut_off_is_in_no_pair():
    rewards = [3.0, 1.0, -2.0, 0.0]
    assert select(rewards, truncated=[0, 2]) == Pair(1, 3, 1.0, None)
    assert select(rewards, "best_random", truncated={0, 2}) == Pair(1, 3, 1.0, None)
    assert select(rewards, truncated=[0, 1, 2]).skipped == "truncated"
    assert select([3.0, NAN, NAN, 0.0], truncated=[0]).skipped == "truncated"
    assert select([3.0, NAN, NAN, NAN], truncated=[0]).skipped == "missing"  # no pair with it either


def test_best_against_a_random_other():
    rng = random.Random(0)
    drawn = Counter(
        select_pair([0.0, 5.0, 1.0, NAN, 2.0], strategy="best_random", rng=rng).rejected for _ in range(3000)
    )
    assert set(drawn) == {0, 2, 4}
    assert all(900 < count < 1100 for count in drawn.values())
    assert select([1.0, 1.0, 1.0], "best_random").skipped == "tie"


def test_all_pairs():
    assert select_all_pairs([1.0, NAN, 3.0, 1.0]) == [
        Pair(2, 0, 2.0, None),
        Pair(0, 3, 0.0, "tie"),
        Pair(2, 3, 2.0, None),
    ]
    assert select_all_pairs([0.0, 3.0, 1.0], min_margin=2.0, truncated=[2]) == [Pair(1, 0, 3.0, None)]
    assert [pair.skipped for pair in select_all_pairs([0.0, 3.0, 1.0], min_margin=2.0)] == [None, "min_margin", None]
    assert [pair.skipped for pair in select_all_pairs([0.0, NAN])] == ["missing"]
    assert [pair.skipped for pair in select_all_pairs([0.0, 1.0], truncated=[1])] == ["truncated"]


def test_the_draw_is_the_generators_and_nobody_elses():
    random.seed(0)
    before = random.getstate()
    rewards = [0.0, 3.0, 1.0, 2.0]
    draws = [
        [select_pair(rewards, strategy="best_random", rng=rng).rejected for _ in range(20)]
        for rng in (random.Random(1), random.Random(1), random.Random(2))
    ]
    assert draws[0] == draws[1] != draws[2]
    assert random.getstate() == before


@pytest.mark.parametrize("seed", range(20))
def test_the_order_of_a_group_does_not_matter(seed):
    rng = random.Random(seed)
    rewards = [rng.uniform(-5, 5) for _ in range(rng.randint(2, 9))]
    order = rng.sample(range(len(rewards)), len(rewards))
    pair, moved = select(rewards), select([rewards[index] for index in order])
    assert (order[moved.chosen], order[moved.rejected], moved.margin) == (pair.chosen, pair.rejected, pair.margin)


def combine(rewards, weights, num_generations=2, **options):
    found = combine_rewards(torch.tensor(rewards), torch.tensor(weights), num_generations=num_generations, **options)
    return [None if math.isnan(value) else value for value in found.tolist()]


def test_rewards_are_weighed_and_added():
    assert combine([[1.0, 2.0], [0.0, -4.0]], [1.0, 0.5]) == [2.0, -2.0]


def test_a_function_that_is_silent_about_a_group_is_left_out_there():
    assert combine([[-3.0, NAN], [-4.0, NAN], [1.0, 2.0], [0.0, 1.0]], [1.0, 1.0]) == [-3.0, -4.0, 3.0, 1.0]


def test_a_completion_that_one_function_can_not_judge_is_missing():
    """0 in place of the second reward would make the first completion the better one."""
    assert combine([[-3.0, NAN], [-3.0, -1.0], [-1.0, -1.0]], [1.0, 1.0], 3) == [None, -4.0, -2.0]
    assert combine([[INF], [1.0]], [1.0]) == [None, 1.0]


def test_a_group_that_nobody_judges_is_missing():
    assert combine([[NAN, NAN], [NAN, NAN]], [1.0, 1.0]) == [None, None]


def test_a_function_without_weight_only_watches():
    assert combine([[1.0, NAN], [2.0, INF]], [1.0, 0.0]) == [1.0, 2.0]


def test_normalized_rewards_do_not_depend_on_units():
    """The first function's unit is a thousand times the other's: it decides unless both are normalized."""
    rewards = [[1000.0, 0.0], [1001.0, 3.0], [1002.0, -3.0], [999.0, -1.0]]
    plain = combine(rewards, [1.0, 1.0], 4)
    assert plain.index(max(plain)) == 1
    scaled = [[large * 1000, small] for large, small in rewards]
    plain = combine(scaled, [1.0, 1.0], 4)
    assert plain.index(max(plain)) == 2
    for given in (rewards, scaled):
        found = combine(given, [1.0, 1.0], 4, normalize=True)
        assert found.index(max(found)) == 1
        assert sum(found) == pytest.approx(0, abs=1e-9)
    column = torch.tensor(rewards, dtype=torch.float64)
    expected = ((column - column.mean(0)) / (column.std(0) + 1e-4)).sum(1)
    assert combine(rewards, [1.0, 1.0], 4, normalize=True) == pytest.approx(expected.tolist(), abs=1e-3)


def test_normalized_rewards_keep_what_is_missing():
    """A missing value of one completion changes no other completion's order, and equal values stay equal."""
    found = combine([[1.0, NAN], [2.0, 5.0], [4.0, 9.0], [INF, 7.0]], [1.0, 1.0], 4, normalize=True)
    assert [value is None for value in found] == [True, False, False, True]
    assert found[1] < found[2]
    assert combine([[3.0, NAN], [3.0, NAN]], [1.0, 1.0], normalize=True) == [0.0, 0.0]
    assert combine([[NAN], [NAN]], [1.0], normalize=True) == [None, None]


def test_group_of_one_is_no_pair():
    pair = select([2.0])
    assert (pair.chosen, pair.rejected, pair.weight, pair.skipped) == (0, 0, 0.0, "missing")
