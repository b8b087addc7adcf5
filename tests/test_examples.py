"""The examples run as they stand, on the demo's models, and stay short."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM
from trl import ModelConfig, ScriptArguments, TrlParser

from trl_cdr import CDRConfig, CDRReward
from trl_cdr.cli import main
from trl_cdr.demo import world
from trl_cdr.demo.models import build_tokenizer, sample
from trl_cdr.rounds.rounds_arguments import PairsArguments, RoundsArguments
from trl_cdr.training.train import TrainArguments

FOLDER = Path(__file__).parent.parent / "examples"
EXAMPLES = sorted(FOLDER.glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_short(path):
    assert len(path.read_text().splitlines()) <= 80


def run(name, *arguments, cwd):
    command = [sys.executable, str(FOLDER / name), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=cwd).stdout


@pytest.mark.slow
def test_score(tmp_path):
    """The rude completion has the highest log-ratio on some machines, whose models differ; its reward is low on all."""
    *_, right, wrong, rude, preferred = run("01_score.py", "--tiny", cwd=tmp_path).splitlines()
    rewards = [float(line.split()[4]) for line in (right, wrong, rude)]
    assert preferred.startswith("preferred: the answer is ")
    assert min(rewards[:2]) > rewards[2] + 2


@pytest.mark.slow
def test_criteria(tmp_path):
    out = run("03_criteria.py", "--tiny", "--max_steps", "30", "--output_dir", "policy", cwd=tmp_path)
    for name in ("right", "short"):
        [(first, last)] = re.findall(rf"{name}: mean reward of the first log (\S+), of the last (\S+)", out)
        assert float(last) > float(first)


@pytest.mark.slow
def test_online_dpo(tmp_path):
    out = run("02_online_dpo.py", "--tiny", "--max_steps", "30", "--output_dir", "policy", cwd=tmp_path)
    [(first, last)] = re.findall(r"of the first log (\S+), of the last (\S+);", out)
    assert float(last) > float(first)
    assert (tmp_path / "policy" / "model.safetensors").exists()


@pytest.mark.slow
def test_judge(tmp_path):
    out = run("04_judge.py", "--tiny", cwd=tmp_path)
    assert [line.split(";")[0] for line in out.splitlines() if "better:" in line] == ["  better: 0", "  better: 1"]
    assert "best first: the answer is 8 . | " in out


@pytest.mark.slow
def test_grpo(tmp_path):
    out = run("05_grpo.py", "--tiny", "--max_steps", "30", "--output_dir", "policy", cwd=tmp_path)
    [(first, last)] = re.findall(r"of the first log (\S+), of the last (\S+);", out)
    assert float(last) > float(first)
    assert (tmp_path / "policy" / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["simpo", "dpo"])
def test_online_simpo(loss, tmp_path):
    arguments = ["--tiny", "--max_steps", "30", "--output_dir", "policy", "--preference_loss", loss]
    out = run("06_online_simpo.py", *arguments, cwd=tmp_path)
    first, last = (float(word.rstrip(",;")) for word in out.splitlines()[-3].split() if word[:1] in "+-")
    assert last > first
    assert (tmp_path / "policy" / "model.safetensors").exists()


@pytest.mark.slow
def test_annotate(tmp_path):
    out = run("07_annotate.py", "--tiny", cwd=tmp_path)
    right = {side: float(share) for side, share in re.findall(r"share of (\w+) that are right: (\S+)", out)}
    assert right["chosen"] >= 0.85
    assert right["rejected"] <= 0.05
    assert "columns: prompt, chosen, rejected, score_chosen, score_rejected, margin" in out


@pytest.mark.slow
def test_rank_pairs(tmp_path):
    out = run("08_rank_pairs.py", "--tiny", "--output_dir", "ranked", cwd=tmp_path)
    found = json.loads((tmp_path / "ranked" / "rank_pairs.json").read_text())
    assert (len(found["models"]), sum(found["passes"].values())) == (13, 13)
    assert found["spearman"] > 0.8
    strong, weak = re.fullmatch(r"best pair: (\S+) over (\S+), 0.\d+", out.splitlines()[-1]).groups()
    assert found["models"][found["ranking"][0]["strong"]]["performance"] > 0.7
    assert strong > weak or weak == "base"


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is deprecated:FutureWarning")  # TRL's, see test_train
@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.name)
def test_every_yaml_is_read_to_the_last_key(path, tmp_path):
    arguments = ["--config", str(path), "--use_cpu", "--bf16", "False", "--output_dir", str(tmp_path)]
    own, data = (RoundsArguments, PairsArguments) if "rounds" in path.name else (TrainArguments, ScriptArguments)
    first, _ = TrlParser((own,)).parse_args_and_config(arguments, return_remaining_strings=True)
    kinds = (own, data, first.config_class, ModelConfig, CDRConfig)
    *_, model_args, cdr_args, unknown = TrlParser(kinds).parse_args_and_config(arguments, return_remaining_strings=True)
    assert not unknown
    assert CDRReward.from_config(cdr_args).config == cdr_args
    assert model_args.model_name_or_path


@pytest.mark.slow
def test_the_tiny_yaml(tmp_path):
    run("tiny_world.py", cwd=tmp_path)
    command = [sys.executable, "-m", "trl_cdr", "train", "--config", str(FOLDER / "tiny.yaml")]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    state = json.loads((tmp_path / "trl-cdr-tiny" / "out" / "trainer_state.json").read_text())
    rewards = [log["rewards/cdr_reward/mean"] for log in state["log_history"] if "rewards/cdr_reward/mean" in log]
    assert rewards[-1] > rewards[0]
    assert any("eval_rewards/cdr_reward/mean" in log for log in state["log_history"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is deprecated:FutureWarning")  # TRL's, see test_train
def test_rounds_raise_the_gold_reward(tmp_path, monkeypatch):
    """Of prompts that no round had; the pair knows nothing of it."""
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(FOLDER / "tiny_world.py"))
    main(["rounds", "--config", str(FOLDER / "rounds.yaml"), "--disable_tqdm", "True"])
    prompts = [world.conversation(task) for task in world.HELD_OUT]

    def gold(policy):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "trl-cdr-tiny" / policy)
        groups = sample(model, build_tokenizer(), prompts=prompts, per_prompt=1, seed=0)
        return sum(
            world.gold(prompt, one.text, one.finished) for prompt, [one] in zip(prompts, groups, strict=True)
        ) / len(prompts)

    rounds = [gold(f"rounds/round-{number}/policy") for number in (1, 2, 3)]
    assert gold("policy") + 0.05 < rounds[0] < rounds[2]
    assert rounds[2] > gold("policy") + 0.2
