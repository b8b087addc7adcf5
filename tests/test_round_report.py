"""The table that closes a run."""

from pathlib import Path

from trl_cdr.rounds.round_report import describe_round, show_rounds

PAIRS = {"rows": 20_000, "pairs": 19_000, "reward": -1.25, "gated": 0.125, "margin": 12.5, "chosen_tokens": 300.25}
PAIRS |= {"rejected_tokens": 280.0, "longer_chosen": 0.5, "skipped": {"tie": 7, "missing": 2}, "unscorable": 3}


def test_a_round_in_a_line(capsys):
    log = {"steps": 5, "loss": 0.5, "accuracy": None}
    rounds = [describe_round(1, PAIRS, log), describe_round(2, PAIRS, {**log, "loss": None})]
    assert (rounds[0]["ties"], rounds[0]["steps"], rounds[0]["reward"]) == (7, 5, -1.25)
    show_rounds(rounds, Path("out/round-2/policy"))
    lines = capsys.readouterr().out.splitlines()
    row = ["1", "20,000", "-1.25", "19,000", "7", "12.5%", "+12.50", "300.2", "/", "280.0", "0.500"]
    assert [line.split() for line in lines[1:3]] == [row, ["2", *row[1:-1], "-"]]  # whole, in 80 columns
    assert lines[-1] == "policy  out/round-2/policy"


def test_what_is_held_out(capsys):
    log = {"steps": 5, "loss": 0.5}
    show_rounds([describe_round(1, PAIRS, log, held_out={**PAIRS, "reward": 2.5})], Path("p"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("held out")
    assert lines[1].endswith(" +2.50")
    assert max(map(len, lines[:2])) <= 80
