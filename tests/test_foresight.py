"""Rank correlation of the probe's figures with what became of runs, by hand."""

import pytest

from trl_cdr.demo.foresight import correlate


def win(mean, worst):
    return {"mean": mean, "worst": worst}


def test_settings_and_gates_are_ranked():
    figures = {
        "one": {"none": win(0.5, 1.0), "typicality": win(0.1, 0.2)},
        "two": {"none": win(0.4, 1.0), "typicality": win(0.2, 0.1)},
    }
    gold = {
        "one": {"none": [0.1, 0.2], "typicality": [0.8], "gold": [0.9]},
        "two": {"none": [0.3], "typicality": [0.6, 0.8]},
        "three": {"none": [0.5]},
    }
    found = correlate(figures, gold)
    assert (found["points"], found["figures"]) == (4, 4)
    assert found["mean"] == pytest.approx(-1)
    # Ranks 3.5, 2, 3.5, 1 beside 1, 4, 2, 3; their squares about 2.5 sum to 4.5 and 5.
    assert found["worst"] == pytest.approx((1 * -1.5 + -0.5 * 1.5 + 1 * -0.5 + -1.5 * 0.5) / (4.5 * 5) ** 0.5)


def test_what_does_not_vary_has_no_rank():
    assert correlate({"one": {"none": win(0.5, 1.0)}}, {"one": {"none": [0.1]}})["mean"] is None
