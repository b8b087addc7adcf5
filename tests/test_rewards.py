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


@pytest.mark.parametrize(("elsewhere", "floor"), [(-4.0, -5.0), (3.0, -3.0), (math.inf, -3.0)])
def test_the_floor_of_a_step_that_is_several_calls(elsewhere, floor):
    rows = [score(1.0), score(None), score(-2.0)]
    found = rewards_from_scores(rows, on_unscorable="floor", lowest=lambda worst: min(worst, elsewhere))
    assert found == [1.0, floor, -2.0]
    nothing = rewards_from_scores([score(None)], on_unscorable="floor", lowest=lambda worst: min(worst, elsewhere))
    assert nothing == [elsewhere - 1 if math.isfinite(elsewhere) else -1.0]


def test_the_gate_that_made_the_score_makes_the_reward():
    rows = [Score(2.0, gated=True, typicality=-2.0), Score(2.0, typicality=0.0)]
    rows.append(Score(2.0, gated=True, surprise=30.0, survival=None, n_tokens=4, finished=True))
    exact = surprise_reward(2.0, surprise=30.0, survived=None, n_tokens=4, is_cut_off=False, reduction="sum")
    assert rewards_from_scores(rows, on_unscorable="raise") == [-1.0, 2.0, exact]
    assert exact < 0


def test_raise_stops_at_the_first_row_without_a_value():
    with pytest.raises(UnscorableError, match="row 1 can't be scored: the reason"):
        rewards_from_scores([score(1.0), score(None)], on_unscorable="raise")
