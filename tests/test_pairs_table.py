"""The completions table of pairs: what is kept, printed, and sent to trackers."""

import sys
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
from tiny import answer, chat

from trl_cdr.training.pairs_table import print_table, write_table

COLUMNS = {
    "prompt": [chat("hello"), chat("hello"), chat("a fox")],
    "completion": [answer("[one]"), answer("two"), answer("three")],
    "length": [1.5, None, 2.0],
    "pair": ["chosen", "rejected", ""],
}


def write(folder, **options):
    write_table(COLUMNS, folder, step=7, **{"trackers": [], "unique_prompts": False} | options)


def test_what_is_kept(tmp_path):
    write(tmp_path / "completions")
    found = pq.read_table(tmp_path / "completions" / "completions_00007.parquet").to_pylist()
    assert found == [{"step": 7} | {name: values[row] for name, values in COLUMNS.items()} for row in range(3)]


@pytest.mark.parametrize(("unique", "expected"), [(False, ["chosen", "rejected", ""]), (True, ["chosen", ""])])
@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_what_trackers_are_sent(name, unique, expected, tmp_path, monkeypatch):
    """A tracker that is not asked for is not even imported; wandb without a run gets nothing."""
    sent = []
    tracker = SimpleNamespace(Table=lambda dataframe: dataframe, log=sent.append)
    monkeypatch.setitem(sys.modules, name, tracker)
    write(tmp_path, unique_prompts=unique)
    assert sent == []
    write(tmp_path, trackers=["tensorboard", name], unique_prompts=unique)
    [message] = sent
    assert message["completions"]["pair"].tolist() == expected
    if name == "wandb":
        tracker.run = None
        write(tmp_path, trackers=[name])
        assert len(sent) == 1


@pytest.mark.parametrize(("rows", "shown"), [(None, 3), (2, 2), (9, 3), (0, 0)])
def test_what_is_printed(rows, shown, capsys):
    print_table(COLUMNS, step=7, rows=rows)
    printed = capsys.readouterr().out
    assert "Step 7" in printed
    assert [text in printed for text in ("[one]", "two", "three")] == [False] * (3 - shown) + [True] * shown
