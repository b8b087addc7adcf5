"""The workload that tries to game the reward: one setting in which the plain ratio collapses, and its table."""

import random

import pytest

from trl_cdr.demo import gaming, models, world


@pytest.mark.slow
def test_the_gate_keeps_a_policy_from_gaming_the_ratio():
    with models.one_thread(), models.quiet():
        setting = gaming.make_settings()["dpo"]
        found = {gate: gaming.train(setting, gate=gate, seed=0)["gold"] for gate in gaming.GATES}
    start, plain = found["none"]
    assert plain < start  # the reward rose, and what it stands for fell
    for gate in ("typicality", "surprise"):
        assert found[gate][-1] > start + 0.1
        assert found[gate][-1] > plain + 0.2
    for kind, wins in gaming.measure_attacks(setting).items():
        assert wins["typicality"] <= 0.2, kind
        assert wins["surprise"] <= 0.05, kind
    assert wins["none"] > 0.3  # a stray word behind a right completion


@pytest.mark.slow
def test_simpo_of_eight_on_the_gated_ratio():
    with models.one_thread(), models.quiet():
        setting = gaming.make_settings()["simpo"]
        curve = gaming.train(setting, gate="typicality", seed=0)
    start, end = curve["gold"]
    assert end > 0.75 > start + 0.2
    assert curve["seconds"][0] == pytest.approx(0, abs=0.1)
    assert curve["seconds"][1] > 1


def test_wrong_completions_of_the_plain_world_are_wrong_and_in_its_language():
    rng = random.Random(0)
    said = set()
    for _ in range(300):
        prompt, completion = world.draw_plain_row(rng, share_right=0.0)
        assert world.gold(prompt, completion, finished=True) == 0
        said.add(completion)
    assert len(said) > 100  # no common mistake
    assert all(world.gold(*world.draw_plain_row(rng, share_right=1.0), finished=True) for _ in range(50))


def test_the_table(capsys):
    gates = {"none": [0.2, 0.3], "surprise": [0.8, 0.75]}
    found = {"label": "a setting", "start": [0.4, 0.5], "seconds_per_step": 0.1234, "gates": gates}
    other = {**found, "label": "another", "gates": {"none": [0.4, 0.4], "gold": [0.9, 0.9]}}
    attacks = {kind: {"none": 0.5, "typicality": 0.1, "surprise": 0.0} for kind in gaming._ATTACKS}
    foresight = {"points": 4, "mean": -0.456, "worst": None}
    gaming.print_gaming(
        {"settings": {"dpo": found, "simpo": other}, "attacks": {"a pair": attacks}, "foresight": foresight}
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[-4:] == [
        "| the probe's win rate over attacks and final gold: 4 settings x gates | Spearman |",
        "|---|---|",
        "| mean | -0.46 |",
        "| worst | - |",
    ]
    assert lines[:8] == [
        "| final gold reward | start | plain | surprise | gold | seconds a step |",
        "|---|---|---|---|---|---|",
        "| a setting | 0.45 | 0.20 0.30 | 0.80 0.75 |  | 0.12 |",
        "| another | 0.45 | 0.40 0.40 |  | 0.90 0.90 | 0.12 |",
        "",
        "| worth more than a right completion: plain / typicality / surprise | a pair |",
        "|---|---|",
        "| nothing | 50% / 10% / 0% |",
    ]
