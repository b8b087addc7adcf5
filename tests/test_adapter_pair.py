"""The bench of a base with an adapter: the weights held once, the scores of two merged models."""

import json

import pytest

from trl_cdr.bench import workloads
from trl_cdr.bench.adapter_pair import run_adapter_pair
from trl_cdr.cli import main

SHAPES = [workloads.Shape(40, 2, prompts=2, prompt=20, shortest=12, longest=20), workloads.Shape(0, 1, prompts=1)]


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setitem(workloads.WORKLOADS, "table", ("two small calls", SHAPES))


def test_bench_prints_an_adapter_pair_beside_merged_models(checkpoints, capsys):
    arguments = ["bench", "--workload", "adapter_pair", "--runs", "1"]
    arguments += ["--cdr_strong", checkpoints["strong"]]
    main([*arguments, "--json"])
    result = json.loads(capsys.readouterr().out)
    assert [case["label"] for case in result["cases"]] == [shape.label for shape in SHAPES]
    assert all(0 < case["max_difference"] < 1e-4 for case in result["cases"])
    assert all(set(case["seconds"]) == set(case["peak_mb"]) == {"adapter", "merged"} for case in result["cases"])
    main(arguments)
    printed = capsys.readouterr().out
    assert "2 x 2, prefix 40" in printed
    assert f"{result['weights_share']:.3f} of it" in printed


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama-58m", pytest.param("smollm", marks=pytest.mark.real)])
def test_a_pair_of_one_base_takes_little_more_than_half(name, request, capsys, monkeypatch):
    if name == "smollm":
        monkeypatch.setitem(workloads.WORKLOADS, "table", ("a small call", SHAPES[:1]))
    folder = request.getfixturevalue("smollm_folder") if name == "smollm" else None
    result = run_adapter_pair("llama-58m", folder and str(folder), dtype="float32", attention="sdpa", runs=0)
    held = result["weights_mb"]
    with capsys.disabled():
        print(f"\n{name}: {held['adapter']:,.1f} MB, two copies {held['merged']:,.1f}: {result['weights_share']:.3f}")
        print([f"{case['row_difference']:.1e} nats a token" for case in result["cases"]])
    assert result["weights_share"] <= 0.55
    assert all(case["row_difference"] <= 1e-5 for case in result["cases"])
