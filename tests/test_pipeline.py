"""Rows into shards: what a run that was stopped ends with, who does what, and what a folder refuses. No model runs."""

import json
import os
import resource
from dataclasses import replace

import pyarrow as pa
import pytest
from datasets import load_dataset
from huggingface_hub import HfApi
from huggingface_hub.utils import filter_repo_objects

from trl_cdr import ConfigError, InputError
from trl_cdr.annotation.pipeline import Job, RunArguments, run
from trl_cdr.annotation.reader import BadRow, needs, open_source
from trl_cdr.annotation.shards import Labelled

OPTIONS = {f"{role}_{what}": role for role in ("strong", "weak") for what in ("weights", "dtype")}
OPTIONS |= {"cdr_strong": "s", "cdr_weak": "w", "criteria_sha256": None, "slope": 2}


def double(rows):
    """Twice each number; none for 13, and a row of the input that turns out bad for 99."""
    labelled = Labelled(counts={"": {"rows": len(rows)}})
    for row in rows:
        if row.fields["x"] == 99:
            labelled.bad.append(BadRow(row.index, row.where, "is 99."))
        elif row.fields["x"] != 13:
            labelled.rows.append({"row": row.index, "y": 2 * row.fields["x"], "text": "é"})
    return labelled


SCHEMA = pa.schema([("row", pa.int64()), ("y", pa.int64()), ("text", pa.string())])
JOB = Job(
    command="double",
    options=OPTIONS,
    check=needs("x"),
    schema=lambda: SCHEMA,
    load=dict,
    label=double,
    summarise=lambda counts: {"rows": counts[""]["rows"]},
    show=lambda summary, folder: print(f"{summary['rows']} rows in {folder}"),
    about="Twice.",
)


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"x": x}) + "\n" for x in range(23)))
    return path


@pytest.fixture
def start(rows, tmp_path):
    def start(job=JOB, *, out="out", **options):
        arguments = RunArguments(str(rows), str(tmp_path / out), **{"batch_size": 2, "shard_size": 5, **options})
        return run(arguments, open_source(rows), job)

    return start


def shards(folder):
    return {path.name: path.read_bytes() for path in sorted((folder / "data").glob("*"))}


def test_what_is_written(start, tmp_path, capsys):
    assert start() == {"rows": 23, "bad_rows": {"count": 0, "first": []}}
    out = tmp_path / "out"
    assert capsys.readouterr().out == f"23 rows in {out}\n"
    assert list(shards(out)) == [f"train-{shard:06d}.parquet" for shard in range(5)]
    table = load_dataset(str(out), split="train", cache_dir=str(tmp_path / "cache"))
    assert table["row"] == [row for row in range(23) if row != 13]
    assert table["y"] == [2 * row for row in range(23) if row != 13]
    assert json.loads((out / "summary.json").read_text())["rows"] == 23
    options = json.loads((out / "options.json").read_text())
    assert (options["command"], options["slope"], options["shard_size"]) == ("double", 2, 5)
    card = (out / "README.md").read_text()
    assert card.startswith("---\nconfigs:\n")
    assert "# rows.jsonl, labelled\n\nTwice.\n" in card
    assert "| strong | `s`, strong, strong |" in card


@pytest.mark.parametrize("batch", [1, 2, 5, 8])
def test_a_stopped_run_ends_with_the_bytes_of_an_uninterrupted_one(batch, start, tmp_path):
    start(out="whole")
    calls = []

    def stopping(rows):
        calls.append(rows)
        if len(calls) == batch:
            raise KeyboardInterrupt
        return double(rows)

    with pytest.raises(KeyboardInterrupt):
        start(replace(JOB, label=stopping))
    there = shards(tmp_path / "out")
    assert len(there) == (batch - 1) // 3  # three batches make a shard
    assert not (tmp_path / "out" / "README.md").exists()
    again = []
    start(replace(JOB, label=lambda rows: again.extend(rows) or double(rows)))
    assert [row.index for row in again] == list(range(5 * len(there), 23))  # what is done is not done again
    assert shards(tmp_path / "out") == shards(tmp_path / "whole")


def test_what_is_done_loads_nothing(start, capsys):
    start()
    capsys.readouterr()
    assert start(replace(JOB, load=None, label=None, schema=None)) == {
        "rows": 23,
        "bad_rows": {"count": 0, "first": []},
    }
    assert capsys.readouterr().out.startswith("23 rows in ")


def test_machines_share_the_work(start, tmp_path, capsys):
    start(out="whole")
    seen = []
    for share in ("2/3", "0/3", "1/3"):
        seen.append([])
        job = replace(JOB, label=lambda rows: seen[-1].extend(row.index // 5 for row in rows) or double(rows))
        found = start(job, shard=share)
    assert [sorted({*one}) for one in seen] == [[2], [0, 3], [1, 4]]
    assert found["rows"] == 23
    assert "1 of 5 shards are there. Whoever writes the last finishes the data set" in capsys.readouterr().out
    assert shards(tmp_path / "out") == shards(tmp_path / "whole")
    start(shard="7/9")  # a worker for whom nothing is left


def test_shards_without_rows_can_be_loaded(start, rows, tmp_path):
    rows.write_text('{"x": 13}\n{"x": 1}\n{"x": 13}\n')
    start(shard_size=1)
    table = load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    assert table["y"] == [2]


def test_processes_share_the_work(start, tmp_path, monkeypatch):
    start(out="whole")
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "1"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert start() is None
    assert sorted(shards(tmp_path / "out")) == ["train-000001.parquet", "train-000003.parquet"]
    monkeypatch.setenv("RANK", "0")
    assert start()["rows"] == 23
    assert shards(tmp_path / "out") == shards(tmp_path / "whole")


def test_another_input_is_refused(start, rows):
    start()
    rows.write_text(rows.read_text().replace("22", "21"))
    with pytest.raises(ConfigError, match="scores of another input: .* had 23 rows, and .* has 23, of other content"):
        start()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"options": OPTIONS | {"slope": 3}}, "holds scores with slope=2, and now it is 3. Pass another output_dir"),
        ({"command": "treble"}, "holds scores with command='double', and now it is 'treble'"),
        ({"shard_size": 6}, "holds scores with shard_size=5, and now it is 6"),
        ({"options": OPTIONS | {"strong_weights": "new"}}, "holds scores by other weights of strong"),
    ],
)
def test_another_job_is_refused(change, message, start, tmp_path):
    start(shard="0/2")
    before = shards(tmp_path / "out")
    size = {name: change.pop(name) for name in list(change) if name == "shard_size"}
    with pytest.raises(ConfigError, match=message):
        start(replace(JOB, **change), **size)
    assert shards(tmp_path / "out") == before


def test_what_is_known_once_loaded_is_compared_too(start):
    start(replace(JOB, load=lambda: {"type": "float32"}), shard="0/2")
    with pytest.raises(ConfigError, match="holds scores with type='float32', and now it is 'bfloat16'"):
        start(replace(JOB, load=lambda: {"type": "bfloat16"}))


def test_a_folder_that_is_not_ours(start, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("a")
    with pytest.raises(ConfigError, match="which holds 'thesis.tex' and no options.json: no run of ours wrote it"):
        start()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


def test_a_shard_that_was_changed_is_named(start, tmp_path):
    start()
    path = tmp_path / "out" / "data" / "train-000002.parquet"
    whole = path.read_bytes()
    (tmp_path / "out" / "data" / "train-000001.parquet").write_bytes(whole)  # another one's
    with pytest.raises(ConfigError, match="train-000001.parquet' is no shard of this run .it was made otherwise."):
        start()
    (tmp_path / "out" / "data" / "train-000001.parquet").unlink()
    path.write_bytes(whole[:-5])
    with pytest.raises(ConfigError, match="train-000002.parquet' is no shard of this run .* Remove it, and the same"):
        start()
    path.unlink()
    start()
    assert path.read_bytes() == whole


def test_bad_rows(start, rows):
    lines = rows.read_text().splitlines()
    lines[4], lines[6], lines[11] = "{", '{"x": 99}', '{"y": 1}'
    rows.write_text("\n".join(lines))
    labelled = []
    with pytest.raises(InputError, match="rows.jsonl:5 is no JSON"):
        start(replace(JOB, label=labelled.append))
    assert not labelled  # found before anything is done
    summary = start(on_bad_row="skip")
    assert summary["bad_rows"]["count"] == 3
    assert [row["index"] for row in summary["bad_rows"]["first"]] == [4, 6, 11]
    assert summary["bad_rows"]["first"][1] == {"index": 6, "where": f"{rows}:7", "reason": "is 99."}
    rows.write_text('{"x": 1}\n{"x": 99}\n')
    with pytest.raises(InputError, match="rows.jsonl:2 is 99"):
        start(out="other")
    rows.write_text("\n\n")
    with pytest.raises(InputError, match="which has no rows"):
        start(out="third")


def test_a_disk_that_is_full(start, tmp_path):
    """The kernel refuses what goes beyond so many bytes of a file, as it does when there is no room."""
    start(out="whole")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)

    def filling(rows):
        if rows[0].index >= 10:
            resource.setrlimit(resource.RLIMIT_FSIZE, (900, limit[1]))
        return double(rows)

    try:
        with pytest.raises(ConfigError, match="can't be written: .*What is finished stays there: make room and run"):
            start(replace(JOB, label=filling))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert sorted(os.listdir(tmp_path / "out" / "data")) == ["train-000000.parquet", "train-000001.parquet"]
    start()
    assert shards(tmp_path / "out") == shards(tmp_path / "whole")


def test_a_hub_that_can_not_be_reached(start, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConfigError, match="push_to_hub is 'a/b', and the Hub can't be reached or refuses: .*whole in"):
        start(push_to_hub="a/b")
    assert len(shards(tmp_path / "out")) == 5
    assert (tmp_path / "out" / "README.md").exists()
    assert start()["rows"] == 23


def test_what_is_pushed_replaces_what_was_pushed(start, tmp_path, monkeypatch):
    """By what the Hub's client is asked for: files that match `delete_patterns` go, unless they come again."""
    asked = {}
    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **options: asked.update(options))
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **options: asked.update(options))
    start(push_to_hub="a/b")
    assert (asked["repo_id"], asked["folder_path"], asked["private"]) == ("a/b", tmp_path / "out", True)
    earlier = ["README.md", "LICENSE", "options.json", *(f"data/train-{shard:06d}.parquet" for shard in range(9))]
    gone = [*filter_repo_objects(earlier, allow_patterns=asked["delete_patterns"])]
    assert gone == earlier[3:]
    files = [str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*")]
    sent = {*filter_repo_objects(files, allow_patterns=asked["allow_patterns"])}
    assert sent == {"README.md", "options.json", "summary.json", *gone[:5]}


def test_a_value_that_the_column_can_not_hold(start, tmp_path):
    beyond = replace(JOB, label=lambda rows: Labelled(rows=[{"y": 2**70}], counts={"": {"rows": 1}}))
    with pytest.raises(InputError, match="rows 0 to 4 hold a value that the columns of all rows can't"):
        start(beyond)
    assert not [*tmp_path.glob("out/data/*")]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"shard": "1"}, "shard is '1'. Write i/n"),
        ({"shard": "3/3"}, "shard is '3/3'. Write i/n with 0 <= i < n"),
        ({"shard_size": 0}, "shard_size is 0: it counts rows"),
        ({"batch_size": 0}, "batch_size is 0: it counts rows"),
        ({"on_bad_row": "drop"}, "on_bad_row is 'drop'. Use raise or skip"),
    ],
)
def test_arguments(option, message):
    with pytest.raises(ConfigError, match=message):
        RunArguments("a", "b", **option)
