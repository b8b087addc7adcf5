"""The command line as its users meet it: what it prints, what it writes, and how it refuses."""

import json
import shutil
from functools import partial

import pyarrow.parquet as pq
import pytest
import torch
from tiny import chat

from trl_cdr import CDRConfig, DensityRatioScorer, __version__
from trl_cdr.bench import workloads
from trl_cdr.bench.annotate import print_annotate, run_annotate
from trl_cdr.bench.measure import Cost, measure
from trl_cdr.bench.memory import print_memory_costs
from trl_cdr.bench.naive import naive_logps
from trl_cdr.cli import main
from trl_cdr.doctor import examine, print_examination
from trl_cdr.scoring.causal_lm import CausalLM
from trl_cdr.scoring.packing import Layout

ROWS = [
    {"prompt": chat("over"), "completion": " world", "id": 7},
    {"prompt": chat("hello"), "completion": "what is this", "finished": False, "domain": "chat"},
    {"prompt": chat("hello"), "completion": None},
]


@pytest.fixture
def arguments(tmp_path, checkpoints):
    source = tmp_path / "rows.jsonl"
    source.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n")
    pair = ["--cdr_strong", checkpoints["strong"], "--cdr_weak", checkpoints["weak"]]
    return ["score", "--input", str(source), "--output_dir", str(tmp_path / "out"), *pair]


def read(tmp_path):
    return [row for path in sorted(tmp_path.glob("out/data/*")) for row in pq.read_table(path).to_pylist()]


def fails(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_score(arguments, tmp_path, checkpoints, capsys):
    main(arguments)
    written = read(tmp_path)
    absent = dict.fromkeys(("id", "finished", "domain"))
    assert [{key: row[key] for key in row if key != "score"} for row in written] == [absent | row for row in ROWS]
    expected = DensityRatioScorer(checkpoints["strong"], checkpoints["weak"]).score(
        [chat("over"), chat("hello")], [" world", "what is this"], finished=[True, False]
    )
    assert [row["score"]["value"] for row in written[:2]] == pytest.approx([e.value for e in expected], abs=1e-4)
    assert written[2]["score"]["value"] is None
    assert "the completion is None" in written[2]["score"]["error"]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["rows"], summary["scored"], sum(summary["unscorable"].values())) == (3, 2, 1)
    printed = capsys.readouterr().out
    assert "2 of 3" in printed
    assert str(tmp_path / "out" / "data") in printed  # whole, however long


def test_lines_that_only_python_would_split(arguments, tmp_path, capsys):
    rows = [{"prompt": "a\u2028b\x85", "completion": "é"}, {"prompt": "\ud800", "completion": "b"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    assert "rows.jsonl:2 holds half of a surrogate pair" in fails(capsys, arguments)
    main([*arguments, "--on_bad_row", "skip"])
    assert [(row["prompt"], row["completion"]) for row in read(tmp_path)] == [("a\u2028b\x85", "é")]
    assert "rows left out      1, see summary.json" in capsys.readouterr().out


def test_strings_and_messages_are_no_one_column(arguments, tmp_path, capsys):
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": chat("a"), "completion": "b"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    assert "rows.jsonl:1 to " in fails(capsys, arguments)
    err = fails(capsys, arguments)
    assert "prompt is of several kinds" in err
    assert "a column has one. Give it one, or leave it out." in err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([{"x": 2**70}, {}], "x is of several kinds"),
        ([{"x": 2**63 + 5}, {"x": -1}], "x is of several kinds"),
        ([{"x": {}}, {"x": None}], "x holds an empty object and never another"),
        ([{"x": [{"y": {}}]}, {}], "x holds an empty object and never another"),
    ],
)
def test_values_that_no_column_holds(more, message, arguments, tmp_path, capsys):
    rows = [{"prompt": "a", "completion": "b", **each} for each in more]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    assert message in fails(capsys, arguments)


def test_null_says_as_little_as_nothing(arguments, tmp_path):
    more = [{}, {"finished": None}, {"finished": True}, {"finished": False}]
    rows = [{"prompt": "a", "completion": "b", **each} for each in more]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    main([*arguments, "--cdr_gate", "none"])
    found = read(tmp_path)
    assert [row["score"]["finished"] for row in found] == [True, True, True, False]
    assert [row["finished"] for row in found] == [None, None, True, False]


def test_fields_take_the_type_that_holds_all(arguments, tmp_path):
    more = [{"x": 1, "y": None}, {"x": 2.5, "z": {"a": 1}}, {"y": "late", "z": {"b": [2]}}]
    rows = [{"prompt": "a", "completion": "b", **each} for each in more]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    main([*arguments, "--shard_size", "1"])
    found = read(tmp_path)
    assert [row["x"] for row in found] == [1.0, 2.5, None]
    assert [row["y"] for row in found] == [None, None, "late"]
    assert [row["z"] for row in found] == [None, {"a": 1, "b": None}, {"a": None, "b": [2]}]


def test_a_first_try_that_failed_leaves_the_folder_free(arguments, tmp_path, capsys):
    assert "can't be loaded" in fails(capsys, [*arguments, "--cdr_weak", str(tmp_path / "typo")])
    main(arguments)
    assert len(read(tmp_path)) == 3


def test_input_that_is_no_utf8(arguments, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_bytes(b"\xff\xfe")
    assert "rows.jsonl:1 is no UTF-8" in fails(capsys, arguments)


def test_scores_of_different_runs_do_not_mix(arguments, tmp_path, capsys):
    main(arguments)
    err = fails(capsys, [*arguments, "--cdr_reduction", "mean"])
    assert "holds scores with cdr_reduction='sum', and now it is 'mean'. Pass another output_dir" in err
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}))
    assert "holds the scores of another input" in fails(capsys, arguments)


def test_score_under_criteria(arguments, tmp_path, checkpoints, capsys):
    criteria = tmp_path / "criteria.toml"
    criteria.write_text('[quick]\ninstruction = "be quick"\n[plain]\n')
    rows = [{"prompt": chat("hello"), "completion": "world", "kind": kind} for kind in ("quick", "plain")]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments += ["--cdr_criteria", str(criteria), "--cdr_router", "column:kind"]
    main(arguments)
    quick, plain = (row["score"] for row in read(tmp_path))
    assert (quick["domain"], plain["domain"]) == ("quick", "plain")
    assert quick["value"] != plain["value"]
    criteria.write_text('[quick]\ninstruction = "be slow"\n[plain]\n')
    assert "holds scores with criteria_sha256=" in fails(capsys, arguments)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "rows.jsonl:2 is no JSON"),
        ("[1]", "rows.jsonl:2 is no JSON object"),
        ('{"prompt": "a"}', "rows.jsonl:2 needs the fields prompt and completion"),
        ('{"prompt": "a", "completion": "b", "finished": "no"}', "rows.jsonl:2 has finished: 'no'"),
        ('{"prompt": "a", "completion": "b", "score": 1}', "rows.jsonl:2 has a field score already"),
    ],
)
def test_a_bad_line_is_named_and_nothing_is_scored(arguments, tmp_path, capsys, line, message):
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(ROWS[0])}\n{line}\n")
    assert message in fails(capsys, arguments)
    assert not (tmp_path / "out").exists()


def test_what_can_not_be_parsed(arguments, tmp_path, capsys):
    assert "unknown arguments: cdr_foo. trl-cdr score --help" in fails(capsys, [*arguments, "--cdr_foo", "3"])
    for name in ("output_dir", "cdr_strong"):  # --no_NAME is of what is true by default
        assert f"unknown arguments: no_{name} (did you mean {name}?)" in fails(capsys, [*arguments, f"--no_{name}"])
    assert "unknown arguments: 3, which follow no name" in fails(capsys, [*arguments, "3"])
    assert "invalid choice: 'max'" in fails(capsys, [*arguments, "--cdr_reduction", "max"])
    assert "batch_size is 0" in fails(capsys, [*arguments, "--batch_size", "0"])
    assert "no such file exists" in fails(capsys, [*arguments, "--input", str(tmp_path / "none")])
    assert "--config" in fails(capsys, [*arguments, "--config", str(tmp_path / "none.yaml")])
    assert "can't be loaded" in fails(capsys, [*arguments, "--cdr_weak", str(tmp_path / "none")])
    assert "invalid choice: 'scores'" in fails(capsys, ["scores"])


def test_config_file(arguments, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(f"cdr_strong: {arguments[6]}\ncdr_weak: {arguments[8]}\ncdr_reduction: mean\n")
    main([*arguments[:5], "--config", str(config)])
    assert json.loads((tmp_path / "out" / "options.json").read_text())["cdr_reduction"] == "mean"


def test_help_and_version(capsys):
    commands = ("demo", "score", "show", "bench", "doctor")
    for arguments in (["--help"], *([command, "--help"] for command in commands)):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 0
    assert "--cdr_strong" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--version"])
    assert __version__ in capsys.readouterr().out


def test_bench_prints_ours_beside_the_other_ways(checkpoints, capsys, monkeypatch):
    pair = ["--cdr_strong", checkpoints["strong"], "--cdr_weak", checkpoints["weak"], "--runs", "1"]
    shapes = [workloads.Shape(40, 2, prompts=2, prompt=5, shortest=3, longest=9), workloads.Shape(0, 1, prompts=1)]
    monkeypatch.setitem(workloads.WORKLOADS, "single", ("two small calls", shapes))
    main(["bench", "--workload", "single", "--json", *pair])
    result = json.loads(capsys.readouterr().out)
    shared, alone = result["cases"]
    assert shared["tokens"]["unique"] < shared["tokens"]["padded"]
    assert alone["tokens"]["unique"] == 64 + 64 - 1
    for case in result["cases"]:
        assert case["max_difference"] < 1e-4
        assert set(case["seconds"]) == {"ours", "cold", "gated", "padded", "naive", "plain"}
    ways = [f"{role} ({checkpoints[role]}, LlamaForCausalLM) runs packed" for role in ("strong", "weak")]
    assert result["ways"] == ways
    main(["bench", "--workload", "single", *pair])
    printed = capsys.readouterr().out
    assert "2 x 2, prefix 40" in printed
    assert f"{'; '.join(ways)}." in printed
    assert "Tflop/s" in printed


def test_bench_of_memory(capsys, monkeypatch):
    sizes = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    monkeypatch.setitem(workloads.MODELS, "llama-58m", {**sizes, "num_attention_heads": 4, "num_key_value_heads": 2})
    main(["bench", "--workload", "memory", "--runs", "1", "--json"])
    result = json.loads(capsys.readouterr().out)
    stays, on_host, on_disk, one_base, policys = result["cases"]
    assert [case["label"] for case in result["cases"]] == [
        *("two copies", "asleep on the host", "asleep on disk"),
        *("one base, an adapter", "on the policy's base"),
    ]
    assert stays["between_mb"] == pytest.approx(result["pair_mb"])
    assert on_host["between_mb"] < 0.01 * result["pair_mb"]
    assert on_disk["between_mb"] < 0.01 * result["pair_mb"]
    assert (stays["host_mb"], on_host["host_mb"], on_disk["host_mb"]) == (0, stays["between_mb"], 0)
    assert stays["wake_seconds"] == stays["sleep_seconds"] == 0
    for case in (on_host, on_disk):
        assert min(case[name] for name in ("wake_seconds", "sleep_seconds", "seconds")) > 0
    assert on_host["peak_mb"] < stays["peak_mb"] - 0.4 * result["pair_mb"]
    assert one_base["between_mb"] < 0.8 * result["pair_mb"]  # at this size an adapter is large
    for size in ("between_mb", "peak_mb"):
        assert policys[size] == pytest.approx(one_base[size] - 0.5 * result["pair_mb"], abs=0.05 * result["pair_mb"])
    print_memory_costs(result)
    printed = capsys.readouterr().out
    assert "asleep on disk" in printed
    assert "on the policy's base" in printed


@pytest.mark.slow
def test_bench_of_annotate(capsys):
    found = run_annotate(kills=0, few=64, many=128)
    print_annotate(found)
    assert [(case["rows"], case["processes"]) for case in found["cases"]] == [(64, 1), (128, 1), (128, 2)]
    assert "the same bytes as a run that was not" in capsys.readouterr().out


def test_bench_arguments(capsys):
    assert "--cdr_strong and --cdr_weak go together" in fails(capsys, ["bench", "--cdr_strong", "a"])
    assert "--runs is 0" in fails(capsys, ["bench", "--runs", "0"])
    assert "invalid choice: 'all'" in fails(capsys, ["bench", "--workload", "all"])
    assert "--model is 'gpt': use one of llama-58m, llama-8b" in fails(capsys, ["bench", "--model", "gpt"])


@pytest.mark.parametrize(
    ("workload", "name", "reads"),
    [
        ("table", "data", "--model, --cdr_dtype, --attention, --runs, --json, --cdr_strong, --cdr_weak"),
        ("memory", "cdr_strong", "--model, --cdr_dtype, --attention, --runs, --json"),
        ("pair_step", "cdr_weak", "--model, --cdr_dtype, --attention, --runs, --json, --cdr_strong"),
        ("annotate", "model", "--json"),
        ("real", "cdr_strong", "--model, --data, --output_dir"),
        ("alarms", "runs", "--output_dir"),
    ],
)
def test_bench_refuses_what_a_workload_does_not_read(workload, name, reads, capsys):
    err = fails(capsys, ["bench", "--workload", workload, f"--{name}", "1"])
    assert f"--{name} is not read by --workload {workload}, which reads {reads}\n" in err


def test_demo_arguments(capsys):
    assert "--model and --data go with --real" in fails(capsys, ["demo", "--model", "a"])
    assert "--model and --data go with --real" in fails(capsys, ["demo", "--customize", "--data", "pairs.jsonl"])
    assert "not allowed with argument" in fails(capsys, ["demo", "--customize", "--real"])


@pytest.mark.slow
def test_memory_of_a_large_vocabulary_stays_bounded():
    """16 x 512 tokens of 32,000: the full logits alone are a gigabyte."""
    model = workloads.build_model("llama-58m", seed=0, device="cpu", dtype=torch.float32, attention="sdpa")
    lm = CausalLM(model, "strong")
    lm.way()
    [shape] = workloads.WORKLOADS["head"][1]
    rows = shape.rows(32_000)
    ways = {
        "ours": lambda: lm.per_token_logps(Layout(rows), token_budget=8192),
        "naive": lambda: naive_logps(model, rows, batch_size=16),
    }
    costs = measure(ways, device="cpu", runs=0)
    assert costs["ours"].peak_mb < 400 < 1000 < costs["naive"].peak_mb


def test_costs_are_compared_round_by_round():
    ours, naive = Cost((9.0, 1.0, 2.0, 4.0), 0), Cost((1.0, 3.0, 6.0, 8.0), 0)  # a machine that slows down
    assert (ours.cold, ours.warm, naive.warm) == (9.0, 2.0, 6.0)
    assert naive.over(ours) == 3.0
    assert Cost((6.0,), 0).over(Cost((3.0,), 0)) == 2.0
    calls = []
    costs = measure({name: partial(calls.append, name) for name in "ab"}, device="cpu", runs=2)
    assert calls == ["a", "b"] * 3
    assert all(len(cost.seconds) == 3 for cost in costs.values())


def test_doctor(checkpoints, capsys, tmp_path):
    main(["doctor"])
    assert "transformers" in capsys.readouterr().out
    strong = shutil.copytree(checkpoints["strong"], tmp_path / ("a_name_that_no_terminal_holds_" * 4) / "strong")
    main(["doctor", "--cdr_strong", str(strong), "--cdr_weak", checkpoints["weak"]])
    printed = capsys.readouterr().out
    assert str(strong) in printed
    assert printed.count("runs packed") == 2
    assert "a turn ends with '<|im_end|>'" in printed
    assert "every row encoded once" in printed
    assert "gate: surprise" in printed
    assert "MB more at work, kept prefixes" in printed
    main(["doctor", "--cdr_strong", str(strong), "--cdr_weak", checkpoints["weak"], "--cdr_gate", "surprise"])
    assert "gate: surprise, and survival beyond '<|im_end|>'" in capsys.readouterr().out
    pair = {"strong": str(strong), "weak": checkpoints["weak"]}
    found = examine(CDRConfig.from_options(**pair, gate="surprise"))
    found["pair"]["strong"]["end_tokens"] = []
    print_examination(found)
    assert "gate: surprise, without survival: strong has no end token" in capsys.readouterr().out
    assert "unknown arguments: foo" in fails(capsys, ["doctor", "--foo", "--cdr_strong", "a", "--cdr_weak", "b"])


def test_score_looks_for_the_routers_column_first(checkpoints, tmp_path, capsys):
    """In all rows, not batch by batch: a row without a domain has its reason."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": "b", "kind": "safety"}\n')
    arguments = ["score", "--input", str(rows), "--output_dir", str(tmp_path / "out"), "--batch_size", "1"]
    for role, folder in checkpoints.items():
        arguments += [f"--cdr_{role}", folder]
    err = fails(capsys, [*arguments, "--cdr_criteria", "safety", "--cdr_router", "column:topic"])
    assert "router is 'column:topic', and input " in err
    assert not (tmp_path / "out").exists()
    main([*arguments, "--cdr_criteria", "safety", "--cdr_router", "column:kind"])
    lines = [row["score"] for row in read(tmp_path)]
    assert [line["domain"] for line in lines] == [None, "safety"]
    assert lines[0]["error"]
