"""`trl-cdr audit`: the monitor's rule over logs that runs have left, and what it says of those that it can't judge."""

import json
import os

import pytest
from test_monitor import COLLAPSE, HEALTHY, history

from trl_cdr import InputError
from trl_cdr.cli import main
from trl_cdr.training.audit import audit, print_audit

GOOD = history(**HEALTHY["text that the strong model likes better"], noise=0.05)
BAD = history(**COLLAPSE, noise=0.05)


def write(folder, entries):
    folder.mkdir(parents=True, exist_ok=True)
    steps = [entry["step"] for entry in entries if isinstance(entry.get("step"), int)]
    (folder / "trainer_state.json").write_text(
        json.dumps({"global_step": max(steps, default=0), "log_history": entries})
    )
    return folder


def status(*arguments):
    """Of the command."""
    try:
        main(["audit", *map(str, arguments)])
    except SystemExit as stop:
        return stop.code
    return 0


def test_a_healthy_run(tmp_path, capsys):
    assert status(write(tmp_path, GOOD)) == 0
    printed = capsys.readouterr().out
    assert "cdr: no alarm" in printed
    assert "ALARM" not in printed
    assert not audit(tmp_path).is_alarming


def test_a_run_that_games(tmp_path, capsys):
    assert status(write(tmp_path, BAD)) == 1
    alarm = audit(tmp_path).monitors["cdr"].alarm
    printed = capsys.readouterr().out
    assert f"cdr: ALARM at step {alarm.step}: {alarm.reason}" in printed
    [row] = [line for line in printed.splitlines() if "costs the strong model " in line and "ALARM" not in line]
    last = audit(tmp_path).monitors["cdr"].last.cost
    assert row.split()[-3:] == [f"{value:.3f}" for value in (alarm.first.cost, last, alarm.last.cost)]
    assert str(tmp_path / "trainer_state.json") in printed  # whole, however long


def test_the_log_that_goes_furthest(tmp_path):
    """Of an interrupted run the last checkpoint; of a finished one the folder's own."""
    run = tmp_path / "run"
    write(run / "checkpoint-9", GOOD[:9])
    (run / "checkpoint-9" / "trainer_state.json").write_text("{")  # not read: there is a later one
    write(run / "checkpoint-90", BAD[:90])
    (run / "checkpoint-100").mkdir()  # not saved whole
    write(run / "checkpoint-best", GOOD)
    assert audit(run).path == run / "checkpoint-90" / "trainer_state.json"
    write(run, GOOD[:50])  # of a run before
    assert audit(run).path == run / "checkpoint-90" / "trainer_state.json"
    write(run, BAD)
    assert audit(run).path == run / "trainer_state.json"
    assert audit(run / "checkpoint-90").monitors["cdr"].alarm == audit(run).monitors["cdr"].alarm


def test_a_run_that_went_back_to_a_checkpoint_is_named(tmp_path, capsys):
    """After an alarm, say, with another beta: the log that goes furthest is of the run that was given up."""
    states = [write(tmp_path / name, GOOD[:steps]) / "trainer_state.json" for name, steps in [("checkpoint-30", 30)]]
    states += [write(tmp_path, BAD) / "trainer_state.json"]
    for age, state in enumerate(states):
        os.utime(state, ns=(age * 10**9, age * 10**9))
    assert audit(tmp_path).later is None
    assert status(tmp_path) == 1
    assert "written later" not in capsys.readouterr().out
    after = write(tmp_path / "checkpoint-40", GOOD[:40]) / "trainer_state.json"
    write(tmp_path / "checkpoint-60", BAD[:60])
    os.utime(tmp_path / "checkpoint-60" / "trainer_state.json", ns=(10**9, 10**9))
    assert (audit(tmp_path).path, audit(tmp_path).later) == (tmp_path / "trainer_state.json", after)
    assert status(tmp_path) == 1
    assert f"{after} was written later, and does not go as far" in capsys.readouterr().out


def test_every_reward_of_a_run(tmp_path, capsys):
    """Under whatever name; an evaluation's metrics are not a reward's."""
    other = [{key.replace("cdr/", "safe/"): value for key, value in entry.items()} for entry in BAD]
    evaluation = {"eval_cdr/strong_logps_per_token": -9.0, "step": 3}
    entries = [*({**one, **two} for one, two in zip(GOOD, other, strict=True)), evaluation]
    assert status(write(tmp_path, entries)) == 1
    printed = capsys.readouterr().out
    assert "cdr: no alarm" in printed
    assert "safe: ALARM" in printed
    assert "eval_" not in printed


def test_values_that_are_no_numbers(tmp_path):
    broken = [{"cdr/strong_logps": float("nan")}, {"cdr/tokens": None}, {}] * len(BAD)
    entries = [{**entry, **change} for entry, change in zip(BAD, broken, strict=False)]
    found = audit(write(tmp_path, entries)).monitors["cdr"]
    assert found.n_readings == len(BAD) // 3
    assert found.alarm is not None


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "holds no metrics of a CDRReward"),
        ([{"step": 1, "loss": 0.5}], "holds no metrics of a CDRReward .* in 1 logs. Train with logging_steps"),
        (GOOD[:12], "is too short to judge cdr: 12 of its logs hold the metrics"),
        ([{**entry, "cdr/tokens": float("nan")} for entry in GOOD], "is too short to judge cdr: 0 of its logs"),
    ],
)
def test_logs_that_say_nothing(entries, message, tmp_path, capsys):
    """Are not taken for healthy."""
    with pytest.raises(InputError, match=message):
        audit(write(tmp_path, entries))
    assert status(tmp_path) == 2
    assert capsys.readouterr().err.startswith("trl-cdr audit: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"log_history": [{"step": 1', "can't be read: .* Pass a checkpoint that was saved whole"),
        ("[]", "has no log_history"),
        ("{}", "has no log_history"),
        ('{"log_history": [1]}', "has no log_history, a list of logs"),
        (b"\xff\xfe", "can't be read"),
    ],
)
def test_files_that_are_no_log(text, message, tmp_path):
    (tmp_path / "trainer_state.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=message):
        audit(tmp_path)
    assert status(tmp_path) == 2


def test_folders_without_a_log(tmp_path, capsys):
    with pytest.raises(
        InputError, match=r"holds no trainer_state.json, and no checkpoint that does. Pass the output_dir"
    ):
        audit(tmp_path)
    with pytest.raises(InputError, match="is no folder. Pass the output_dir of a run"):
        audit(tmp_path / "typo")
    assert status(tmp_path / "typo") == 2
    assert status() == 2
    assert "OUT_DIR" in capsys.readouterr().err
    assert status("--help") == 0
    assert "exit status: 0 no alarm, 1 an alarm, 2 nothing that can be judged" in " ".join(
        capsys.readouterr().out.split()
    )


def test_what_is_printed_of_a_run_without_an_alarm(tmp_path, capsys):
    print_audit(audit(write(tmp_path, GOOD)))
    [row] = [line for line in capsys.readouterr().out.splitlines() if "log-ratio" in line]
    assert len(row.split()) == 4  # nothing at the alarm
