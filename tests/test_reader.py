"""Rows from wherever they lie: the same from every form, each with its place, and what is wrong with a bad one."""

import gzip
import json
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict
from trl import ScriptArguments

from trl_cdr import ConfigError, InputError
from trl_cdr.annotation import reader
from trl_cdr.annotation.reader import BadRow, every, needs, open_source, read_rows
from trl_cdr.training.prompts import load_prompts

ROWS = [{"prompt": f"p{index}", "completions": ["a\u2028b", "é"], "id": index} for index in range(7)]


def lines(rows=ROWS):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def form(tmp_path):
    """A source of `ROWS` in each form."""

    def make(name):
        if name in ("data set", "splits"):
            return Dataset.from_list(ROWS) if name == "data set" else DatasetDict(train=Dataset.from_list(ROWS))
        path = tmp_path / name
        if name == "saved":
            Dataset.from_list(ROWS).save_to_disk(path)
        elif name == "folder":
            path.mkdir()
            (path / "part-a.jsonl").write_text(lines(ROWS[:3]))
            pq.write_table(pa.Table.from_pylist(ROWS[3:]), path / "part-b.parquet")
        elif name.endswith(".parquet"):
            pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=3)
        elif name.endswith(".gz"):
            path.write_bytes(gzip.compress(lines().encode()))
        else:
            path.write_text("\n" + lines(ROWS[:2]) + "\r\n" + lines(ROWS[2:]).rstrip("\n"))
        return path

    return make


FORMS = [
    "rows.jsonl",
    "rows.txt",
    "rows.jsonl.gz",
    "rows.parquet",
    "folder",
    "rows.json",
    "saved",
    "data set",
    "splits",
]


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same_rows(name, form, monkeypatch):
    monkeypatch.setattr(reader, "_BATCH", 2)
    source = open_source(form(name))
    assert source.num_rows == len(ROWS)
    rows = list(read_rows(source))
    assert [row.fields for row in rows] == ROWS
    assert [row.index for row in rows] == list(range(len(ROWS)))
    for spans in ([range(2, 4), range(5, 6)], [range(6, 7)], [range(7)], [range(1, 2), range(2, 3)], []):
        wanted = [index for span in spans for index in span]
        found = list(source.read(spans))
        assert [(row.index, row.fields["id"]) for row in found] == [(index, index) for index in wanted]
        assert [row.where for row in found] == [rows[index].where for index in wanted]


@pytest.mark.parametrize("name", FORMS)
def test_a_fingerprint_is_of_the_content(name, form, tmp_path):
    there = form(name)
    before = open_source(there).fingerprint
    assert open_source(there).fingerprint == before
    if name == "rows.jsonl":
        moved = there.rename(tmp_path / "moved.jsonl")
        assert open_source(moved).fingerprint == before
        moved.write_text(lines([*ROWS[:-1], {**ROWS[-1], "id": 8}]))
        assert open_source(moved).fingerprint != before
    if name == "data set":
        assert open_source(Dataset.from_list(ROWS)).fingerprint == before
        assert open_source(Dataset.from_list(ROWS[:-1])).fingerprint != before


@pytest.mark.parametrize("name", ["a[1].csv", "a[1].json", "a[1].jsonl", "a[1].parquet"])
def test_a_file_s_name_is_no_pattern(name, tmp_path):
    for path, prompt in ((tmp_path / name, "right"), (tmp_path / name.replace("[1]", "1"), "wrong")):
        data = Dataset.from_list([{"prompt": prompt}])
        write = {".csv": data.to_csv, ".parquet": data.to_parquet}.get(path.suffix, data.to_json)
        write(path)
    assert [row.fields["prompt"] for row in read_rows(open_source(tmp_path / name))] == ["right"]
    [found] = load_prompts(ScriptArguments(dataset_name=str(tmp_path / name)), splits=["train"])
    assert found["prompt"] == ["right"]


def test_a_row_says_where_it_stands(form):
    assert [row.where for row in read_rows(open_source(form("rows.jsonl")))][1:3] == [
        f"{form('rows.jsonl')}:{number}" for number in (3, 5)
    ]
    assert next(iter(open_source(form("data set")).read([range(4, 5)]))).where == "the data set, row 4"
    folder = form("folder")
    assert list(open_source(folder).read())[4].where == f"{folder / 'part-b.parquet'}, row 1"


BAD = [
    (b"{", "is no JSON"),
    (b"[1]", "is no JSON object. Write one JSON object a line."),
    (b"\xff{}", "is no UTF-8 .*Convert it"),
    (b'{"prompt": "\\ud800"}', "holds half of a surrogate pair"),
    (b'{"text": "a"}', "needs the field prompt. Add it."),
    (b'{"prompt": "a", "finished": "no"}', "has finished: 'no'. Use true or false, or leave it out."),
    (b'{"prompt": "a", "finished": 0}', "has finished: 0. Use true or false, or leave it out."),
]


@pytest.mark.parametrize(("line", "reason"), BAD, ids=[reason for _, reason in BAD])
def test_a_bad_row_is_named_or_skipped(line, reason, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n' + line + b'\n{"prompt": "b"}\n')
    source = open_source(path)
    with pytest.raises(InputError, match=f"rows.jsonl:2 {reason}"):
        list(read_rows(source, check=needs("prompt")))
    bad = []
    rows = list(read_rows(source, check=needs("prompt"), on_bad_row="skip", bad=bad))
    assert [(row.index, row.fields["prompt"]) for row in rows] == [(0, "a"), (2, "b")]
    [one] = bad
    assert isinstance(one, BadRow)
    assert (one.index, one.where) == (1, f"{path}:2")


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.parquet"])
def test_a_file_that_was_cut_off(name, form):
    path = form(name)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match=f"{name} can't be read.*Write or download it anew"):
        list(read_rows(open_source(path)))


def test_a_parquet_file_with_a_hole(tmp_path):
    """The footer is whole, so that only reading finds out."""
    path = tmp_path / "rows.parquet"
    table = pa.table({"prompt": [f"{index:064d}" for index in range(3000)]})
    pq.write_table(table, path, row_group_size=1000, compression="gzip")
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 600] = bytes(600)
    path.write_bytes(content)
    source = open_source(path)
    with pytest.raises(InputError, match="rows.parquet can't be read beyond row 1000: "):
        list(read_rows(source))


def test_the_files_of_a_split(tmp_path):
    for name in ("train-0.jsonl", "train-1.jsonl", "test.jsonl", ".hidden.jsonl", "notes.md"):
        (tmp_path / name).write_text(lines(ROWS[: 2 if "train" in name else 1]))
    assert open_source(tmp_path).num_rows == 4
    assert open_source(tmp_path, split="test").num_rows == 1
    with pytest.raises(ConfigError, match="has no files of the split 'validation', but of test, train"):
        open_source(tmp_path, split="validation")


def test_what_is_not_there(tmp_path, form):
    for name in (str(tmp_path / "none"), "none.jsonl", "./none"):
        with pytest.raises(InputError, match="can't be read: no such file exists. Give a .jsonl"):
            open_source(name)
    with pytest.raises(InputError, match="input is 'nobody/nothing', which can't be read: .*Give a .jsonl"):
        open_source("nobody/nothing")
    with pytest.raises(InputError, match="which can't be read: "):
        open_source(tmp_path)  # a folder without data
    with pytest.raises(ConfigError, match="the data set has no split 'test', but train"):
        open_source(form("splits"), split="test")


@pytest.mark.parametrize("step", [1, 2, 3, 7])
def test_every_so_many_th_row(step, tmp_path):
    """The shares of a source hold each row once; a row keeps its place, and is counted anew."""
    text = lines().splitlines()
    text[4] = "{"
    (tmp_path / "rows.jsonl").write_text("\n".join(text))
    source = open_source(tmp_path / "rows.jsonl")
    whole = list(source.read())
    shares = [every(source, step, start=start) for start in range(step)]
    for start, share in enumerate(shares):
        expected = [replace(row, index=index) for index, row in enumerate(whole[start::step])]
        assert list(share.read()) == expected
        assert share.num_rows == len(expected)
        for cut in range(len(expected) + 1):
            assert list(share.read([range(cut, len(expected))])) == expected[cut:]
            assert (
                list(share.read([range(1), range(max(cut, 1), len(expected))]))
                == expected[:1] + expected[max(cut, 1) :]
            )
    assert len({share.fingerprint for share in [source, *shares]}) == step + 1
    assert every(open_source(tmp_path / "rows.jsonl"), step, start=0).fingerprint == shares[0].fingerprint


@pytest.mark.parametrize("name", ["", " ", "\t"])
def test_empty_name_raises(name, tmp_path, monkeypatch):
    """An unset variable of a shell is not the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text(lines())
    with pytest.raises(InputError, match="an empty name. Give a .jsonl"):
        open_source(name)
    assert open_source(".").num_rows == len(ROWS)


CSV = "prompt\na\nb\n"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.jsonl": lines(), "b.csv": CSV}, r"a.jsonl \(JSONL or Parquet\), b.csv \(.csv\)"),
        ({"a.jsonl": lines(), "b.json": json.dumps(ROWS)}, r"b.json \(.json\)"),
        ({"a.jsonl.gz": "", "sub/b.json": json.dumps(ROWS, indent=1)}, r"b.json \(.json\)"),
        ({"a.csv": CSV, "b.json": lines()}, r"a.csv \(.csv\), b.json \(.json\)"),
        ({"train/a.jsonl": lines(), "train/b.csv": CSV}, "Pass one file, or a folder for each format"),
    ],
)
def test_folder_of_several_formats_raises(files, message, tmp_path):
    """Otherwise the rows of one of them would be lost."""
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        open_source(tmp_path)


def test_metadata_beside_rows_is_not_another_format(tmp_path):
    """An output folder has its options next to its rows, and a clone from the Hub has a card."""
    files = {"a.jsonl": lines(), "options.json": json.dumps({"a": [1]}, indent=2), "README.md": "# Rows", "b.txt": "x"}
    files |= {"one_line.json": '{"a": 1}\n', ".hidden.csv": CSV, "empty.json": ""}
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert open_source(tmp_path).num_rows == len(ROWS)
