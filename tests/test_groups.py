"""A prompt with scored completions -> rows of a preference data set, and what is counted."""

import re

import pytest
from tiny import answer, chat

from trl_cdr import Score
from trl_cdr.annotation.annotate_report import show, summarise
from trl_cdr.annotation.groups import SCHEMA, check_group, label_group, read_group
from trl_cdr.annotation.shards import Labelled, add_counts
from trl_cdr.scoring.types import Completion


def label(values, *, finished=None, texts=None, rewards=None, strategy="best_worst", labelled=None, **options):
    labelled = labelled or Labelled()
    completions = [
        Completion(text, said)
        for text, said in zip(texts or map(str, range(len(values))), finished or [True] * len(values), strict=True)
    ]
    scores = [
        Score(value, n_tokens=3 + place, domain=options.pop("domain", None), gated=value == 9.0)
        for place, value in enumerate(values)
    ]
    label_group(
        labelled,
        index=options.pop("index", 5),
        prompt=chat("hello"),
        completions=completions,
        scores=scores,
        rewards=values if rewards is None else rewards,
        strategy=strategy,
        **{"min_margin": 0.0, "seed": 0, **options},
    )
    return labelled


def test_the_row_that_is_written():
    labelled = label([1.0, 9.0, None, -2.0], rewards=[1.0, -1.0, None, -2.0])
    [row] = labelled.rows
    assert set(row) == set(SCHEMA.names)
    assert (row["prompt"], row["chosen"], row["rejected"]) == (chat("hello"), answer("0"), answer("3"))
    assert (row["score_chosen"], row["score_rejected"], row["margin"]) == (1.0, -2.0, 3.0)
    assert (row["chosen_index"], row["rejected_index"], row["row"]) == (0, 3, 5)
    assert row["scores"] == [1.0, 9.0, None, -2.0]
    assert row["rewards"] == [1.0, -1.0, None, -2.0]
    assert row["gated"] == [False, True, False, False]
    assert row["n_tokens"] == [3, 4, 5, 6]


def pairs(labelled):
    return [(row["chosen_index"], row["rejected_index"]) for row in labelled.rows]


def test_every_strategy():
    values = [0.0, 3.0, 1.0]
    assert pairs(label(values)) == [(1, 0)]
    assert pairs(label(values, strategy="all_pairs")) == [(1, 0), (2, 0), (1, 2)]
    assert pairs(label(values, strategy="all_pairs", min_margin=2.0)) == [(1, 0), (1, 2)]
    drawn = {tuple(pairs(label(values, strategy="best_random", index=index))) for index in range(20)}
    assert drawn == {((1, 0),), ((1, 2),)}
    again = {tuple(pairs(label(values, strategy="best_random", index=3))) for _ in range(5)}
    assert len(again) == 1  # a row's draw is its own


@pytest.mark.parametrize("strategy", ["best_worst", "best_random", "all_pairs"])
def test_what_makes_no_pair(strategy):
    found = Labelled()
    for options in (
        {"values": [1.0, 1.0]},
        {"values": [1.0, 1.0, 1.0], "texts": ["a", "a", "a"]},
        {"values": [1.0, None]},
        {"values": [1.0, 0.0], "finished": [True, False]},
        {"values": [1.0, 0.5], "min_margin": 1.0},
    ):
        label(**options, strategy=strategy, labelled=found)
    assert not found.rows
    skipped = summarise(found.counts)["skipped"]
    assert skipped == {"tie": 2, "min_margin": 1, "missing": 1, "truncated": 1}


def test_equal_completions_count_once():
    assert pairs(label([0.0, 2.0, 2.0, 1.0], texts=["a", "b", "b", "c"], strategy="all_pairs")) == [
        (1, 0),
        (3, 0),
        (1, 3),
    ]


@pytest.mark.parametrize("finished", [[True, None, True], [None, True, None]])
def test_equal_completions_count_once_where_the_end_of_one_is_not_known(finished):
    texts = ["x", "x", "y"]
    assert pairs(label([1.0, -2.0, 0.0], texts=texts, finished=finished, strategy="all_pairs")) == [(0, 2)]


def test_a_cut_off_completion_is_in_no_pair():
    assert pairs(label([5.0, 1.0, 0.0, -3.0], finished=[False, True, None, False])) == [(1, 2)]


def test_the_summary_adds_up(tmp_path, capsys):
    found = Labelled()
    label([0.0, 3.0], labelled=found, domain="b")
    label([2.0, 1.0], labelled=found, domain="a")
    label([2.0, 9.0, None], rewards=[2.0, -1.0, None], labelled=found, domain="a")
    label([1.0, 1.0], labelled=found)
    counts = {}
    for part in (found.counts, {}):
        add_counts(counts, part)
    summary = summarise(counts)
    assert (summary["rows"], summary["pairs"], summary["completions"], summary["unscorable"]) == (4, 3, 9, 1)
    assert summary["margin"] == pytest.approx((3 + 1 + 3) / 3)
    assert (summary["chosen_tokens"], summary["rejected_tokens"]) == (pytest.approx(10 / 3), pytest.approx(11 / 3))
    assert summary["longer_chosen"] == pytest.approx(1 / 3)
    assert summary["gated"] == pytest.approx(1 / 9)
    assert summary["reward"] == pytest.approx((0 + 3 + 2 + 1 + 2 - 1 + 1 + 1) / 8)
    assert list(summary["domains"]) == ["a", "b"]
    assert summary["domains"]["a"]["pairs"] == 2
    assert summary["domains"]["a"]["margin"] == 2.0
    rows = [{"index": 1, "where": "f:2", "reason": "is no JSON."}]
    show(summary | {"bad_rows": {"count": 7, "first": rows}}, tmp_path)
    printed = capsys.readouterr().out
    assert "left out: f:2 is no JSON." in printed
    assert "7 rows in all" in printed
    assert str(tmp_path) in printed
    assert summarise({})["margin"] is None


@pytest.mark.parametrize("completions", [["a", "b"], [answer("a"), answer("b")]])
@pytest.mark.parametrize("prompt", ["hello", chat("hello"), [{**chat("hello")[0], "tool_calls": None}]])
def test_what_a_row_may_hold(prompt, completions):
    messages, found = read_group({"prompt": prompt, "completions": completions, "finished": [True, None]})
    assert messages == chat("hello")
    assert found == [Completion("a", True), Completion("b", None)]
    assert read_group({"prompt": prompt}) == (messages, None)
    assert check_group({"prompt": prompt, "completions": completions}, can_write=False) is None


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"completions": ["a", "b"]}, "has no prompt"),
        ({"prompt": []}, "has no prompt"),
        ({"prompt": 7}, "has the prompt 7"),
        ({"prompt": [{"content": "a"}]}, "a message has the role None"),
        ({"prompt": [{"role": "user", "content": "a", "name": "b"}]}, "a message has name"),
        ({"prompt": "a"}, "has no completions, and nothing writes them"),
        ({"prompt": "a", "completions": "ab"}, "which is no list"),
        ({"prompt": "a", "completions": []}, "has 0 of the two completions"),
        ({"prompt": "a", "completions": ["b"]}, "has 1 of the two completions"),
        ({"prompt": "a", "completions": ["b", "b"]}, "has 2 completions that are all equal"),
        ({"prompt": "a", "completions": ["b", None]}, "the completion is None"),
        ({"prompt": "a", "completions": ["b", "c"], "finished": [True]}, "has finished: \\[True\\]"),
        ({"prompt": "a", "completions": ["b", "c"], "finished": [1, 0]}, "has finished: \\[1, 0\\]"),
        ({"prompt": "a", "completions": ["b", "c"], "finished": [[True], [False]]}, "has finished: \\[\\[True\\]"),
    ],
)
def test_what_it_may_not(row, reason):
    assert re.search(reason, check_group(row, can_write=False))
    if "completions" not in row and row.get("prompt") == "a":
        assert check_group(row, can_write=True) is None
