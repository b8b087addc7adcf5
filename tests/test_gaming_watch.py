"""A policy that games its reward, in real trainers whose scores are made to say so: warned of, stopped, resumed."""

import json
import logging
from dataclasses import replace

import pytest
from datasets import Dataset
from ranks import Run, launch
from tiny import TRAINING, chat, llama
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

from trl_cdr import CDRCallback, CDRReward, Criteria, DomainCriteria, OnlinePreferenceConfig, OnlinePreferenceTrainer
from trl_cdr.scoring.score import Score
from trl_cdr.training.audit import audit
from trl_cdr.training.gaming_watch import paid_best
from trl_cdr.training.metrics import Call

# TRL's configs set gradient_checkpointing, which transformers 5 renamed; drop when TRL follows
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is deprecated:FutureWarning")
COMMON = {
    "per_device_train_batch_size": 4,
    "max_steps": 15,
    "logging_steps": 1,
    "save_strategy": "no",
    "learning_rate": 1e-3,
    **TRAINING,
}
ALARM = 13  # ten first steps, and three logs that say it


class Drifting(CDRReward):
    """From the eleventh step on, the strong model finds each token rarer by five nats, and the weak one by six."""

    def __call__(self, *args, trainer_state, **kwargs):
        is_far, score = trainer_state.global_step >= 10, self.scorer.score

        def scored(*rows, **options):
            return [self._move(one, 5.0 * is_far) for one in score(*rows, **options)]

        self.scorer.score = scored
        try:
            return super().__call__(*args, trainer_state=trainer_state, **kwargs)
        finally:
            self.scorer.score = score

    def _move(self, score, nats):
        strong, weak = (-score.n_tokens * (1.0 + part * nats) for part in (1.0, 1.2))
        return replace(score, strong_logps=strong, weak_logps=weak, value=strong - weak)


class Integration(TrainerCallback):
    """Stands where a reporting integration does: before every callback that a user adds."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def run(name, folder, checkpoints, tokenizer, *, on_gaming="warn", resume=None, **options):
    policy = llama(len(tokenizer), seed=2)
    policy.config.eos_token_id = policy.generation_config.eos_token_id = tokenizer.eos_token_id
    policy.generation_config.pad_token_id = tokenizer.pad_token_id
    words = ["hello", "what is this", "the quick brown fox", "a lazy dog"] * 16
    reward = Drifting(checkpoints["strong"], checkpoints["weak"], gate="none", on_gaming=on_gaming)
    integration = Integration()
    kwargs = {
        "model": policy,
        "processing_class": tokenizer,
        "reward_funcs": reward,
        "train_dataset": Dataset.from_dict({"prompt": [chat(word) for word in words]}),
        "callbacks": [integration],
    }
    options = {**COMMON, **options}
    if name == "online_dpo":
        trainer = OnlineDPOTrainer(args=OnlineDPOConfig(str(folder), max_new_tokens=4, **options), **kwargs)
    else:
        config, kind = {
            "grpo": (GRPOConfig, GRPOTrainer),
            "rloo": (RLOOConfig, RLOOTrainer),
            "online_preference": (OnlinePreferenceConfig, OnlinePreferenceTrainer),
        }[name]
        own = {"beta": 0.0} if name in ("grpo", "rloo") else {}
        args = config(str(folder), max_completion_length=4, num_generations=2, **own, **options)
        trainer = kind(args=args, **kwargs)
    trainer.add_callback(CDRCallback(reward, trainer))
    trainer.train(resume_from_checkpoint=resume and str(resume))
    return trainer, integration


def alarms(logs):
    return [entry["cdr/alarm"] for entry in logs if "cdr/alarm" in entry]


def warnings_in(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "trl_cdr.training.gaming_watch"]


@pytest.mark.compat
@pytest.mark.parametrize("name", ["online_dpo", "grpo", "rloo", "online_preference"])
def test_an_alarm_is_said_once(name, tmp_path, checkpoints, tokenizer, caplog):
    trainer, integration = run(name, tmp_path, checkpoints, tokenizer)
    assert trainer.state.global_step == 15
    expected = [float(step >= ALARM) for step in range(1, 16)]
    assert alarms(trainer.state.log_history) == alarms(integration.logs) == expected
    [said] = warnings_in(caplog)
    assert "\n" not in said
    assert f"cdr_reward: the policy may be gaming the reward. Step {ALARM}: " in said
    assert "costs the strong model 2.50 nats (1.00 in the first steps)" in said
    assert said.count(" nats, to ") == 3
    assert "pass cdr_gate='surprise'" in said
    assert "Training ends" not in said


@pytest.mark.compat
@pytest.mark.parametrize("name", ["online_dpo", "grpo", "rloo", "online_preference"])
def test_stop_leaves_a_checkpoint_and_ends(name, tmp_path, checkpoints, tokenizer, caplog):
    trainer, _ = run(name, tmp_path, checkpoints, tokenizer, on_gaming="stop")
    assert trainer.state.global_step == ALARM
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{ALARM}"]
    kept = json.loads((tmp_path / f"checkpoint-{ALARM}" / "trainer_state.json").read_text())
    assert alarms(kept["log_history"])[-2:] == [0.0, 1.0]
    [said] = warnings_in(caplog)
    assert said.endswith("Training ends here, with a checkpoint.")
    alarm = audit(tmp_path).monitors["cdr"].alarm  # of what the trainer left
    assert alarm.step == ALARM
    assert alarm.reason in said
    # Who reads the completions and goes on has decided: no second alarm.
    caplog.clear()
    trainer, _ = run(name, tmp_path, checkpoints, tokenizer, on_gaming="stop", resume=tmp_path / f"checkpoint-{ALARM}")
    assert trainer.state.global_step == 15
    assert alarms(trainer.state.log_history)[-2:] == [1.0, 1.0]
    assert warnings_in(caplog) == []


def test_off_says_and_logs_nothing(tmp_path, checkpoints, tokenizer, caplog):
    trainer, _ = run("online_dpo", tmp_path, checkpoints, tokenizer, on_gaming="off")
    assert trainer.state.global_step == 15
    assert alarms(trainer.state.log_history) == warnings_in(caplog) == []


@pytest.mark.parametrize("name", ["online_dpo", "grpo"])
def test_a_resumed_run_equals_an_uninterrupted_one(name, tmp_path, checkpoints, tokenizer, caplog):
    saved = {"save_strategy": "steps", "save_steps": 11}
    whole, _ = run(name, tmp_path, checkpoints, tokenizer, **saved)
    [said] = warnings_in(caplog)
    caplog.clear()
    resumed, _ = run(name, tmp_path / "r", checkpoints, tokenizer, resume=tmp_path / "checkpoint-11", **saved)
    assert alarms(resumed.state.log_history) == alarms(whole.state.log_history)
    assert warnings_in(caplog) == [said]


@pytest.mark.parametrize("name", ["online_dpo", "grpo"])
def test_under_gradient_accumulation(name, tmp_path, checkpoints, tokenizer):
    trainer, _ = run(name, tmp_path, checkpoints, tokenizer, on_gaming="stop", gradient_accumulation_steps=2)
    assert trainer.state.global_step == ALARM


def test_logs_that_are_further_apart(tmp_path, checkpoints, tokenizer):
    trainer, _ = run("online_dpo", tmp_path, checkpoints, tokenizer, logging_steps=2, max_steps=16)
    assert alarms(trainer.state.log_history) == [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0]


def test_without_the_trainer(tmp_path, checkpoints, tokenizer, caplog):
    """GRPO logs a reward's metrics by itself."""
    policy = llama(len(tokenizer), seed=2)
    policy.config.eos_token_id = policy.generation_config.eos_token_id = tokenizer.eos_token_id
    policy.generation_config.pad_token_id = tokenizer.pad_token_id
    reward = Drifting(checkpoints["strong"], checkpoints["weak"], gate="surprise", on_gaming="stop", name="pair")
    args = GRPOConfig(str(tmp_path), max_completion_length=4, num_generations=2, beta=0.0, **COMMON)
    data = Dataset.from_dict({"prompt": [chat("hello"), chat("what is this")] * 32})
    trainer = GRPOTrainer(model=policy, args=args, reward_funcs=reward, processing_class=tokenizer, train_dataset=data)
    trainer.add_callback(CDRCallback(reward))
    trainer.train()
    assert trainer.state.global_step == ALARM
    assert trainer.state.log_history[-2]["pair/alarm"] == 1.0
    [said] = warnings_in(caplog)
    assert said.startswith("pair_reward: ")
    assert "cdr_gate" not in said
    assert reward._observers == []


@pytest.mark.parametrize("name", ["grpo", "online_preference"])
def test_early_unscorable_prompts_raise_no_alarm(name, tmp_path, checkpoints, tokenizer):
    """Of a policy that does not change: half of the first 20 steps have nothing to score, and all later steps have."""
    policy = llama(len(tokenizer), seed=2)
    policy.config.eos_token_id = policy.generation_config.eos_token_id = tokenizer.eos_token_id
    policy.generation_config.pad_token_id = tokenizer.pad_token_id

    def router(prompt):
        return "unknown" if prompt[-1]["content"].startswith("foreign") else "known"

    criteria = Criteria({"known": DomainCriteria("be quick")})
    pair = checkpoints["strong"], checkpoints["weak"]
    reward = CDRReward(*pair, gate="none", on_gaming="stop", criteria=criteria, router=router)
    config, kind = {
        "grpo": (GRPOConfig, GRPOTrainer),
        "online_preference": (OnlinePreferenceConfig, OnlinePreferenceTrainer),
    }[name]
    options = {**COMMON, "learning_rate": 0.0, "max_steps": 40, "logging_steps": 2, "per_device_train_batch_size": 2}
    own = {"beta": 0.0} if name == "grpo" else {}
    options |= {"max_completion_length": 4, "num_generations": 2, "shuffle_dataset": False, **own}
    prompts = [*["foreign", "hello"] * 10, *["hello"] * 20]
    data = Dataset.from_dict({"prompt": [chat(prompt) for prompt in prompts]})
    args = config(str(tmp_path), **options)
    trainer = kind(model=policy, args=args, reward_funcs=reward, processing_class=tokenizer, train_dataset=data)
    trainer.add_callback(CDRCallback(reward, trainer))
    trainer.train()
    assert trainer.state.global_step == 40
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["cdr/unscorable"] for entry in logs] == [0.5] * 10 + [0.0] * 10
    early, late = ([entry["cdr/strong_logps_per_token"] for entry in part] for part in (logs[:10], logs[10:]))
    assert abs(sum(early) - sum(late)) / 10 < 1.0  # one policy


def test_which_completions_are_shown():
    texts = ["a", "b", "b", "c", "d", "e"]
    rewards = [0.5, 2.0, 3.0, None, 1.0, -1.0]
    call = Call(["p"] * 6, texts, [["t"]] * 6, [Score(value=0.0)] * 6, rewards, 0.0)
    assert paid_best(call) == ["'b' (+3.00 nats, to 'p')", "'d' (+1.00 nats, to 'p')", "'a' (+0.50 nats, to 'p')"]
    long = Call([chat("x" * 500)], [chat("y\n" * 500)], [["t"]], [Score(value=0.0)], [1.0], 0.0)
    [shown] = paid_best(long)
    assert len(shown) < 900
    assert "\n" not in shown
    assert paid_best(None) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["online_dpo", "grpo"])
def test_two_processes_decide_alike(name, tmp_path, checkpoints, tokenizer):
    """Though on one of them alone there is nothing to see, and both have to save."""
    llama(len(tokenizer), seed=2).save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    folders = [checkpoints["strong"], checkpoints["weak"], str(tmp_path / "policy"), str(tmp_path)]
    [ranks] = launch(Run("two_ranks_gaming.py", [name, *folders]))
    assert [rank["steps"] for rank in ranks] == [ALARM, ALARM]
    assert [len(rank["said"]) for rank in ranks] == [1, 0]  # the main process speaks
    assert ranks[0]["alarms"] == ranks[1]["alarms"] == [0.0] * (ALARM - 1) + [1.0]
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{ALARM}"]


@pytest.fixture(autouse=True)
def _level(caplog):
    caplog.set_level(logging.WARNING, logger="trl_cdr.training.gaming_watch")
