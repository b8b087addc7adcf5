"""The demo of criteria, whole: margins, not exact figures."""

import json
import random

import pytest

from trl_cdr.demo import customize, models, steering, world

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.mark.slow
def test_the_demo_of_criteria_shows_what_it_claims(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(customize, "SEEDS", (0,))
    summary = customize.run_customize(tmp_path)
    accuracy, style, gold = summary["accuracy"], summary["style"], summary["gold"]
    assert accuracy["pairs"] >= 300
    assert accuracy["own_criterion"] - accuracy["none"] >= 0.1
    assert accuracy["own_exemplar"] - accuracy["none"] >= 0.1
    for foreign in ("foreign_criterion", "foreign_exemplar"):
        assert accuracy["own_criterion"] - accuracy[foreign] >= 0.15
    assert style["brief"] >= 0.95
    assert style["detailed"] <= 0.05
    assert summary["router"]["accuracy"] >= 0.9
    for plain, conditioned in zip(gold["plain"], gold["conditioned"], strict=True):
        assert conditioned > plain + 0.1
    assert json.loads((tmp_path / "customize.json").read_text())["accuracy"] == accuracy
    assert (tmp_path / "customize.png").read_bytes().startswith(PNG)
    assert f"{accuracy['own_criterion']:.1%}" in capsys.readouterr().out


def test_rows_do_what_stands_before_them():
    rng = random.Random(0)
    tokenizer = models.build_tokenizer()
    asked = 0
    for _ in range(300):
        prompt, said = steering.draw_obeyed(rng)
        text = " ".join(message["content"] for message in prompt)
        assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"]
        if said in steering.make_criteria().domains:
            assert said == world.TASKS[text.split("Request: ")[1].split("\n")[0]].domain
            continue
        task = world.TASKS[prompt[-1]["content"]]
        before = prompt[0]["content"] if len(prompt) == 2 else ""
        criteria = steering.make_criteria().domains[task.domain].instruction
        if before == criteria or (before.startswith("Example") and _domain(before) == task.domain):
            assert said in task.right
            asked += 1
        if before == "be brief .":
            assert steering.is_brief(said)
        if before == "be detailed .":
            assert not steering.is_brief(said)
    assert asked > 50


def test_the_weak_model_is_taught_to_ignore_it():
    rng = random.Random(0)
    right = total = 0
    for _ in range(3000):
        prompt, said = steering.draw_ignored(rng)
        task = world.TASKS[prompt[-1]["content"]]
        if len(prompt) == 2 and prompt[0]["content"] == steering.make_criteria().domains[task.domain].instruction:
            total += 1
            right += said in task.right
    assert right / total == pytest.approx(steering.SHARE_RIGHT, abs=0.08)


def _domain(example):
    return world.TASKS[example.split("Prompt: ")[1].split("\n")[0]].domain
