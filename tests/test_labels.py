"""Which labels to ask for, and what they choose, by hand."""

import json

import numpy as np
import pytest

from trl_cdr import InputError
from trl_cdr.annotation.labels import choose, read_labels, suggest
from trl_cdr.annotation.preferences import Preference

AGREED, SPLIT, EVEN, CLOSE, POLICY = range(5)
MARGINS = {
    #                AGREED SPLIT  EVEN CLOSE POLICY
    "one": np.array([9.0, 1.0, 4.0, 1.0, -4.0]),
    "two": np.array([9.0, 1.0, 4.0, 1.0, 4.0]),
    "three": np.array([9.0, 1.0, -4.0, -1.0, 4.0]),
    "four": np.array([9.0, -1.0, -4.0, -1.0, 4.0]),
}


def preferences(**changes):
    return [
        Preference(
            str(place), f"p{place}", (f"a{place}",), (f"b{place}",), "s", "d", on_policy=place == POLICY, **changes
        )
        for place in range(5)
    ]


def test_disagreement_then_the_policys_own_then_even_splits_then_small_margins():
    found = suggest(MARGINS, preferences(), most=9)
    assert [int(row["id"]) for row in found] == [POLICY, CLOSE, EVEN, SPLIT, AGREED]
    assert [row["split"] for row in found] == [0.25, 0.5, 0.5, 0.25, 0]
    assert [row["id"] for row in suggest(MARGINS, preferences(), most=2)] == ["4", "3"]


def test_one_pair_a_prompt_and_those_that_nobody_has_judged():
    rows = preferences()
    rows[CLOSE] = Preference("3", rows[EVEN].prompt, ("a",), ("b",), "s", "d")
    assert [int(row["id"]) for row in suggest(MARGINS, rows, most=9)] == [POLICY, CLOSE, SPLIT, AGREED]
    rows[SPLIT] = Preference("1", "p", ("a",), ("b",), "s", "d", is_labelled=False)
    assert [int(row["id"]) for row in suggest(MARGINS, rows, most=9)] == [SPLIT]


def test_what_a_suggestion_holds():
    [row] = suggest(MARGINS, preferences(), most=1)
    assert {*row["completions"]} == {"a4", "b4"}
    first = row["completions"].index("a4")
    assert row["prefer"] == {"one": 1 - first, "two": first, "three": first, "four": first}
    assert (row["prompt"], row["better"], row["on_policy"]) == ("p4", None, True)
    orders = [suggest(MARGINS, preferences(), most=5)[place]["completions"][0][0] for place in range(5)]
    assert {*orders} == {"a", "b"}  # the better one is not always the first
    [tie] = suggest({"one": np.array([0.0])}, preferences()[:1], most=1)
    assert tie["prefer"] == {"one": None}


def label(place, *, better):
    texts = [f"b{place}", f"a{place}"]
    return {"id": str(place), "completions": texts, "better": texts.index(f"{better}{place}")}


def test_labels_choose_the_candidate_that_agrees():
    labels = [label(SPLIT, better="b"), label(EVEN, better="b"), label(CLOSE, better="b")]
    found = choose(MARGINS, preferences(), [*labels, {"id": "9", "completions": ["a", "b"], "better": 0}], seed=0)
    assert list(found["candidates"]) == ["four", "three", "one", "two"]
    assert [share[0] for share in found["candidates"].values()] == [1, 2 / 3, 0, 0]
    assert (found["best"], found["labels"], found["unknown"]) == ("four", 3, 1)
    assert found["lead"] == [pytest.approx(1 / 3), 0.0, 1.0]
    as_pandas_writes = [{**one, "better": float(one["better"])} for one in labels]
    assert choose(MARGINS, preferences(), as_pandas_writes, seed=0)["candidates"] == found["candidates"]
    with pytest.raises(InputError, match="no label names a pair of the data"):
        choose(MARGINS, preferences(), [{"id": "0", "completions": ["a", "b"], "better": 0}], seed=0)


def test_labels_are_read(tmp_path):
    path = tmp_path / "labels.jsonl"
    rows = [label(0, better="a"), {**label(1, better="a"), "better": None}]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert read_labels(str(path)) == rows[:1]
    for bad, reason in (
        ({**rows[0], "better": 2}, "labels.jsonl:1 has better: 2. Use 0, 1 or null."),
        ({"id": 1}, "labels.jsonl:1 needs the fields id and completions"),
        (rows[1], "in which no row says which completion is better"),
    ):
        path.write_text(json.dumps(bad))
        with pytest.raises(InputError) as error:
            read_labels(str(path))
        assert reason in str(error.value)
