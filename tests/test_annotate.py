"""Preference data sets by a real pair, tiny as it is: what is written, and that killing a run changes nothing."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
from datasets import Dataset, load_dataset
from test_server import host  # noqa: F401 - a fixture
from tiny import TRAINING, answer, chat
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_cdr import CDRConfig, ConfigError, DensityRatioScorer, InputError, Score
from trl_cdr.annotation import annotate as module
from trl_cdr.annotation.annotate import AnnotateArguments, annotate
from trl_cdr.cli import main

PROMPTS = [chat("hello"), "what is this and that?", chat("the quick", "brown fox", "jumps"), "over a lazy dog"]
GROUPS = [
    {"prompt": PROMPTS[0], "completions": ["world", "what is this", "a fox", "a fox"], "domain": "chat"},
    {"prompt": PROMPTS[1], "completions": [answer("the dog"), answer("and that")], "finished": [True, True]},
    {"prompt": PROMPTS[2], "completions": ["over", "a lazy dog", "and this"], "finished": [False, True, None]},
]


@pytest.fixture
def run(tmp_path, checkpoints):
    def run(rows, out="out", *, cdr=None, **options):
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        small = {"shard_size": 2, "batch_size": 2, "num_generations": 3, "max_completion_length": 12}
        arguments = AnnotateArguments(str(path), str(tmp_path / out), **{**small, **options})
        config = CDRConfig(**{f"cdr_{role}": folder for role, folder in checkpoints.items()}, **(cdr or {}))
        return annotate(arguments, config)

    return run


@pytest.fixture
def read(tmp_path):
    def read(out="out"):
        data = load_dataset(str(tmp_path / out), split="train", cache_dir=str(tmp_path / f"cache-{out}"))
        return data.to_list()

    return read


def shards(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("data/*"))}


def test_completions_that_are_there(run, read, checkpoints):
    summary = run(GROUPS, cdr={"cdr_gate": "none"})
    assert (summary["rows"], summary["completions"], summary["cut_off"]) == (3, 9, 1)
    rows = read()
    assert [row["row"] for row in rows] == [0, 1, 2]
    scorer = DensityRatioScorer(**checkpoints, gate="none")
    for row, given in zip(rows, GROUPS, strict=True):
        prompt = chat(given["prompt"]) if isinstance(given["prompt"], str) else given["prompt"]
        texts = [one if isinstance(one, str) else one[0]["content"] for one in given["completions"]]
        finished = given.get("finished", [True] * len(texts))
        scores = scorer.score([prompt] * len(texts), texts, finished=finished)
        assert row["prompt"] == prompt
        assert row["scores"] == row["rewards"] == pytest.approx([score.value for score in scores], abs=1e-4)
        assert row["n_tokens"] == [score.n_tokens for score in scores]
        assert row["finished"] == finished
        whole = [place for place in range(len(texts)) if finished[place] is not False]
        best, worst = (choose(whole, key=row["scores"].__getitem__) for choose in (max, min))
        assert (row["chosen"], row["rejected"]) == (answer(texts[best]), answer(texts[worst]))
        assert (
            row["margin"] == row["score_chosen"] - row["score_rejected"] == row["scores"][best] - row["scores"][worst]
        )
    assert [row["domain"] for row in rows] == ["chat", None, None]


def test_the_gate_decides(run, read, monkeypatch):
    """A completion that is gated loses to those of a lower score, and is rejected."""

    def score(self, prompts, completions, **options):
        values = {"world": 3.0, "what is this": 1.0, "a fox": 2.0}
        return [Score(values[text], n_tokens=1, gated=text == "world") for text in completions]

    monkeypatch.setattr(DensityRatioScorer, "score", score)
    run(GROUPS[:1])
    [row] = read()
    assert (row["chosen"], row["rejected"]) == (answer("a fox"), answer("world"))
    assert (row["score_chosen"], row["score_rejected"], row["margin"]) == (2.0, 3.0, 3.0)
    assert (row["scores"], row["rewards"]) == ([3.0, 1.0, 2.0, 2.0], [-1.0, 1.0, 2.0, 2.0])


@pytest.mark.compat
def test_a_policy_writes_what_is_missing(run, read, quick):
    rows = [{"prompt": prompt} for prompt in PROMPTS]
    rows[1] = GROUPS[1]
    summary = run(rows, policy=quick, pair_strategy="all_pairs", cdr={"cdr_gate": "none"})
    assert (summary["rows"], summary["completions"]) == (4, 3 * 3 + 2)
    written = read()
    assert {len(row["scores"]) for row in written if row["row"] != 1} == {3}
    assert next(row["chosen"] for row in written if row["row"] == 1) in GROUPS[1]["completions"]


def test_a_row_is_written_as_if_alone(run, read, quick):
    rows = [{"prompt": prompt} for prompt in PROMPTS]
    shown = ("row", "chosen", "rejected", "finished")
    run(rows, policy=quick)
    for out, options in (("a", {"batch_size": 4, "shard_size": 4}), ("b", {"batch_size": 1, "shard_size": 3})):
        run(rows, out, policy=quick, **options)
        assert [[row[name] for name in shown] for row in read(out)] == [[row[name] for name in shown] for row in read()]
    run(rows, "c", policy=quick, seed=1)
    assert [row["chosen"] for row in read("c")] != [row["chosen"] for row in read()]


def test_a_stopped_run_ends_with_the_bytes_of_an_uninterrupted_one(run, quick, tmp_path, monkeypatch):
    rows = [{"prompt": prompt} for prompt in PROMPTS] * 2
    run(rows, "whole", policy=quick)
    real, calls = module.label_rows, []

    def stopping(rows, **options):
        calls.append(rows)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(rows, **options)

    monkeypatch.setattr(module, "label_rows", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(rows, policy=quick)
    assert len(shards(tmp_path / "out")) == 2
    run(rows, policy=quick)
    assert shards(tmp_path / "out") == shards(tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "holds scores with seed=0, and now it is 1"),
        ({"min_margin": 0.5}, "holds scores with min_margin=0.0, and now it is 0.5"),
        ({"pair_strategy": "all_pairs"}, "pair_strategy='best_worst', and now it is 'all_pairs'"),
        ({"num_generations": 4}, "num_generations=3, and now it is 4"),
        ({"policy": "strong"}, "holds scores with policy_identity='sha256 .*', and now it is 'sha256 "),
        ({"cdr": {"cdr_gate": "none"}}, "cdr_gate='surprise', and now it is 'none'"),
    ],
)
def test_a_run_that_changed_is_refused(change, message, run, quick, checkpoints, monkeypatch):
    rows = [{"prompt": prompt} for prompt in PROMPTS]
    run(rows, policy=quick, shard="0/2")
    change = {name: checkpoints[value] if name == "policy" else value for name, value in change.items()}
    monkeypatch.setattr(module, "loaded_options", None)  # refused before anything is loaded
    with pytest.raises(ConfigError, match=message):
        run(rows, **{"policy": quick, **change})


def test_another_policy_under_the_same_path(run, quick, checkpoints, tmp_path):
    policy = shutil.copytree(quick, tmp_path / "policy")
    rows = [{"prompt": prompt} for prompt in PROMPTS]
    run(rows, policy=str(policy), shard="0/2")
    shutil.copy(tmp_path / checkpoints["strong"] / "model.safetensors", policy)
    with pytest.raises(ConfigError, match="holds scores with policy_identity='sha256 "):
        run(rows, policy=str(policy))


def test_completions_from_a_server(run, read, host, tmp_path):  # noqa: F811
    rows = [{"prompt": prompt} for prompt in PROMPTS[:2]]
    summary = run(rows, policy="m", server=host.url)
    assert summary["completions"] == 6
    assert {body["seed"] for _, _, body in host.asked} == {body["seed"] for _, _, body in host.asked[:6]}
    for row in read():
        assert row["chosen"][0]["content"].startswith(row["prompt"][-1]["content"])
    options = json.loads((tmp_path / "out" / "options.json").read_text())
    assert (options["policy"], options["server"]) == ("m", host.url)
    with pytest.raises(InputError, match="rows.jsonl:2 has a prompt that the policy can't take"):
        run([rows[0], {"prompt": "400"}], "other", policy="m", server=host.url)
    summary = run([rows[0], {"prompt": "400"}], "other", policy="m", server=host.url, on_bad_row="skip")
    assert summary["bad_rows"]["count"] == 1


def test_rows_from_memory(checkpoints, tmp_path, read):
    arguments = AnnotateArguments("mine", str(tmp_path / "out"))
    config = CDRConfig(checkpoints["strong"], checkpoints["weak"], cdr_gate="none")
    assert annotate(arguments, config, data=Dataset.from_list(GROUPS[2:]))["pairs"] == 1
    assert read()[0]["prompt"] == PROMPTS[2]
    assert "# mine, labelled" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_domains_of_the_router(run, read, tmp_path):
    criteria = tmp_path / "criteria.toml"
    criteria.write_text('[quick]\ninstruction = "be quick"\n[plain]\n')
    rows = [{**GROUPS[0], "kind": kind} for kind in ("quick", "plain")]
    cdr = {"cdr_criteria": str(criteria), "cdr_router": "column:kind"}
    summary = run(rows, cdr=cdr)
    assert [row["domain"] for row in read()] == ["quick", "plain"]
    assert list(summary["domains"]) == ["plain", "quick"]
    assert f"sha256 {json.loads((tmp_path / 'out' / 'options.json').read_text())['criteria_sha256']}" in (
        tmp_path / "out" / "README.md"
    ).read_text(encoding="utf-8")
    with pytest.raises(InputError, match="router is 'column:kind', and .* has only: prompt, completions, finished"):
        run(GROUPS[2:], "other", cdr=cdr)


@pytest.mark.compat
def test_the_command(tmp_path, checkpoints, capsys, read):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(map(json.dumps, [*GROUPS, {"prompt": "a", "completions": ["b"]}])))
    config = tmp_path / "run.yaml"
    config.write_text(f"input: {rows}\ncdr_strong: {checkpoints['strong']}\ncdr_weak: {checkpoints['weak']}\n")
    command = ["annotate", "--config", str(config), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 2
    assert "rows.jsonl:4 has 1 of the two completions that a pair needs" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    main([*command, "--on_bad_row", "skip", "--pair_strategy", "all_pairs", "--cdr_gate", "none"])
    printed = capsys.readouterr().out
    assert f"left out: {rows}:4 has 1 of the two completions" in printed
    assert f"written to  {tmp_path / 'out'}" in printed
    assert len(read()) > 3
    with pytest.raises(SystemExit):
        main(["annotate", "--help"])
    assert "--num_generations INT" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"server": "http://a"}, "and policy is missing"),
        ({"num_generations": 1}, "num_generations is 1: a pair needs two"),
        ({"max_completion_length": 0}, "max_completion_length is 0"),
        ({"max_completion_length": 20.0}, "max_completion_length is 20.0. Use a whole number"),
        ({"num_generations": "8"}, "num_generations is '8'. Use a whole number"),
        ({"temperature": 0}, "temperature is 0"),
        ({"min_margin": -1}, "min_margin is -1"),
        ({"pair_strategy": "best"}, "pair_strategy is 'best'. Use one of: "),
    ],
)
def test_arguments(options, message):
    with pytest.raises(ConfigError, match=message):
        AnnotateArguments("a", **options)


# `trl-cdr annotate` in a process that is killed when it comes to its n-th batch.
KILLED = """
import os, signal, sys
from trl_cdr.annotation import annotate
from trl_cdr.cli import main

real, batches, last = annotate.label_rows, [], int(sys.argv.pop())

def label_rows(*args, **kwargs):
    batches.append(args)
    if len(batches) == last:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)

annotate.label_rows = label_rows
main()
"""


@pytest.mark.slow
def test_kill_minus_nine(tmp_path, checkpoints, quick):
    """Generation included."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in PROMPTS * 3))
    command = ["annotate", "--input", str(rows), "--shard_size", "4", "--batch_size", "2", "--num_generations", "2"]
    command += ["--max_completion_length", "12", "--policy", quick]
    for role, folder in checkpoints.items():
        command += [f"--cdr_{role}", folder]
    main([*command, "--output_dir", str(tmp_path / "whole")])
    command += ["--output_dir", str(tmp_path / "out")]
    there = []
    for batch in (4, 2):  # inside of the second shard, and again
        killed = [sys.executable, "-c", KILLED, *command, str(batch)]
        assert subprocess.run(killed, capture_output=True, env=dict(os.environ)).returncode == -signal.SIGKILL
        there.append(len(shards(tmp_path / "out")))
    assert there == [1, 1]
    main(command)
    assert shards(tmp_path / "out") == shards(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*trl.experimental")
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is deprecated:FutureWarning")  # TRL's, see test_train
@pytest.mark.parametrize("name", ["cpo", "dpo"])
def test_trl_trains_on_it_as_it_is(name, run, checkpoints, tmp_path):
    run(GROUPS * 4, cdr={"cdr_gate": "none"})
    data = load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    if name == "cpo":
        from trl.experimental.cpo import CPOConfig as Config
        from trl.experimental.cpo import CPOTrainer as Trainer

        options = {"loss_type": "simpo", "cpo_alpha": 0.0}
    else:
        from trl import DPOConfig as Config
        from trl import DPOTrainer as Trainer

        options = {}
    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(checkpoints["weak"]),
        args=Config(
            str(tmp_path / "trained"),
            per_device_train_batch_size=4,
            max_steps=6,
            learning_rate=1e-2,
            logging_steps=1,
            save_strategy="no",
            **options,
            **TRAINING,
        ),
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(checkpoints["weak"]),
    )
    trainer.train()
    margins = [log["rewards/margins"] for log in trainer.state.log_history if "rewards/margins" in log]
    assert margins[-1] > margins[0]
