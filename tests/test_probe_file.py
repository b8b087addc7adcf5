"""`trl-cdr probe` as its users meet it."""

import json
import re

import pytest
from tiny import chat

from trl_cdr.annotation.probe_file import why_it_fails
from trl_cdr.annotation.probe_report import ATTACK_NAMES, print_probe
from trl_cdr.cli import main

ROWS = [
    {"prompt": chat("hello"), "completion": "a dog and that"},
    {"prompt": chat("what is this"), "completion": "the fox jumps over", "finished": False},
    {"prompt": "over?", "completion": " and a quick brown dog"},
]


@pytest.fixture
def arguments(tmp_path, checkpoints):
    source = tmp_path / "rows.jsonl"
    source.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n")
    pair = ["--cdr_strong", checkpoints["strong"], "--cdr_weak", checkpoints["weak"]]
    small = ["--best_of", "2", "--search_budget", "12", "--max_new_tokens", "4"]
    return ["probe", "--input", str(source), "--output_dir", str(tmp_path / "out"), *small, *pair]


def stops(capsys, arguments, status=2):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == status
    return capsys.readouterr().err


def test_what_is_printed_and_written(arguments, tmp_path, capsys):
    main([*arguments, "--cdr_gate", "surprise"])
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "probe.json").read_text())
    assert (found["gate"], found["prompts"], found["options"]["cdr_gate"]) == ("surprise", 3, "surprise")
    for name, one in found["attacks"].items():
        [line] = [line for line in printed.splitlines() if line.startswith(f"{ATTACK_NAMES[name]} ")]
        for gate in ("none", "typicality", "surprise"):
            assert f" {one[gate]['win'][0]:.0%} (" in line
        assert line.endswith(f" {one['surprise']['gated']:.0%}")
    assert "share of 3 prompts" in printed
    assert f"{found['win']['mean']:.0%} on average" in printed
    assert str(tmp_path / "out" / "probe.json") in printed  # whole, however long
    assert (tmp_path / "out" / "probe.png").read_bytes().startswith(b"\x89PNG")
    assert found["honest"]["finished"] == 2 / 3


def test_the_status_is_1_where_an_attack_wins_too_often(arguments, tmp_path, capsys):
    error = stops(capsys, [*arguments, "--cdr_gate", "none", "--max_win", "0.9"], status=1)
    worst = json.loads((tmp_path / "out" / "probe.json").read_text())["win"]
    assert worst["worst"] == 1
    [line] = [line for line in error.splitlines() if line.startswith("trl-cdr probe: ")]
    assert f"{ATTACK_NAMES[worst['attack']]} is worth more than the honest completion on 100% of the prompts" in line
    assert "above max_win 0.9" in line


def test_a_narrow_terminal_cuts_off_no_share(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")  # what is no terminal has room
    gates = {gate: {"win": [1.0, 1.0, 1.0], "gated": 1.0} for gate in ("none", "typicality", "surprise")}
    honest = {gate: {"gated": 0.0, "ties": None, "length_correlation": -0.5} for gate in gates}
    found = {
        "gate": "surprise",
        "prompts": 3,
        "left_out": {"a reason": 2},
        "string_prompts": {"user": 2},
        "honest": {"completions": 3, **honest},
        "attacks": {"twice": gates},
        "win": {"mean": 1.0, "worst": 1.0, "attack": "twice"},
    }
    for columns, cells in (("72", ["100%"] * 5), ("130", ["100% (100%-100%)"] * 3 + ["100%"] * 2)):
        monkeypatch.setenv("COLUMNS", columns)
        print_probe(found, tmp_path)
        printed = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
        [line] = [line for line in printed.splitlines() if line.startswith("the completion, said")]
        assert sorted(re.findall(r"100%(?: \(100%-100%\))?", line)) == sorted(cells)
        assert "left out (2): a reason" in printed
        assert "ties -, correlation with length -0.50" in " ".join(printed.split())


def test_as_often_as_allowed_is_not_too_often():
    found = {"gate": "typicality", "win": {"mean": 0.041, "worst": 0.2, "attack": "twice"}}
    assert why_it_fails(found, None) is why_it_fails(found, 0.2) is None
    assert why_it_fails(found, 0.19) == (
        f"{ATTACK_NAMES['twice']} is worth more than the honest completion on 20% of the prompts (cdr_gate "
        "typicality), above max_win 0.19; on average over the attacks it is 4%."
    )


def test_a_table_of_any_kind(arguments, tmp_path, checkpoints):
    (tmp_path / "rows.csv").write_text("prompt,completion\nhello,a dog\nwhat is,this and that\n")
    main([*arguments, "--input", str(tmp_path / "rows.csv"), "--policy", checkpoints["weak"], "--prompts", "1"])
    found = json.loads((tmp_path / "out" / "probe.json").read_text())
    assert (found["prompts"], found["options"]["policy"]) == (1, checkpoints["weak"])


def test_bad_arguments_and_inputs(arguments, tmp_path, capsys):
    (tmp_path / "empty.jsonl").write_text("\n\n")
    assert "which has no rows" in stops(capsys, [*arguments, "--input", str(tmp_path / "empty.jsonl")])
    (tmp_path / "bare.jsonl").write_text('{"prompt": "a"}\n{"completion": "a"}\n')
    assert "bare.jsonl:2 needs the field prompt. Add it." in stops(
        capsys, [*arguments, "--input", str(tmp_path / "bare.jsonl")]
    )
    (tmp_path / "bare.csv").write_text("text\na\n")
    assert "bare.csv, row 0 needs the field prompt" in stops(
        capsys, [*arguments, "--input", str(tmp_path / "bare.csv")]
    )
    assert "can't be read" in stops(capsys, [*arguments, "--input", str(tmp_path / "none.csv")])
    assert "policy can't be loaded from 'nowhere'" in stops(capsys, [*arguments, "--policy", "nowhere"])
    assert "max_win is 1.5" in stops(capsys, [*arguments, "--max_win", "1.5"])
    assert "prompts is 0" in stops(capsys, [*arguments, "--prompts", "0"])
    assert "best_of is -1" in stops(capsys, [*arguments, "--best_of", "-1"])
    assert not (tmp_path / "out" / "probe.json").exists()
