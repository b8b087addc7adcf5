"""Intervals of means, by groups."""

from trl_cdr.annotation.intervals import bootstrap


def test_intervals_are_by_group():
    alone = bootstrap([0.0, 1.0] * 50, range(100))
    assert alone[0] == 0.5
    assert 0.35 < alone[1] < 0.45 < 0.55 < alone[2] < 0.65
    together = bootstrap([0.0] * 50 + [1.0] * 50, [place // 25 for place in range(100)])
    assert together == [0.5, 0.0, 1.0]  # four groups, whose draws are all 0 now and then
    assert bootstrap([1.0], ["one"]) == [1.0, 1.0, 1.0]
