"""`trl-cdr evaluate` on a tiny pair: what it counts, beside the scorer and counts by hand, and what it writes."""

import json
import shutil
from dataclasses import replace

import pytest
from lora import save_adapter
from pairs import WORDS, preferences, rows, say
from tiny import BRACKETS, byte_tokenizer

from trl_cdr import ConfigError, DensityRatioScorer, InputError
from trl_cdr.annotation.evaluate import evaluate
from trl_cdr.annotation.evaluate_files import EvaluateArguments
from trl_cdr.annotation.evaluate_report import draw_evaluation
from trl_cdr.annotation.judges import JUDGES
from trl_cdr.annotation.passes import Passes, name_model
from trl_cdr.annotation.rewardbench import REWARD_BENCH, ties_score
from trl_cdr.cli import main
from trl_cdr.config import CDRConfig


@pytest.fixture(scope="module")
def passes(tmp_path_factory):
    """One folder for all tests of this module: what was run once is there."""
    return Passes(tmp_path_factory.mktemp("passes"))


@pytest.fixture
def config(checkpoints):
    return CDRConfig(checkpoints["strong"], checkpoints["weak"], cdr_gate="surprise")


@pytest.fixture
def run(tmp_path, checkpoints, passes):
    """The command on rows; what it wrote."""

    def run(content, *arguments):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
        pair = ["--cdr_strong", checkpoints["strong"], "--cdr_weak", checkpoints["weak"], "--cdr_gate", "surprise"]
        places = ["--output_dir", str(tmp_path / "out"), "--cache_dir", str(passes.folder)]
        main(["evaluate", "--data", str(tmp_path / "rows.jsonl"), *places, *pair, *arguments])
        return json.loads((tmp_path / "out" / "evaluate.json").read_text())

    return run


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def mean_of_domains(wins, data):
    """By hand."""
    domains = {}
    for subset in {one.subset for one in data}:
        of = [win for win, one in zip(wins, data, strict=True) if one.subset == subset]
        domain = next(one.domain for one in data if one.subset == subset)
        domains.setdefault(domain, []).append(sum(of) / len(of))
    return sum(sum(each) / len(each) for each in domains.values()) / len(domains)


def test_the_judges_are_counted_as_by_hand(config, passes):
    data = preferences()
    found = evaluate(config, data, passes=passes).summary
    assert list(found["judges"]["plain"]) == list(JUDGES)
    scorer = DensityRatioScorer.from_config(config)
    chosen, rejected = (
        scorer.score([one.prompt for one in data], [getattr(one, side)[0] for one in data])
        for side in ("chosen", "rejected")
    )

    def wins(judge):
        return [(judge(a) > judge(b)) + (judge(a) == judge(b)) / 2 for a, b in zip(chosen, rejected, strict=True)]

    by_hand = {
        "sum": wins(lambda score: score.value),
        "strong_sum": wins(lambda score: score.strong_logps),
        "weak_sum": wins(lambda score: score.weak_logps),
        "strong_mean": wins(lambda score: score.strong_logps / score.n_tokens),
        "longer": [
            (len(one.chosen[0]) > len(one.rejected[0])) + (len(one.chosen[0]) == len(one.rejected[0])) / 2
            for one in data
        ],
    }
    for name, each in by_hand.items():
        assert found["judges"]["plain"][name]["mean"][0] == pytest.approx(mean_of_domains(each, data)), name
    lead = mean_of_domains(by_hand["sum"], data) - mean_of_domains(by_hand["longer"], data)
    assert found["lead"]["longer"][0] == pytest.approx(lead)
    assert found["main"] == ["plain", "sum"]
    assert found["criteria_lead"] is None
    assert found["subsets"]["large"] == {"domain": "chat", "pairs": 4, "prompts": 2}
    assert "calibrated" in found["judges"]["plain"]["strong_sum"]
    assert "calibrated" not in found["judges"]["plain"]["longer"]


def test_the_main_judge_follows_the_reduction(config, passes):
    by_mean = evaluate(replace(config, cdr_reduction="mean"), preferences(), passes=passes)
    assert by_mean.summary["main"] == ["plain", "mean"]
    assert set(by_mean.summary["lead"]) == set(JUDGES) - {"mean"}


def test_criteria_are_counted_beside_none(config, passes, tmp_path):
    (tmp_path / "own.toml").write_text('[chat]\ninstruction = "Be brief."\n[safety]\ninstruction = "Be safe."\n')
    shown = replace(config, cdr_criteria=str(tmp_path / "own.toml"))
    data = preferences()
    found = evaluate(shown, data, passes=passes).summary
    plain = evaluate(config, data, passes=passes).summary
    assert found["judges"]["plain"] == plain["judges"]["plain"]
    assert found["main"] == ["criteria", "sum"]
    scorer = DensityRatioScorer.from_config(shown)
    scores = [
        scorer.score([one.prompt for one in data], [getattr(one, side)[0] for one in data], domains=domains)
        for domains in [[one.domain for one in data]]
        for side in ("chosen", "rejected")
    ]
    wins = [float(a.value > b.value) for a, b in zip(*scores, strict=True)]
    assert found["judges"]["criteria"]["sum"]["mean"][0] == pytest.approx(mean_of_domains(wins, data))
    without = plain["judges"]["plain"]["sum"]["mean"][0]
    assert found["criteria_lead"][0] == pytest.approx(mean_of_domains(wins, data) - without)
    assert list(found["candidates"]) == [
        *("sum", "mean", "reward"),
        *("sum with criteria", "mean with criteria", "reward with criteria"),
    ]
    (tmp_path / "own.toml").write_text('[chat]\ninstruction = "Be brief."\n')
    told = replace(shown, cdr_router="column:domain")
    left = evaluate(told, data, passes=passes).summary
    assert left["pairs"] == 8
    assert [(count, reason[:22]) for reason, count in left["unscorable"].items()] == [(4, "the domain 'safety' is")]
    unknown = [replace(one, criteria_domain="none") for one in data if one.domain == "chat"]
    constant = evaluate(replace(shown, cdr_domain="chat"), unknown, passes=passes).summary
    assert constant["pairs"] == 8


def test_a_model_is_run_once(config, tmp_path):
    own = Passes(tmp_path)
    first = evaluate(config, preferences(3), passes=own).summary
    assert first["passes"] == {"run": 2, "found": 0}
    turned = (config.cdr_weak, config.cdr_strong)
    found = evaluate(config, preferences(3), passes=Passes(tmp_path), pairs=[turned]).summary
    assert found["passes"] == {"run": 0, "found": 2}
    names = [name for name in found["candidates"] if name.endswith("sum")]
    assert names == [f"{config.cdr_strong} over {config.cdr_weak}, sum", f"{turned[0]} over {turned[1]}, sum"]
    assert found["candidates"][names[0]][0] + found["candidates"][names[1]][0] == pytest.approx(1)


@pytest.mark.compat
def test_models_of_one_base_have_names_of_their_own(checkpoints, tmp_path):
    adapter = save_adapter(tmp_path / "adapter", checkpoints["weak"])
    config = CDRConfig(checkpoints["weak"], checkpoints["weak"], cdr_strong_adapter=adapter, cdr_gate="none")
    other = (checkpoints["weak"], checkpoints["weak"])
    found = evaluate(config, preferences(3), passes=Passes(tmp_path / "passes"), pairs=[other]).summary
    adapted = f"{checkpoints['weak']} + {adapter}"
    assert list(found["models"]) == [adapted, checkpoints["weak"]]
    assert [name for name in found["candidates"] if name.endswith("sum")] == [
        f"{adapted} over {checkpoints['weak']}, sum",
        f"{checkpoints['weak']} over {checkpoints['weak']}, sum",
    ]
    revised = CDRConfig(
        "a", "b", cdr_strong_revision="step1000", cdr_strong_adapter="c", cdr_strong_adapter_revision="d"
    )
    assert [name_model(revised, role) for role in ("strong", "weak")] == ["a@step1000 + c@d", "b"]


def test_what_is_printed_and_written(run, tmp_path, capsys):
    found = run(rows())
    printed = capsys.readouterr().out
    assert "prefers the better completion: 12 pairs" in printed
    mean, low, high = found["judges"]["plain"]["sum"]["mean"]
    [line] = [line for line in printed.splitlines() if line.startswith("log-ratio ")][:1]
    assert f" {mean:.3f} ({low:.2f}-{high:.2f}) " in line
    assert "models run" in printed
    assert "log-ratio is ahead of: " in printed
    markdown = (tmp_path / "out" / "evaluate.md").read_text()
    assert f"| {mean:.3f} ({low:.2f}-{high:.2f}) |" in markdown
    assert "| large | chat | 4 | 2 |" in markdown
    assert (tmp_path / "out" / "evaluate.png").read_bytes().startswith(b"\x89PNG")
    written = read(tmp_path / "out" / "rows.jsonl")
    assert [row["id"] for row in written] == [f"r{place}" for place in range(12)]
    earned = [row["results"] for row in written]
    assert mean_of_domains(earned, preferences()) == pytest.approx(mean)
    assert all(row["results"] == float(row["scores_chosen"] > row["scores_rejected"]) for row in written)
    assert found["options"]["cdr_gate"] == "surprise"


def test_published_sets_have_their_scores(run, tmp_path, capsys):
    subsets = ["alpacaeval-easy", "mt-bench-med", "math-prm", "hep-go"]
    own = {"prompt": "what?", "domain": None}
    content = [{**row, **own, "subset": subsets[place % 4]} for place, row in enumerate(rows())]
    second = []
    for place in range(3):
        one = {"prompt": f"what is {WORDS[place]}", "rejected": [say(place + 4 * n, 4) for n in range(1, 4)]}
        second.append({**one, "id": f"m{place}", "subset": "Math", "chosen": [say(place, 3)]})
        second.append({**one, "id": f"ref:{place}", "subset": "Ties", "chosen": [say(place, 3)]})
        second.append({**one, "id": f"tied:{place}", "subset": "Ties", "chosen": [say(place, 3), say(place + 2, 2)]})
    (tmp_path / "second.jsonl").write_text("".join(json.dumps(row) + "\n" for row in second))
    found = run(content, "--benchmark", "allenai/reward-bench")
    written = read(tmp_path / "out" / "rows.jsonl")
    scores = found["judges"]["plain"]["sum"]["benchmarks"]
    assert list(found["judges"]["plain"]["sum"]["domains"]) == ["Chat", "Reasoning"]
    earned = [row["results"] for row in written]
    accuracies = {name: sum(earned[place::4]) / 3 for place, name in enumerate(subsets)}
    assert scores["allenai/reward-bench"] == pytest.approx(REWARD_BENCH.score(accuracies))

    named = ("--benchmark", "allenai/reward-bench-2")
    found = run(content, "--data", str(tmp_path / "second.jsonl"), *named)
    scores = found["judges"]["plain"]["sum"]["benchmarks"]
    assert list(found["judges"]["plain"]["sum"]["domains"]) == ["Math", "Ties"]
    written = read(tmp_path / "out" / "rows.jsonl")
    by_subset = {name: [row for row in written if row["subset"] == name] for name in ("Math", "Ties")}
    math = sum(row["scores_chosen"] > max(row["scores_rejected"]) for row in by_subset["Math"]) / 3
    sides = [(row["id"], row["scores_chosen"], row["scores_rejected"]) for row in by_subset["Ties"]]
    ties = ties_score([(id, [right] if isinstance(right, float) else right, wrong) for id, right, wrong in sides])
    by_hand = {"Math": math, "Ties": ties, "score": (math + ties) / 2}
    assert scores["allenai/reward-bench-2"] == pytest.approx(by_hand)
    assert "allenai/reward-bench-2: " in capsys.readouterr().out


def test_labels_are_suggested_and_choose(run, tmp_path, capsys):
    judged = rows()
    open_rows = [
        {"id": row["id"], "prompt": row["prompt"], "completions": [row["chosen"], row["rejected"]], "on_policy": n > 5}
        for n, row in enumerate(judged)
    ]
    found = run(open_rows, "--suggest_labels", "5")
    assert (found["pairs"], found["unlabelled"]) == (0, 12)
    assert "judges" not in found
    suggested = read(tmp_path / "out" / "suggestions.jsonl")
    assert len(suggested) == 5
    assert len({json.dumps(row["prompt"]) for row in suggested}) == 5
    # A person says the same as the sum.
    labels = [{**row, "better": row["prefer"]["sum"]} for row in suggested]
    (tmp_path / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labels))
    chosen = run(open_rows, "--labels", str(tmp_path / "labels.jsonl"))["labels"]
    assert chosen["best"] == "sum"
    assert chosen["candidates"]["sum"] == [1.0, 1.0, 1.0]
    assert chosen["labels"] == 5
    assert "5 labels choose: sum" in capsys.readouterr().out
    (tmp_path / "out" / "suggestions.jsonl").write_bytes((tmp_path / "labels.jsonl").read_bytes())
    with pytest.raises(SystemExit):
        run(open_rows, "--suggest_labels", "5")
    assert "holds labels, and suggest_labels would write over it" in capsys.readouterr().err


def test_rows_of_another_judge(run, tmp_path, capsys):
    run(rows())
    theirs = tmp_path / "theirs.jsonl"
    theirs.write_bytes((tmp_path / "out" / "rows.jsonl").read_bytes())
    found = run(rows(), "--baseline", str(theirs))["baseline"]
    assert (found["lead"], found["won"], found["lost"], found["missing"]) == ([0.0, 0.0, 0.0], 0, 0, 0)
    others = [{**row, "scores_chosen": -row["scores_chosen"], "scores_rejected": -row["scores_rejected"]}
              for row in read(theirs)][:-1]  # fmt: skip
    theirs.write_text("".join(json.dumps(row) + "\n" for row in others))
    found = run(rows(), "--baseline", str(theirs))["baseline"]
    assert (found["rows"], found["missing"], found["won"] + found["lost"]) == (11, 1, 11)
    assert found["ours"][0] == pytest.approx(1 - found["theirs"][0])
    assert len(read(tmp_path / "out" / "baseline.jsonl")) == 11
    assert "baseline, on 11 rows of both" in capsys.readouterr().out


def test_bad_rows_stop_or_are_counted(run, capsys):
    bad = [*rows(), {"prompt": "a", "chosen": "b", "rejected": "b"}, {"prompt": "a", "chosen": "b"}]
    with pytest.raises(SystemExit):
        run(bad)
    assert "rows.jsonl:13 has equal completions" in capsys.readouterr().err
    found = run(bad, "--on_bad_row", "skip")
    assert found["pairs"] == 12
    assert sum(found["bad_rows"].values()) == 2
    assert "left out (1): has 1 completion." in capsys.readouterr().out


def test_some_pairs_of_several_files(run, tmp_path):
    row = {name: value for name, value in rows(1)[0].items() if name not in ("subset", "domain")}
    (tmp_path / "more.jsonl").write_text(json.dumps({**row, "id": "other"}))
    found = run(rows(), "--pairs", "4", "--data", str(tmp_path / "rows.jsonl"), str(tmp_path / "more.jsonl"))
    assert {name: each["pairs"] for name, each in found["subsets"].items()} == dict.fromkeys(
        ("small", "large", "more", "only"), 1
    )


def test_what_cannot_be_scored_is_left_out_for_all(config, passes):
    short = replace(config, cdr_max_length=16)
    data = [*preferences(3), replace(preferences(1)[0], id="long", chosen=("this and that " * 20,))]
    found = evaluate(short, data, passes=passes)
    assert [row["id"] for row in found.rows] == ["r0", "r1", "r2"]
    [(reason, count)] = found.summary["unscorable"].items()
    assert (count, "at most 16 fit" in reason) == (1, True)
    assert found.summary["truncated"] > 0
    with pytest.raises(InputError, match="no pair of completions can be scored: the completion has"):
        evaluate(short, data[3:], passes=passes)


def test_bad_arguments(config, passes, run, capsys):
    with pytest.raises(InputError, match="no pair is labelled"):
        evaluate(config, [replace(one, is_labelled=False) for one in preferences(3)], passes=passes)
    with pytest.raises(ConfigError, match="cdr_share_policy is set"):
        evaluate(replace(config, cdr_share_policy=True), preferences(3), passes=passes)
    for arguments, message in (
        ({"candidates": ["a"]}, "candidates has 'a'. Write STRONG,WEAK"),
        ({"pairs": 0}, "pairs is 0"),
        ({"suggest_labels": -1}, "suggest_labels is -1"),
        ({"on_bad_row": "drop"}, "on_bad_row is 'drop'"),
    ):
        with pytest.raises(ConfigError, match=message):
            EvaluateArguments(["x"], **arguments)
    for arguments, message in (
        (["--data", "nowhere.jsonl"], "no such file exists"),
        (["--data", "allenai/reward-bench"], "input is 'allenai/reward-bench', which can't be read"),
        (["--baseline", "nowhere.json"], "baseline is 'nowhere.json', which can't be read"),
        (["--labels", "nowhere.jsonl"], "no such file exists"),
    ):
        with pytest.raises(SystemExit):
            run(rows(3), *arguments)
        assert message in capsys.readouterr().err


def test_a_candidate_reads_its_own_partner_s_template(config, checkpoints, tmp_path):
    """What is run for a candidate is what is run for the same pair by itself."""
    for role, template in (("strong", BRACKETS), ("weak", None)):
        shutil.copytree(checkpoints[role], tmp_path / role)
        (tmp_path / role / "chat_template.jinja").unlink(missing_ok=True)
        byte_tokenizer(template=template).save_pretrained(tmp_path / role)
    pair = (str(tmp_path / "strong"), str(tmp_path / "weak"))
    evaluate(config, preferences(), passes=Passes(tmp_path / "passes"), pairs=[pair])
    again = Passes(tmp_path / "passes")
    evaluate(replace(config, cdr_strong=pair[0], cdr_weak=pair[1]), preferences(), passes=again)
    assert (again.run, again.found) == (0, 2)


def test_one_word_of_yaml_is_a_list():
    assert EvaluateArguments("a.jsonl", candidates="b,c") == EvaluateArguments(["a.jsonl"], candidates=["b,c"])


def test_the_selftest(capsys, monkeypatch):
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", "--selftest"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.count("  ok\n") == 7
    monkeypatch.setitem(REWARD_BENCH.sections["Chat"], "mt-bench-med", 90)
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", "--selftest"])
    assert stop.value.code == 1
    assert "WRONG" in capsys.readouterr().out


def test_a_figure_of_one_domain(config, passes):
    only = [one for one in preferences() if one.domain == "safety"]
    figure = draw_evaluation(evaluate(config, only, passes=passes).summary)
    assert len(figure.axes) == 1
