"""The demo, whole: margins, not exact figures."""

import json
from pathlib import Path

import pytest

from trl_cdr.demo import models, story
from trl_cdr.demo.figure import draw_gold, draw_training

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.mark.slow
def test_the_demo_shows_what_it_claims(tmp_path, request):
    folder = Path(request.config.getoption("--demo_output") or tmp_path)
    if folder == tmp_path:
        story.run_demo(folder)
    summary = json.loads((folder / "summary.json").read_text())
    accuracy, gold = summary["accuracy"], summary["gold"]
    assert accuracy["pairs"] >= 300
    assert accuracy["ratio"] >= 0.9
    assert accuracy["strong_logp"] <= 0.6
    assert 0.4 < accuracy["length"] < 0.6
    assert 0.4 < accuracy["random"] < 0.6
    assert gold["cdr"] - gold["start"] >= 0.2
    assert gold["cdr"] - gold["random"] >= 0.2
    assert {curve["gold"][0] for curve in summary["curves"].values()} == {gold["start"]}  # one policy, one evaluation

    assert (folder / "gold.png").read_bytes().startswith(PNG)


def test_the_table_prints_what_was_measured(tmp_path, capsys):
    accuracy = {"pairs": 400, "ratio": 0.952, "strong_logp": 0.2, "weak_logp": 0.1, "length": 0.5, "random": 0.5}
    gold = {"start": 0.28, "cdr": 0.78, "gold": 0.77, "random": 0.2}
    story._print_tables({"accuracy": accuracy, "gold": gold, "seconds": 3.0}, tmp_path)
    printed = capsys.readouterr().out
    assert "95.2%" in printed
    assert "0.78" in printed


def test_preferred_counts_ties_half():
    assert story.preferred([1.0, 0.0, 2.0, 3.0], [0.0, 1.0, 2.0, 1.0]) == 2.5 / 4


def test_the_gold_reward_wants_the_end_token():
    end = models.build_tokenizer().eos_token_id
    prompt = [{"role": "user", "content": "add 1 and 2 ."}]
    said = [{"role": "assistant", "content": "the answer is 3 ."}]
    reward = story.gold_reward(end)
    assert reward(prompts=[prompt] * 2, completions=[said] * 2, completion_ids=[[9, end, 0], [9, 9, 9]]) == [1.0, 0.0]


def test_the_random_reward_knows_nothing_but_its_seed():
    first, second = (story.random_reward(3)(prompts=[None] * 4, completions=[None] * 4) for _ in range(2))
    assert first == second
    assert len(set(first)) == 4


def test_the_figure_is_drawn_where_lines_end_together(tmp_path):
    curve = {"steps": [0, 10], "gold": [0.2, 0.7]}
    draw_gold({"cdr": curve, "gold": curve, "random": curve}, tmp_path / "gold.png")
    assert (tmp_path / "gold.png").read_bytes().startswith(PNG)


def test_the_figure_of_training_takes_curves_of_several_seeds(tmp_path):
    curve = {"gold": [0.2, 0.4, 0.6], "tokens": [30.0, 20.0, 10.0], "repeats": [0.0, 0.1, 0.0]}
    draw_training({"ours": {"gold": [curve, curve], "random": [curve]}}, tmp_path / "training.png")
    assert (tmp_path / "training.png").read_bytes().startswith(PNG)
