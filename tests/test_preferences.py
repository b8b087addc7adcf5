"""Rows of preference sets, in every form that they come in, and what is wrong with those that are bad."""

import json

import pytest
from tiny import answer, chat

from trl_cdr import CDRConfig, ConfigError, InputError
from trl_cdr.annotation.evaluate_files import PreferenceArguments
from trl_cdr.annotation.preferences import draw, name_sets, read_preferences
from trl_cdr.annotation.reader import open_source

GOOD = {"prompt": "why?", "chosen": "so", "rejected": "no"}


@pytest.fixture
def read(tmp_path):
    def read(*rows, name="mine.jsonl", **options):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return read_preferences(open_source(path, split="train", subset=None), **options)

    return read


def test_the_forms_of_a_row(read):
    whole = chat("why?") + answer("so")
    found, bad = read(
        GOOD,
        {"prompt": chat("why?"), "chosen": answer("so"), "rejected": answer("no"), "id": 7, "on_policy": True},
        {"chosen": whole, "rejected": chat("why?") + answer("no"), "domain": "chat"},
        {"prompt": "why?", "chosen": whole, "rejected": chat("why?") + answer("no"), "subset": "s", "domain": "d"},
        {"prompt": "why?", "chosen": ["so", "thus"], "rejected": ["no"]},
        {"prompt": "why?", "completions": ["one", "two"], "chosen": None},
    )
    assert not bad
    assert [one.prompt for one in found] == ["why?", chat("why?"), chat("why?"), chat("why?"), "why?", "why?"]
    assert [one.completions for one in found] == [*[("so", "no")] * 4, ("so", "thus", "no"), ("one", "two")]
    assert [one.chosen for one in found][-2:] == [("so", "thus"), ("one",)]
    assert [one.is_labelled for one in found] == [True] * 5 + [False]
    assert [(one.subset, one.domain) for one in found][:4] == [("mine", "mine")] * 2 + [("mine", "chat"), ("s", "d")]
    assert [one.id for one in found][:2] == [f"{found[0].id.rpartition(':')[0]}:0", "7"]
    assert [one.on_policy for one in found] == [False, True, False, False, False, False]


def test_published_sets_are_conversations_in_sections(read):
    rows = (
        {**GOOD, "subset": "donotanswer", "id": 3},
        {**GOOD, "subset": "hh"},
        {**GOOD, "subset": "Focus", "domain": "x"},
    )
    found, _ = read(*rows, name="copy.jsonl", benchmark="allenai/reward-bench")
    assert [one.domain for one in found] == ["Safety", "hh", "x"]  # a row's own domain has priority
    assert {one.benchmark for one in found} == {"allenai/reward-bench"}
    assert all(one.prompt == chat("why?") for one in found)


def test_own_set_with_subsets_of_a_benchmark_is_not_the_benchmark(read, caplog):
    """Math and Safety are names that anybody may use."""
    rows = {**GOOD, "subset": "Math", "domain": "algebra"}, {**GOOD, "subset": "Safety"}
    found, _ = read(*rows, name="mine.jsonl")
    assert [(one.domain, one.benchmark) for one in found] == [("algebra", None), ("Safety", None)]
    assert "mine.jsonl has subsets of allenai/reward-bench-2" in caplog.text
    assert "pass benchmark=allenai/reward-bench-2" in caplog.text
    caplog.clear()
    read({**GOOD, "subset": "mine"}, name="mine.jsonl")
    assert not caplog.text


def test_the_column_for_criteria(read):
    row = {**GOOD, "domain": "chat", "kind": "short"}
    assert [read(row, **given)[0][0].criteria_domain for given in ({}, {"column": "kind"})] == ["chat", "short"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"prompt": None}, "has no prompt. Add it."),
        ({"prompt": ""}, "has no prompt. Add it."),
        ({"prompt": 3}, "has the prompt 3. Give it a string or a list of messages."),
        ({"rejected": None}, "has 1 completion. Give it chosen and rejected"),
        ({"chosen": None, "rejected": None}, "has no completions."),
        ({"chosen": None, "completions": ["a"]}, "has 1 completion."),
        ({"rejected": "so"}, "has equal completions, of which neither is better."),
        ({"chosen": None, "completions": ["a", "a"]}, "has equal completions"),
        (
            {"chosen": chat("why?") + answer("a"), "rejected": chat("how?") + answer("b")},
            "has conversations that differ",
        ),
        (
            {"chosen": chat("how?") + answer("a"), "rejected": chat("how?") + answer("b")},
            "has a prompt that is not what",
        ),
        ({"chosen": 5}, "can't be scored: the completion is 5"),
    ],
)
def test_bad_rows_are_named_or_counted(read, changes, reason):
    with pytest.raises(InputError) as error:
        read(GOOD, {**GOOD, **changes})
    assert f"mine.jsonl:2 {reason}" in str(error.value)
    found, bad = read(GOOD, {**GOOD, **changes}, on_bad_row="skip")
    assert len(found) == len(bad) == 1
    assert bad[0].reason.startswith(reason)


def test_some_are_drawn_evenly_over_the_subsets(read):
    rows = [{**GOOD, "prompt": f"{subset}{n}", "subset": subset, "id": f"{subset}{n}"}
            for subset, count in (("a", 30), ("b", 10), ("c", 2)) for n in range(count)]  # fmt: skip
    found, _ = read(*rows)
    some = draw(found, 12, seed=0)
    assert [sum(one.subset == name for one in some) for name in "abc"] == [5, 5, 2]
    assert some == [one for one in found if one in some]  # in their order
    assert set(draw(found, 6, seed=0)) < set(some)
    assert draw(found, 12, seed=1) != some
    assert draw(found, 99, seed=0) == found


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["helpful/test.jsonl", "harmless/test.jsonl"], ["helpful/test", "harmless/test"]),
        (["d.v1.jsonl", "d.v2.jsonl.gz"], ["d.v1", "d.v2"]),
        (["x/y/a.csv", "z/y/a.csv", "b.csv"], ["x/y/a", "z/y/a", "b"]),
        (["a.json", "a.jsonl"], ["a.json", "a.jsonl"]),
        (["allenai/reward-bench", "mine.parquet"], ["reward-bench", "mine"]),
        ([], []),
    ],
)
def test_name_sets_tells_sets_apart(names, expected):
    assert name_sets(names) == expected


def test_sets_of_one_stem_are_not_pooled(tmp_path):
    for folder, answer_text in (("helpful", "so"), ("harmless", "thus")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "test.jsonl").write_text(json.dumps({**GOOD, "chosen": answer_text}) + "\n")
    files = [str(tmp_path / folder / "test.jsonl") for folder in ("helpful", "harmless")]
    found, _ = PreferenceArguments(files).read(CDRConfig("a", "b"))
    assert [one.subset for one in found] == ["helpful/test", "harmless/test"]


@pytest.mark.parametrize("copied", [True, False])
def test_same_rows_twice_raise(copied, tmp_path):
    """They would count double."""
    (tmp_path / "a.jsonl").write_text(json.dumps(GOOD) + "\n")
    (tmp_path / "b.jsonl").write_text(json.dumps(GOOD) + "\n")
    files = [str(tmp_path / "a.jsonl"), str(tmp_path / ("b.jsonl" if copied else "a.jsonl"))]
    with pytest.raises(ConfigError, match="with the same rows, which would count twice. Pass one of them"):
        PreferenceArguments(files).read(CDRConfig("a", "b"))
