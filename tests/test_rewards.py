"""Rewards behind the gates. The formulas have tests of their own (`test_ratio`, `test_surprise`)."""

import math

import pytest

from trl_cdr import Score, UnscorableError
from trl_cdr.scoring.rewards import rewards_from_scores
from trl_cdr.scoring.surprise import surprise_reward


def score(value):
    return Score(value) if value is not None else Score(None, error="the reason")


@pytest.mark.parametrize(
    ("values", "policy", "expected"),
    [
        ([1.0, None, -2.0], "floor", [1.0, -3.0, -2.0]),
        ([5.0, None], "floor", [5.0, 4.0]),
        ([None, None], "floor", [-1.0, -1.0]),
        ([None, -7.5], "floor", [-8.5, -7.5]),
        ([1.0, None], "none", [1.0, None]),
        ([], "floor", []),
    ],
)
def test_rewards_from_scores(values, policy, expected):
    assert rewards_from_scores([score(value) for value in values], on_unscorable=policy) == expected


@pytest.mark.parametrize(
    ("elsewhere", "floor"), [({"a": -4.0}, -5.0), ({"a": 3.0}, -3.0), ({"b": -9.0}, -3.0), ({}, -3.0)]
)
def test_floor_of_a_group_on_two_processes(elsewhere, floor):
    """The lowest reward of the same group counts, wherever it is."""

    def lowest(worst):
        return {name: min(worst.get(name, inf), elsewhere.get(name, inf)) for name in worst | elsewhere}

    inf = math.inf
    rows = [score(value) for value in (1.0, None, -2.0)]
    assert rewards_from_scores(rows, on_unscorable="floor", groups="aaa", lowest=lowest) == [1.0, floor, -2.0]
    rest = rewards_from_scores([score(None)], on_unscorable="floor", groups="a", lowest=lowest)
    assert rest == [elsewhere.get("a", 0.0) - 1.0]


def test_the_gate_that_made_the_score_makes_the_reward():
    rows = [Score(2.0, gated=True, typicality=-2.0), Score(2.0, typicality=0.0)]
    rows.append(Score(2.0, gated=True, surprise=30.0, survival=None, n_tokens=4, finished=True))
    exact = surprise_reward(2.0, surprise=30.0, survived=None, n_tokens=4, is_cut_off=False, reduction="sum")
    assert rewards_from_scores(rows, on_unscorable="raise") == [-1.0, 2.0, exact]
    assert exact < 0


def test_raise_stops_at_the_first_row_without_a_value():
    with pytest.raises(UnscorableError, match="row 1 can't be scored: the reason"):
        rewards_from_scores([score(1.0), score(None)], on_unscorable="raise")


@pytest.mark.parametrize(
    ("values", "groups", "expected"),
    [
        ([1.0, None, -50.0, -60.0], "aabb", [1.0, 0.0, -50.0, -60.0]),  # not 1 below the other prompt's
        ([None, 1.0, None, -60.0], "abba", [-61.0, 1.0, 0.0, -60.0]),
        ([None, None, 5.0, 4.0], "aabb", [3.0, 3.0, 5.0, 4.0]),  # a group without a score: the call's worst
        ([None, None], "ab", [-1.0, -1.0]),
    ],
)
def test_floor_is_the_groups(values, groups, expected):
    scores = [score(value) for value in values]
    assert rewards_from_scores(scores, on_unscorable="floor", groups=list(groups)) == expected


def test_floor_keeps_the_groups_advantages():
    """A long neighbour changes no advantage of a group with an unscorable row."""
    own = [score(value) for value in (-1.0, -2.0, None, -1.5)]
    for neighbour in (-3.0, -130.0):
        rows = [*own, *[score(neighbour)] * 4]
        found = rewards_from_scores(rows, on_unscorable="floor", groups=[*"aaaabbbb"])
        assert found[:4] == [-1.0, -2.0, -3.0, -1.5]
