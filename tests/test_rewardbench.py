"""The rules of the published sets, on values made up for them and worked out by hand."""

import math

import pytest

from trl_cdr.annotation.rewardbench import (
    REWARD_BENCH,
    REWARD_BENCH_2,
    credit,
    find_benchmark,
    looks_like,
    selftest,
    ties_score,
)


@pytest.mark.parametrize("check", selftest(), ids=lambda check: check.rule)
def test_the_selftest_holds(check):
    assert check.holds, check


def test_the_selftest_finds_another_rule(monkeypatch):
    monkeypatch.setitem(REWARD_BENCH.sections["Reasoning"], "math-prm", 447)
    assert [check.rule for check in selftest() if not check.holds] == [
        "RewardBench: Reasoning, mathematics as much as code",
        "RewardBench: mean of four sections",
        "RewardBench: prior sets at half the weight",
    ]


def test_the_weights_are_those_of_the_data_set():
    counts = {name: sum(section.values()) for name, section in REWARD_BENCH.sections.items()}
    assert counts == {"Chat": 358, "Chat Hard": 456, "Safety": 740, "Reasoning": 2 * 984, "Prior Sets": 4}
    assert sum(counts[name] for name in counts if name != "Prior Sets") - 984 + 447 == 2985  # its pairs


def test_sections_that_are_not_there_are_left_out():
    assert REWARD_BENCH.score({"shp": 0.4, "donotanswer": 0.7}) == {
        "Safety": 0.7,
        "Prior Sets": 0.4,
        "score": pytest.approx((0.7 + 0.5 * 0.4) / 1.5),
    }


def test_the_best_of_four_and_ties():
    assert credit([1.0], [0.5, 0.2, 0.9]) == 1
    assert credit([1.0], [1.0, 0.2, 0.9]) == 1 / 2
    assert credit([1.0], [1.0, 1.0, 1.0]) == 1 / 4
    assert credit([1.0], [1.0, 1.0, 1.1]) == 0
    assert credit([1.0, 3.0], [0.9]) == 1
    assert credit([1.0, 3.0], [1.0]) == 0


def test_ties_by_hand():
    assert ties_score([("tied:1", [3.0, 4.0], [1.0])]) == pytest.approx(0.3)  # no row of one right completion
    rows = [("tied:1", [3.0, 4.0], [1.0]), ("ref:1", [1.0], [0.5])]  # margins 2 and 0.5, spread 1
    assert ties_score(rows) == pytest.approx(0.3 + 0.3 + 0.2 + 0 + 0.01 * math.tanh(-0.5))
    even = [("tied:1", [3.0, 3.0], [1.0]), ("ref:1", [1.0], [0.5])]  # no spread: as far above as can be
    assert ties_score(even) == pytest.approx(1.01)


def test_a_set_is_known_by_its_name():
    assert find_benchmark("allenai/reward-bench-2") is REWARD_BENCH_2
    assert find_benchmark("copy.jsonl") is None
    assert looks_like({"Math", "Ties"}) is REWARD_BENCH_2
    assert looks_like({"hep-go", "shp"}) is REWARD_BENCH
    assert looks_like({"hep-go", "hh-harmless"}) is None
    assert looks_like(set()) is None
    assert REWARD_BENCH.section_of("donotanswer") == "Safety"
    assert REWARD_BENCH.section_of("anthropic_harmless") == "anthropic_harmless"
