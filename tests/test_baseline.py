"""Another judge's rows, as they are published and as we write them, beside ours."""

import json

import pytest

from trl_cdr import InputError
from trl_cdr.annotation.baseline import compare_rows, read_baseline
from trl_cdr.annotation.preferences import Preference


@pytest.fixture
def read(tmp_path):
    def read(content, name="theirs.json"):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return read_baseline(str(path))

    return read


def test_published_columns(read):
    columns = {"model": "a judge", "id": [3, 4, 5], "scores_chosen": [1.0, 0.5, 2], "scores_rejected": [0.5, 0.5, 3]}
    assert read(columns) == {"3": 1.0, "4": 0.5, "5": 0.0}
    assert read({"id": {"0": 3, "1": 4}, "results": {"0": 1, "1": 0}}) == {"3": 1.0, "4": 0.0}
    two = {"id": ["7", "tied:1"], "scores": [[[0.5], [0.1], [0.5], [0.2]], [2, 3, 1]], "num_correct": [1, 2]}
    assert read(two) == {"7": 0.5, "tied:1": 1.0}


def test_rows(read):
    rows = [{"id": "a", "scores_chosen": 1.0, "scores_rejected": [0.5, 2.0]}, {"id": "b", "results": 0.25}]
    assert read(rows) == {"a": 0.0, "b": 0.25}
    assert read("\n".join(map(json.dumps, rows)), name="theirs.jsonl") == {"a": 0.0, "b": 0.25}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([{"id": 1}], "row 0 needs the fields id, and scores_chosen"),
        ([{"results": 1}], "row 0 needs the fields id"),
        ([{"id": 1, "scores_chosen": "much", "scores_rejected": 0}], "row 0 needs the fields id"),
        ([4], "row 0 needs the fields id"),
        ({"model": "a"}, "which has no rows"),
        ("{", "can't be read"),
    ],
)
def test_what_is_none(read, content, reason):
    with pytest.raises(InputError) as error:
        read(content)
    assert reason in str(error.value)


def test_rows_are_compared():
    data = [Preference(str(n), f"p{n}", ("a",), ("b",), "one" if n < 2 else "two", "d") for n in range(4)]
    rows = [{"id": one.id, "subset": one.subset, "domain": "d", "results": float(n != 3)} for n, one in enumerate(data)]
    summary, differing = compare_rows(rows, data, {"0": 1.0, "1": 0.0, "2": 0.5, "9": 1.0}, seed=0)
    assert (summary["rows"], summary["missing"], summary["won"], summary["lost"]) == (3, 1, 2, 0)
    assert (summary["ours"][0], summary["theirs"][0], summary["lead"][0]) == (1.0, 0.5, 0.5)
    assert differing == [
        {"id": "1", "subset": "one", "ours": 1.0, "theirs": 0.0},
        {"id": "2", "subset": "two", "ours": 1.0, "theirs": 0.5},
    ]
    with pytest.raises(InputError, match="'0' here, 'x' there"):
        compare_rows(rows, data, {"x": 1.0}, seed=0)
