"""Counting: credits, means of domains, intervals, and length taken out, each beside a slow or a hand-made oracle."""

import numpy as np
import pytest

from trl_cdr.annotation import rewardbench
from trl_cdr.annotation.accuracy import Choices, average, credits, strata, without_length
from trl_cdr.annotation.preferences import Preference


def preference(*, domain="chat", subset="one", prompt="p", chosen=("a",), rejected=("b",), id="0"):
    return Preference(id=id, prompt=prompt, chosen=chosen, rejected=rejected, subset=subset, domain=domain)


def test_the_mean_is_of_domains_and_a_domain_is_of_its_subsets():
    rows = [
        *(preference(subset="large", prompt=str(place)) for place in range(3)),
        *(preference(subset="small", prompt=str(place)) for place in range(2)),
        preference(domain="safety", subset="only"),
    ]
    [found] = average(np.array([[1.0, 1.0, 0.0, 0.0, 0.5, 1.0]]), rows, seed=0)
    assert {name: mean for name, (mean, _, _) in found["subsets"].items()} == {
        "large": pytest.approx(2 / 3),
        "small": 0.25,
        "only": 1.0,
    }
    assert found["domains"]["chat"][0] == pytest.approx((2 / 3 + 0.25) / 2)
    assert found["mean"][0] == pytest.approx(((2 / 3 + 0.25) / 2 + 1.0) / 2)  # pooled it would be 3.5 / 6


def test_intervals_are_by_prompt_within_subsets():
    earned = np.array([[0.0, 1.0] * 20])
    [alone] = average(earned, [preference(prompt=str(place)) for place in range(40)], seed=0)
    assert alone["mean"][0] == 0.5
    assert 0.3 < alone["mean"][1] < 0.4 < 0.6 < alone["mean"][2] < 0.7
    [together] = average(earned, [preference(prompt=str(place % 2)) for place in range(40)], seed=0)
    assert together["mean"] == [0.5, 0.0, 1.0]  # two prompts, one always right and one never
    [apart] = average(earned, [preference(subset=str(place % 2), prompt=str(place)) for place in range(40)], seed=0)
    assert apart["mean"] == [0.5, 0.5, 0.5]  # nothing varies within either


def test_columns_are_drawn_together():
    rng = np.random.default_rng(0)
    one = rng.integers(0, 2, 50).astype(float)
    found = average(np.stack([one, one + 0.25, one - one]), [preference(prompt=str(p)) for p in range(50)], seed=3)
    assert found[1]["mean"] == pytest.approx([value + 0.25 for value in found[0]["mean"]])
    assert found[2]["mean"] == [0.0, 0.0, 0.0]


def test_a_subset_of_two_domains_is_two():
    rows = [preference(domain=domain) for domain in ("chat", "safety")]
    assert [(each.name, each.domain, each.places) for each in strata(rows)] == [
        ("chat/one", "chat", [0]),
        ("safety/one", "safety", [1]),
    ]
    [found] = average(np.array([[1.0, 0.0]]), rows, seed=0)
    assert {name: mean for name, (mean, _, _) in found["subsets"].items()} == {"chat/one": 1.0, "safety/one": 0.0}


def test_credits_are_those_of_the_rule():
    shapes = [(1, 1), (1, 3), (1, 1), (3, 2), (2, 4), (1, 3)] * 20
    rows = [
        preference(chosen=tuple(map(str, range(right))), rejected=tuple(map(str, range(right, right + wrong))))
        for right, wrong in shapes
    ]
    values = np.random.default_rng(0).integers(0, 4, sum(map(sum, shapes))).astype(float)  # with ties
    found = credits(values, Choices.of(rows))
    start = 0
    for (right, wrong), earned in zip(shapes, found, strict=True):
        chosen, rejected = values[start : start + right], values[start + right : start + right + wrong]
        assert earned == rewardbench.credit(chosen.tolist(), rejected.tolist())
        start += right + wrong
    assert {0.0, 1 / 4, 1 / 3, 1 / 2, 1.0} >= set(found.tolist()) > {0.0, 1 / 2, 1.0}


def slow_regression(values, lengths, share=0.9, rounds=3):
    """As `without_length`, with a line fitted by numpy's own least squares at each place."""
    places = np.unique(np.quantile(lengths, np.linspace(0, 1, 100)))
    trust = np.ones(len(values))
    for _ in range(rounds + 1):
        heights = []
        for place in places:
            far = np.abs(lengths - place)
            weights = (1 - np.clip(far / np.sort(far)[int(share * len(far)) - 1], 0, 1) ** 3) ** 3 * trust
            heights.append(np.polyval(np.polyfit(lengths, values, 1, w=np.sqrt(weights)), place))
        residuals = values - np.interp(lengths, places, heights)
        trust = (1 - np.clip(residuals / (6 * np.median(np.abs(residuals))), -1, 1) ** 2) ** 2
    return residuals


def test_length_is_taken_out_as_by_a_slow_regression():
    rng = np.random.default_rng(1)
    lengths = rng.integers(1, 400, 60).astype(float)
    values = np.sqrt(lengths) + rng.normal(size=60)
    values[5] += 80  # one that the rounds weigh down
    assert without_length(values, lengths) == pytest.approx(slow_regression(values, lengths), abs=1e-6)


def test_what_is_length_alone_is_taken_out_whole():
    lengths = np.arange(1.0, 51.0)
    quality = np.where(np.arange(50) % 2, 0.5, -0.5)
    left = without_length(3 * lengths + quality, lengths)
    assert np.sign(left).tolist() == np.sign(quality).tolist()
    assert np.abs(without_length(3 * lengths, lengths)).max() < 1e-6
    assert without_length(quality, np.full(50, 7.0)).tolist() == (quality - quality.mean()).tolist()
