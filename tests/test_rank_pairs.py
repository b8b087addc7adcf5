"""`trl-cdr rank-pairs` on tiny models: one pass a model, every pair as `evaluate` has it."""

import json
from itertools import permutations

import pytest
from pairs import preferences, rows
from tiny import llama

from trl_cdr import ConfigError, InputError
from trl_cdr.annotation.evaluate import evaluate
from trl_cdr.annotation.passes import Passes
from trl_cdr.annotation.rank_pairs import RankArguments, RankOptions, rank_pairs, read_performance
from trl_cdr.cli import main
from trl_cdr.config import CDRConfig


@pytest.fixture(scope="module")
def models(checkpoints, tmp_path_factory, tokenizer):
    """Three, of which two are the pair."""
    third = str(tmp_path_factory.mktemp("third") / "third")
    llama(len(tokenizer), seed=2).save_pretrained(third)
    tokenizer.save_pretrained(third)
    return [checkpoints["strong"], checkpoints["weak"], third]


@pytest.fixture(scope="module")
def passes(tmp_path_factory):
    return tmp_path_factory.mktemp("passes")


def test_each_model_is_run_once_and_every_pair_is_as_evaluate_has_it(models, passes):
    options = RankOptions(cdr_gate="none")
    found = rank_pairs(models, preferences(), options, passes=Passes(passes))
    assert found["passes"] == {"run": 3, "found": 0}
    ranking = {(pair["strong"], pair["weak"]): pair for pair in found["ranking"]}
    assert set(ranking) == set(permutations(models, 2))
    shares = [pair["accuracy"][0] for pair in found["ranking"]]
    assert shares == sorted(shares, reverse=True)
    own = Passes(passes)
    for (strong, weak), pair in ranking.items():
        summary = evaluate(CDRConfig(strong, weak, cdr_gate="none"), preferences(), passes=own).summary
        judges = summary["judges"]["plain"]
        assert pair["accuracy"] == pytest.approx(judges["sum"]["mean"])
        assert pair["domains"] == judges["sum"]["domains"]
        assert found["models"][strong]["own"] == pytest.approx(judges["strong_sum"]["mean"])
        assert pair["accuracy"][0] + ranking[weak, strong]["accuracy"][0] == pytest.approx(1)
        assert pair["gap"] == pytest.approx(
            found["models"][strong]["performance"] - found["models"][weak]["performance"]
        )
    assert (own.run, own.found) == (0, 12)
    best = found["ranking"][found["best"]["safety"]]["domains"]["safety"][0]
    assert best == max(pair["domains"]["safety"][0] for pair in found["ranking"])


def test_the_reduction_and_the_performance_count(models, passes):
    performance = dict(zip(models, (0.1, 0.2, 0.3), strict=True))
    options = RankOptions(cdr_gate="none", cdr_reduction="mean")
    found = rank_pairs(models, preferences(), options, performance=performance, passes=Passes(passes))
    config = CDRConfig(models[2], models[0], cdr_gate="none", cdr_reduction="mean")
    summary = evaluate(config, preferences(), passes=Passes(passes)).summary
    [pair] = [pair for pair in found["ranking"] if (pair["strong"], pair["weak"]) == (models[2], models[0])]
    assert pair["accuracy"] == pytest.approx(summary["judges"]["plain"]["mean"]["mean"])
    assert pair["gap"] == pytest.approx(0.2)
    assert found["performance"] == "as given"
    upward = sorted((pair for pair in found["ranking"] if pair["gap"] > 0), key=lambda pair: pair["gap"])
    assert len(upward) == 3
    same = rank_pairs(models, preferences(), options, performance=dict.fromkeys(models, 1.0), passes=Passes(passes))
    assert same["spearman"] is None


def test_gap_and_accuracy_are_correlated_upwards(models, passes, monkeypatch):
    from trl_cdr.annotation import rank_pairs as module

    seen = []
    monkeypatch.setattr(module, "spearman", lambda *columns: seen.append(columns) or 0.5)
    found = rank_pairs(models, preferences(), RankOptions(cdr_gate="none"), passes=Passes(passes))
    [(gaps, shares)] = seen
    assert found["spearman"] == 0.5
    assert all(gap > 0 for gap in gaps)
    upward = [pair for pair in found["ranking"] if pair["gap"] > 0]
    assert (gaps, shares) == ([pair["gap"] for pair in upward], [pair["accuracy"][0] for pair in upward])


def test_criteria_are_shown_to_all(models, passes, tmp_path):
    (tmp_path / "own.toml").write_text('[only]\ninstruction = "Be brief."\n')
    options = RankOptions(cdr_gate="none", cdr_criteria=str(tmp_path / "own.toml"))
    found = rank_pairs(models[:2], preferences(), options, passes=Passes(passes))
    config = CDRConfig(*models[:2], cdr_gate="none", cdr_criteria=options.cdr_criteria)
    judges = evaluate(config, preferences(), passes=Passes(passes)).summary["judges"]
    [pair] = [pair for pair in found["ranking"] if pair["strong"] == models[0]]
    assert pair["accuracy"] == pytest.approx(judges["criteria"]["sum"]["mean"])


def test_the_command(models, passes, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    (tmp_path / "can.csv").write_text("model,performance\nstrong,0.5\nweak,0.25\nthird,0.125\n")
    arguments = ["--data", str(tmp_path / "rows.jsonl"), "--cache_dir", str(passes), "--cdr_gate", "none"]
    arguments += ["--output_dir", str(tmp_path / "out"), "--performance", str(tmp_path / "can.csv")]
    main(["rank-pairs", "--models", *models, *arguments])
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "rank_pairs.json").read_text())
    assert [each["performance"] for each in found["models"].values()] == [0.5, 0.25, 0.125]
    best = found["ranking"][0]
    [line] = [line for line in printed.splitlines() if f" {best['gap']:+.3f} " in line]
    assert f"{best['accuracy'][0]:.3f} (" in line
    assert line.split()[:2] == [best["strong"].rpartition("/")[2], best["weak"].rpartition("/")[2]]
    assert "Spearman of gap (as given) and accuracy over 3 pairs: " in printed
    assert "best for safety: " in printed
    assert "models run, " in printed
    assert (tmp_path / "out" / "rank_pairs.png").read_bytes().startswith(b"\x89PNG")
    assert "| strong | weak | +0.250 | " in (tmp_path / "out" / "rank_pairs.md").read_text()
    assert "cdr_strong" not in found["options"]


def test_revisions_and_options():
    config = RankOptions(cdr_reduction="mean", cdr_seed=3).of("org/name@main")
    assert (config.cdr_strong, config.cdr_strong_revision) == ("org/name", "main")
    assert (config.cdr_weak, config.cdr_reduction, config.cdr_seed) == ("org/name", "mean", 3)
    assert RankOptions().of("org/name").cdr_strong_revision is None


def test_a_folder_may_have_an_at_in_its_name(tmp_path):
    (tmp_path / "a@b").mkdir()
    assert RankOptions().of(str(tmp_path / "a@b")).cdr_strong == str(tmp_path / "a@b")


def test_performance_is_read(tmp_path):
    path = tmp_path / "can.json"
    path.write_text('{"org/one": 0.5, "two": 1}')
    assert read_performance(str(path), ["org/one", "other/two/"]) == {"org/one": 0.5, "other/two/": 1.0}
    with pytest.raises(InputError, match="which lacks 'three'"):
        read_performance(str(path), ["three"])
    for content in ("[1]", "{", '{"one": "much"}', '{"one": null}'):
        path.write_text(content)
        with pytest.raises(InputError, match="which can't be read"):
            read_performance(str(path), ["one"])
    (tmp_path / "can.csv").write_text("name,performance\none,1\n")
    with pytest.raises(InputError, match="KeyError"):
        read_performance(str(tmp_path / "can.csv"), ["one"])


def test_bad_arguments(models, passes, tmp_path):
    with pytest.raises(ConfigError, match="models names 1. Name two or more."):
        RankArguments(["x"], models=["a"])
    with pytest.raises(ConfigError, match="models names 1. Name two or more."):
        RankArguments(["x"], models="some/name")  # as YAML has it
    with pytest.raises(ConfigError, match="which are the same weights"):
        rank_pairs([models[0], models[1], models[0]], preferences(), passes=Passes(passes))
    (tmp_path / "own.toml").write_text('[one]\ninstruction = "a"\n[two]\ninstruction = "b"\n')
    routed = RankOptions(cdr_criteria=str(tmp_path / "own.toml"), cdr_router="likelihood")
    with pytest.raises(ConfigError, match="cdr_router is 'likelihood'"):
        rank_pairs(models, preferences(), routed, passes=Passes(passes))
    with pytest.raises(InputError, match="performance lacks"):
        rank_pairs(models[:2], preferences(), RankOptions(cdr_gate="none"), performance={}, passes=Passes(passes))
