"""What is logged of a call, by hand."""

import pytest

from trl_cdr import Score
from trl_cdr.training.metrics import Call, add_sums, call_metrics, call_sums, domain_sums, means


def score(value, tokens=2, **fields):
    return Score(value, strong_logps=value - 4.0, weak_logps=-4.0, n_tokens=tokens, **fields)


def test_by_hand():
    call = Call(
        prompts=["a", "a", "b", "b"],
        completions=["x"] * 4,
        tokens=[[1, 1], [1, 2, 9, 9], [5, 5, 5, 6], [1]],
        scores=[
            score(1.0, domain="math", typicality=-2.0, surprise=3.0, survival=0.5, gated=True),
            score(1.0, domain="math", typicality=1.0, surprise=2.0),
            score(-2.0, tokens=4, domain="chat", truncated=True, typicality=float("-inf"), gated=True),
            Score(None, error="no"),
        ],
        rewards=[1.0, 1.0, -3.0, -4.0],
        seconds=0.5,
    )
    metrics = call_metrics(call)
    assert metrics == {
        "strong_logps": pytest.approx((-3 - 3 - 6) / 3),
        "weak_logps": -4.0,
        "strong_logps_per_token": pytest.approx((-3 - 3 - 6) / 8),
        "log_ratio_std": pytest.approx(2**0.5),
        "tokens": pytest.approx(8 / 3),
        "surprise": 2.5,
        "survival": 0.5,
        "typicality": -0.5,
        "truncated": 0.25,
        "unscorable": 0.25,
        "gated": 0.5,
        "ties": 0.5,
        "distinct_tokens": pytest.approx((0.5 + 1 + 0.5) / 3),
        "length_correlation": pytest.approx(-1),
        "seconds": 0.5,
    }
    assert domain_sums(call) == {"math": (2.0, 2), "chat": (-3.0, 1)}


def test_unknown_metrics_are_left_out():
    """Not known is not 0: an average over calls would count it."""
    empty = call_metrics(Call(["a"], ["x"], [[]], [Score(None, error="no")], [-1.0], 0.1))
    assert empty == {"truncated": 0.0, "unscorable": 1.0, "gated": 0.0, "seconds": 0.1}
    full = call_metrics(Call(["a"], ["x"], [[1]], [score(1.0)], [1.0], 0.1))
    assert "length_correlation" not in full  # of one completion
    assert {"strong_logps", "strong_logps_per_token", "tokens", "distinct_tokens"} <= set(full)
    assert all(isinstance(value, float) for value in (*empty.values(), *full.values()))


def test_strong_logps_per_token_weighs_tokens():
    """A short completion of rare tokens counts as what it is: two of twelve tokens."""
    scores = [Score(0.0, strong_logps=-10.0, weak_logps=-10.0, n_tokens=10), Score(0.0, -10.0, -10.0, n_tokens=2)]
    scores.append(Score(None, error="no"))
    call = Call(["a"] * 3, ["x"] * 3, [[1] * 10, [1] * 2, []], scores, [0.0, 0.0, None], 0.1)
    metrics = call_metrics(call)
    assert metrics["strong_logps_per_token"] == pytest.approx(-20 / 12)
    assert metrics["strong_logps"] / metrics["tokens"] == pytest.approx(-20 / 12)


def test_missing_rewards_do_not_tie():
    call = Call(
        ["a"] * 4, ["x"] * 4, [[1]] * 4, [Score(None, error="no")] * 2 + [score(1.0)] * 2, [None, None, 1, 1], 0.1
    )
    assert call_metrics(call)["ties"] == 1
    call = Call(["a"] * 2, ["x"] * 2, [[1]] * 2, [Score(None, error="no")] * 2, [None] * 2, 0.1)
    assert "ties" not in call_metrics(call)


def test_calls_weigh_what_they_counted():
    """Three rows and one, of which one can't be scored: not the mean of two means."""
    first = Call(
        ["a"] * 3, ["x"] * 3, [[1, 2]] * 3, [score(1.0, domain="math"), score(3.0), Score(None)], [1.0, 3.0, None], 2.0
    )
    second = Call(["b"], ["x"], [[1]], [score(-6.0, tokens=1, domain="math")], [-6.0], 1.0)
    sums = add_sums(call_sums(first), call_sums(second), {f"rewards/{k}": v for k, v in domain_sums(first).items()})
    found = means(add_sums(sums, {f"rewards/{k}": v for k, v in domain_sums(second).items()}))
    assert found["strong_logps"] == pytest.approx((-3 - 1 - 10) / 3)
    assert found["tokens"] == pytest.approx(5 / 3)
    assert found["log_ratio_std"] == pytest.approx((1 + 1 + 0) / 3)
    assert found["ties"] == 0
    assert found["seconds"] == 1.5
    assert found["rewards/math"] == -2.5
    nothing = call_sums(Call(["a"], ["x"], [[]], [Score(None, error="no")], [None], 2.0))
    assert means(add_sums(call_sums(second), nothing))["strong_logps"] == -10
