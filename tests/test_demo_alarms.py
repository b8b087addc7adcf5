"""How the errors of the monitor are counted, on runs that were made up."""

import json

import pytest
from test_monitor import COLLAPSE, HEALTHY, history

from trl_cdr import ConfigError, Score
from trl_cdr.demo import alarms, gaming
from trl_cdr.demo.parts import Parts
from trl_cdr.training.metrics import Call


def recorded(gold, entries, *, name="dpo", seed=5):
    """A run's file; the gold reward was measured at equal distances."""
    calls = [{key.removeprefix("cdr/"): [value, 1] for key, value in entry.items() if "/" in key} for entry in entries]
    steps = [number * len(calls) // (len(gold) - 1) for number in range(len(gold))]
    return {"setting": name, "gate": "none", "seed": seed, "gold": {"steps": steps, "gold": gold}, "calls": calls}


BAD, GOOD = history(**COLLAPSE, noise=0.05), history(**HEALTHY["text that the strong model likes better"], noise=0.05)


@pytest.mark.parametrize(
    ("gold", "kind", "lost_at"),
    [
        ([0.5, 0.7, 0.8, 0.75, 0.72], "healthy", None),
        ([0.5, 0.7, 0.8, 0.6, 0.72], "healthy", 75),  # and came back
        ([0.5, 0.8, 0.6, 0.2, 0.1], "collapsing", 50),
        ([0.5, 0.4, 0.3, 0.3, 0.4], "collapsing", 25),  # never gained
        ([0.3, 0.8, 0.8, 0.7, 0.6], "between", None),  # lost more than 0.1, less than half
        ([0.5, 0.6, 0.56, 0.53, 0.53], "between", 75),  # little to lose
    ],
)
def test_what_a_run_was(gold, kind, lost_at):
    outcome = alarms.judge(recorded(gold, GOOD))
    assert (outcome.kind, outcome.lost_at) == (kind, lost_at)
    assert (outcome.start, outcome.best, outcome.end) == (gold[0], max(gold), gold[-1])


def test_alarms_of_a_run_that_was_recorded():
    outcome = alarms.judge(recorded([0.5, 0.8, 0.1], BAD))
    assert outcome.alarms[1] is not None
    assert outcome.alarms[1] <= outcome.alarms[10] <= 100
    assert outcome.alarms[10] % 10 == 0
    assert alarms.judge(recorded([0.5, 0.8, 0.1], GOOD)).alarms == {1: None, 10: None}


def test_results_of_another_workload_are_not_judged(tmp_path, monkeypatch):
    monkeypatch.setattr(alarms, "RUNS", {})
    Parts(tmp_path, {"model": "SmolLM2-135M-Instruct"})
    with pytest.raises(ConfigError, match="whose results are of another calls, model, .*workload .settings.json."):
        alarms.run_alarms(tmp_path)


def test_the_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(alarms, "RUNS", {})  # nothing to train
    for seed, (gold, entries) in enumerate([([0.5, 0.8, 0.1], BAD), ([0.5, 0.8, 0.8], GOOD), ([0.5, 0.7, 0.2], GOOD)]):
        (tmp_path / f"{seed}.json").write_text(json.dumps(recorded(gold, entries, seed=seed)))
    alarms.print_alarms(alarms.run_alarms(tmp_path))
    lines = capsys.readouterr().out.splitlines()
    step = alarms.judge(recorded([0.5, 0.8, 0.1], BAD)).alarms[1]
    assert lines[2:5] == [
        "| 1 healthy | 0 | 0 |  |",
        "| 0 between | 0 | 0 |  |",
        f"| 2 collapsing | 1 | 1 | {100 - step:+d} |",
    ]
    assert lines[-1] == "| dpo, none, 2 | 0.50 0.70 0.20 | collapsing | 100 | none, none |"


def test_a_run_is_recorded_once(tmp_path, monkeypatch):
    """The training itself stands in test_demo_gaming."""

    def train(setting, *, gate, seed, evaluations, observe):
        assert (gate, seed) == ("none", 5)
        for number in range(24):
            score = Score(0.5, strong_logps=-2.0 - number, weak_logps=-2.5 - number, n_tokens=4)
            observe(Call(["p"], ["a"], [[1, 2, 3, 4]], [score], [0.5], 0.1))
        return {"steps": [2 * step for step in range(evaluations + 1)], "gold": [0.5] * (evaluations + 1)}

    monkeypatch.setattr(alarms, "RUNS", {"dpo": ("none",)})
    monkeypatch.setattr(gaming, "make_settings", lambda: {"dpo": None})
    monkeypatch.setattr(gaming, "train", train)
    [outcome] = alarms.run_alarms(tmp_path, seeds=[5])
    run = json.loads((tmp_path / "dpo-none-5.json").read_text())
    assert (len(run["calls"]), len(run["gold"]["gold"])) == (24, 13)
    assert run["calls"][1]["strong_logps"] == [-3.0, 1]
    assert outcome.name == "dpo, none, 5"
    assert outcome.alarms[1] is not None  # the cost rises by a quarter of a nat at each step
    monkeypatch.setattr(alarms, "record", lambda *_, **__: pytest.fail("what is there was trained again"))
    assert alarms.run_alarms(tmp_path, seeds=[5]) == [outcome]
