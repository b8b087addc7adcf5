"""The callback in TRL's trainers: what it logs, writes and refuses."""

import json

import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from tiny import TRAINING, chat, llama
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

from trl_cdr import CDRCallback, CDRReward, ConfigError, Criteria, DomainCriteria

pytestmark = [
    pytest.mark.compat,
    # TRL's configs set gradient_checkpointing, which transformers 5 renamed; drop when TRL follows
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is deprecated:FutureWarning"),
]
COMMON = {
    "per_device_train_batch_size": 4,
    "max_steps": 4,
    **TRAINING,
    "save_strategy": "steps",
    "save_steps": 2,
    "logging_steps": 2,
}
CRITERIA = Criteria({"quick": DomainCriteria("be quick"), "plain": DomainCriteria()})
METRICS = {"strong_logps", "weak_logps", "log_ratio_std", "tokens", "truncated", "unscorable", "seconds", "gated"}
METRICS |= {"typicality", "ties", "distinct_tokens", "length_correlation", "strong_logps_per_token"}


class Integration(TrainerCallback):
    """Stands where a reporting integration does: before every callback that a user adds."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


@pytest.fixture
def reward(checkpoints):
    return CDRReward(checkpoints["strong"], checkpoints["weak"], criteria=CRITERIA, router="column:kind")


def make(name, tmp_path, reward, tokenizer, policy=None, **options):
    policy = policy if policy is not None else llama(len(tokenizer), seed=2)
    policy.config.eos_token_id = policy.generation_config.eos_token_id = tokenizer.eos_token_id
    policy.generation_config.pad_token_id = tokenizer.pad_token_id
    words = ["hello", "what is this", "the quick brown fox", "a lazy dog"] * 4
    data = Dataset.from_dict({"prompt": [chat(word) for word in words], "kind": ["quick", "plain"] * 8})
    kwargs = {"model": policy, "processing_class": tokenizer, "reward_funcs": reward, "train_dataset": data}
    kwargs["callbacks"] = [integration := Integration()]
    options = {**COMMON, **options}
    if name == "online_dpo":
        trainer = OnlineDPOTrainer(args=OnlineDPOConfig(str(tmp_path), max_new_tokens=8, **options), **kwargs)
    else:
        args = GRPOConfig(str(tmp_path), max_completion_length=8, num_generations=2, beta=0.0, **options)
        trainer = GRPOTrainer(args=args, **kwargs)
    return trainer, integration


def loss_logs(logs):
    return [entry for entry in logs if "loss" in entry]


@pytest.mark.parametrize("name", ["online_dpo", "grpo"])
def test_every_log_holds_the_metrics(name, tmp_path, reward, tokenizer):
    trainer, integration = make(name, tmp_path, reward, tokenizer)
    trainer.add_callback(CDRCallback(reward, trainer))
    trainer.train()
    expected = {f"cdr/{key}" for key in METRICS} | {"cdr/step_share", "cdr/rewards/quick", "cdr/rewards/plain"}
    for logs in (trainer.state.log_history, integration.logs):
        assert len(loss_logs(logs)) == 2
        for entry in loss_logs(logs):
            assert expected <= set(entry)
            assert 0 < entry["cdr/step_share"] < 1
    last, seen = loss_logs(trainer.state.log_history)[-1], loss_logs(integration.logs)[-1]
    assert {key: last[key] for key in expected} == {key: seen[key] for key in expected}


def test_a_log_is_the_mean_of_its_calls(tmp_path, reward, tokenizer):
    trainer, _ = make("online_dpo", tmp_path, reward, tokenizer)
    trainer.add_callback(CDRCallback(reward, trainer))
    calls = []
    reward.observe(calls.append)
    trainer.train()
    first = loss_logs(trainer.state.log_history)[0]
    scores = [score for call in calls[:2] for score in call.scores]
    assert first["cdr/gated"] == pytest.approx(sum(score.gated for score in scores) / len(scores))
    quick = [
        reward
        for call in calls[:2]
        for score, reward in zip(call.scores, call.rewards, strict=True)
        if score.domain == "quick"
    ]
    assert first["cdr/rewards/quick"] == pytest.approx(sum(quick) / len(quick))


def test_tensorboard_sees_them(tmp_path, reward, tokenizer):
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer, _ = make("online_dpo", tmp_path, reward, tokenizer, report_to="tensorboard")
    trainer.add_callback(CDRCallback(reward, trainer))
    trainer.train()
    [events] = {path.parent for path in tmp_path.rglob("events.out.tfevents*")}
    accumulator = EventAccumulator(str(events)).Reload()
    assert [event.step for event in accumulator.Scalars("train/cdr/strong_logps")] == [2, 4]


def test_checkpoints_say_what_labelled(tmp_path, reward, tokenizer, checkpoints):
    trainer, _ = make("grpo", tmp_path, reward, tokenizer)
    trainer.add_callback(CDRCallback(reward))
    trainer.train()
    for step in (2, 4):
        written = json.loads((tmp_path / f"checkpoint-{step}" / "cdr_labeling.json").read_text())
        assert written["config"]["cdr_strong"] == checkpoints["strong"]
        assert written["models"]["weak"]["way"] == "packed"
        assert len(written["criteria_sha256"]) == 64
        assert {"trl", "transformers", "torch", "trl-cdr"} <= set(written["versions"])


def test_the_completions_of_online_dpo(tmp_path, reward, tokenizer, capsys):
    trainer, _ = make("online_dpo", tmp_path, reward, tokenizer)
    trainer.add_callback(CDRCallback(reward, trainer, log_completions=True))
    trainer.train()
    files = sorted((tmp_path / "completions").iterdir())
    assert [path.name for path in files] == ["completions_00002.parquet", "completions_00004.parquet"]
    rows = pq.read_table(files[0]).to_pylist()
    assert len(rows) == 2 * 8
    assert {"prompt", "completion", "reward", "log_ratio", "typicality", "domain"} <= set(rows[0])
    assert "Step 4" in capsys.readouterr().out


def test_the_pair_is_there_before_the_first_step(tmp_path, reward, tokenizer):
    loaded = []

    class Look(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            loaded.append(reward.scorer._source._pair is not None)

    trainer, _ = make("grpo", tmp_path, reward, tokenizer, max_steps=1)
    trainer.add_callback(CDRCallback(reward))
    trainer.add_callback(Look())
    trainer.train()
    assert loaded == [True]


def test_what_it_refuses(tmp_path, reward, checkpoints, tokenizer):
    with pytest.raises(ConfigError, match="reward is a str. Pass the CDRReward"):
        CDRCallback("reward")
    trainer, _ = make("online_dpo", tmp_path, reward, tokenizer)
    trainer.add_callback(CDRCallback(reward))
    with pytest.raises(ConfigError, match=r"trainer is missing, and online DPO .* Pass CDRCallback\(reward, trainer\)"):
        trainer.train()
    other = CDRReward(checkpoints["strong"], checkpoints["weak"])
    trainer, _ = make("grpo", tmp_path, reward, tokenizer)
    trainer.add_callback(CDRCallback(other, trainer))
    with pytest.raises(ConfigError, match="the trainer does not use cdr_reward"):
        trainer.train()


def test_two_rewards_of_one_name_are_refused(tmp_path, reward, checkpoints, tokenizer):
    other = CDRReward(checkpoints["strong"], checkpoints["weak"])
    trainer, _ = make("grpo", tmp_path, [reward, other], tokenizer)
    trainer.add_callback(CDRCallback(reward, trainer))
    with pytest.raises(ConfigError, match="2 of the trainer's rewards are called cdr_reward"):
        trainer.train()


def test_a_policy_that_scores_itself_is_refused(tmp_path, tokenizer, weak):
    policy = llama(len(tokenizer), seed=2)
    reward = CDRReward(policy, weak, strong_tokenizer=tokenizer, weak_tokenizer=tokenizer)
    trainer, _ = make("grpo", tmp_path, reward, tokenizer, policy)
    trainer.add_callback(CDRCallback(reward))
    with pytest.raises(ConfigError, match="the policy is one of the models that cdr_reward scores with"):
        trainer.train()
