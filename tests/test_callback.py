"""The callback in TRL's trainers: what it logs, writes and refuses."""

import copy
import gc
import json
import statistics
import weakref

import peft
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from ranks import Run, launch
from tiny import TRAINING, byte_tokenizer, chat, llama
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
METRICS |= {"surprise", "survival", "ties", "distinct_tokens", "strong_logps_per_token"}


class Integration(TrainerCallback):
    """Stands where a reporting integration does: before every callback that a user adds."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


@pytest.fixture
def reward(checkpoints):
    return CDRReward(checkpoints["strong"], checkpoints["weak"], criteria=CRITERIA, router="column:kind")


def make(name, tmp_path, reward, tokenizer, policy=None, peft_config=None, **options):
    policy = policy if policy is not None else llama(len(tokenizer), seed=2)
    policy.config.eos_token_id = policy.generation_config.eos_token_id = tokenizer.eos_token_id
    policy.generation_config.pad_token_id = tokenizer.pad_token_id
    words = ["hello", "what is this", "the quick brown fox", "a lazy dog"] * 4
    data = Dataset.from_dict({"prompt": [chat(word) for word in words], "kind": ["quick", "plain"] * 8})
    kwargs = {"model": policy, "processing_class": tokenizer, "reward_funcs": reward, "train_dataset": data}
    kwargs |= {"callbacks": [integration := Integration()], "peft_config": peft_config}
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


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_only_the_trainers_own_logs_hold_them(strategy, tmp_path, reward, tokenizer):
    """Other callbacks log what they like, when they like; the values wait for the log of the steps that they are of."""

    class Logs(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            trainer.log({"mine": 1.0})

    trainer, _ = make("online_dpo", tmp_path, reward, tokenizer, logging_strategy=strategy, eval_strategy="no")
    trainer.add_callback(CDRCallback(reward, trainer))
    trainer.add_callback(Logs())
    calls = []
    reward.observe(calls.append)
    trainer.train()
    last = loss_logs(trainer.state.log_history)[-1]
    steps = 2 if strategy == "steps" else 4
    scores = [score for call in calls[-steps:] for score in call.scores]
    assert last["cdr/strong_logps"] == pytest.approx(sum(score.strong_logps for score in scores) / len(scores))
    others = [entry for entry in trainer.state.log_history if "loss" not in entry]
    assert len(others) == 4 + 1  # the last is train_runtime's
    assert not any(key.startswith("cdr/") for entry in others for key in entry)


@pytest.mark.parametrize("prefix", ["train_x", "eval_x"])
@pytest.mark.parametrize("name", ["online_dpo", "grpo"])
def test_no_name_loses_metrics(name, prefix, tmp_path, checkpoints, tokenizer):
    """Names that look like the prefixes of evaluation and of the run's end."""
    reward = CDRReward(checkpoints["strong"], checkpoints["weak"], criteria=CRITERIA, router="column:kind", name=prefix)
    trainer, integration = make(name, tmp_path, reward, tokenizer, save_strategy="no")
    trainer.add_callback(CDRCallback(reward, trainer))
    trainer.train()
    expected = {f"{prefix}/{key}" for key in METRICS | {"step_share", "rewards/quick", "rewards/plain"}}
    assert len(loss_logs(integration.logs)) == 2
    assert all(expected <= set(entry) for entry in loss_logs(integration.logs))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "processes", "silent"),
    [
        ("online_dpo", 2, "no"),
        ("grpo", 4, "yes"),
        ("online_preference", 2, "yes"),
    ],
)
def test_processes_log_what_all_counted(name, processes, silent, tmp_path, checkpoints):
    """Also if one process has nothing to score. None waits for another if one of them logs alone."""
    policy_tokenizer = byte_tokenizer(280)
    llama(len(policy_tokenizer), seed=2).save_pretrained(tmp_path / "policy")
    pair = [checkpoints["strong"], checkpoints["weak"]]
    arguments = [name, *pair, str(tmp_path / "policy"), str(tmp_path), silent]
    [ranks] = launch(Run("ranks_callback.py", arguments, processes))
    assert [rank["processes"] for rank in ranks] == [processes] * processes
    logs = loss_logs(ranks[0]["logs"])
    assert len(logs) == 2
    assert sum("mine" in entry for entry in ranks[0]["logs"]) == 5
    for number, entry in enumerate(logs):
        calls = [rank["calls"][2 * number : 2 * number + 2] for rank in ranks]
        rows = [row for rank in calls for _, scores, rewards in rank for row in zip(scores, rewards, strict=True)]
        scored = [score for score, _ in rows if score.value is not None]
        assert 0 < len(scored) < len(rows)
        quick = [reward for score, reward in rows if score.domain == "quick" and score.value is not None]
        assert entry["cdr/rewards/quick"] == pytest.approx(statistics.fmean(quick))
        ticks = range(processes)  # in seconds a call takes 0.25 (rank + 1), a step 1 + 3 rank
        share = sum(0.25 * (rank + 1) for rank in ticks) / sum(1 + 3 * rank for rank in ticks)
        assert entry["cdr/step_share"] == pytest.approx(share)
        assert entry["cdr/strong_logps"] == pytest.approx(statistics.fmean(score.strong_logps for score in scored))
        per_token = sum(score.strong_logps for score in scored) / sum(score.n_tokens for score in scored)
        assert entry["cdr/strong_logps_per_token"] == pytest.approx(per_token)
        assert entry["cdr/unscorable"] == pytest.approx(1 - len(scored) / len(rows))
        assert entry["cdr/seconds"] == pytest.approx(statistics.fmean(0.25 * (rank + 1) for rank in ticks))
    sizes = [
        tuple(sum(score.value is not None for score in scores) for _, scores, _ in rank["calls"]) for rank in ranks
    ]
    assert len(set(sizes)) > 1  # the processes counted unlike
    if silent == "yes":
        assert set(sizes[-1]) == {0}
    ended = set()
    for rank in ranks:
        for tokens, scores, _ in rank["calls"]:
            for row, score in zip(tokens, scores, strict=True):
                ended.add(score.finished)
                assert score.finished == (policy_tokenizer.eos_token_id in row)
    assert ended == {True, False}
    assert not any(rank["kept"] for rank in ranks)
    assert ranks[0]["records"] == [
        ".",
        "checkpoint-3",
        "checkpoint-5",
        "final",
    ]  # the main process writes, and no other
    assert not any(rank["records"] for rank in ranks[1:])
    if name == "online_dpo":
        files = sorted((tmp_path / "completions").iterdir())
        assert [path.name for path in files] == [f"completions_0000{step}.parquet" for step in (2, 4, 5)]
        written = [row["log_ratio"] for path in files for row in pq.read_table(path).to_pylist()]
        assert sorted(map(str, written)) == sorted(
            str(score.value) for rank in ranks for _, scores, _ in rank["calls"] for score in scores
        )


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
    trainer, _ = make("online_dpo", tmp_path, reward, tokenizer, max_steps=5)
    trainer.add_callback(CDRCallback(reward, trainer, log_completions=True))
    trainer.train()
    files = sorted((tmp_path / "completions").iterdir())
    names = [f"completions_0000{step}.parquet" for step in (2, 4, 5)]  # the last steps' too, that no log follows
    assert [path.name for path in files] == names
    rows = pq.read_table(files[0]).to_pylist()
    assert len(rows) == 2 * 8
    assert {"prompt", "completion", "reward", "log_ratio", "typicality", "surprise", "survival", "domain"} <= set(
        rows[0]
    )
    assert "Step 5" in capsys.readouterr().out


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


@pytest.mark.parametrize("role", ["strong", "weak"])
@pytest.mark.parametrize("with_callback", [True, False])
@pytest.mark.parametrize("with_adapter", [True, False])
def test_a_policy_that_scores_itself_is_refused(with_adapter, with_callback, role, tmp_path, tokenizer, weak):
    """peft puts adapters into the model that it is given, which then is the policy, whatever object wraps it."""
    policy = llama(len(tokenizer), seed=2)
    pair = {"strong": weak, "weak": weak, role: policy}
    reward = CDRReward(**pair, strong_tokenizer=tokenizer, weak_tokenizer=tokenizer)
    adapter = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM") if with_adapter else None
    trainer, _ = make("grpo", tmp_path, reward, tokenizer, policy, peft_config=adapter)
    if with_callback:
        trainer.add_callback(CDRCallback(reward))
    with pytest.raises(ConfigError, match="the policy is one of the models that cdr_reward scores with, or an adapter"):
        trainer.train()


@pytest.mark.parametrize("with_callback", [True, False])
def test_a_reward_learns_where_the_policy_s_generation_stops(with_callback, tmp_path, reward, tokenizer):
    policy = llama(len(tokenizer), seed=2)
    trainer, _ = make("grpo", tmp_path, reward, tokenizer, policy, max_steps=1)
    trainer.eos_token_ids = [tokenizer.eos_token_id, 7]  # as TRL from 1.14.2 reads them in the generation config
    if with_callback:
        trainer.add_callback(CDRCallback(reward, trainer))
    trainer.train()
    assert reward.scorer._policy_ends == {tokenizer.eos_token_id, 7}


def test_a_frozen_model_beside_the_policy_is_not(tmp_path, tokenizer, strong, weak):
    reward = CDRReward(strong, weak, strong_tokenizer=tokenizer, weak_tokenizer=tokenizer)
    trainer, _ = make("grpo", tmp_path, reward, tokenizer, copy.deepcopy(strong), max_steps=1)
    trainer.train()


def test_a_reward_lets_go_of_the_trainers_that_it_served(tmp_path, reward, tokenizer):
    """Else it would keep their policies, and they would go on counting."""
    callbacks = []
    for run in "ab":
        trainer, _ = make("online_dpo", tmp_path / run, reward, tokenizer)
        callbacks.append(CDRCallback(reward, trainer, log_completions=True))
        trainer.add_callback(callbacks[-1])
        trainer.train()
    assert reward._observers == []
    assert [callback._rows for callback in callbacks] == [[], []]


def test_a_reward_does_not_keep_a_trainer_whose_run_failed(tmp_path, reward, tokenizer):
    """Out of memory, say: the next trainer, with smaller batches, needs the memory of this one's policy."""
    trainer, _ = make("grpo", tmp_path, reward, tokenizer)
    trainer.add_callback(CDRCallback(reward, trainer))
    calls = []
    reward.observe(calls.append)
    trainer.training_step = lambda *_, **__: [][0]
    with pytest.raises(IndexError):
        trainer.train()
    trainer.training_step = None
    kept = weakref.ref(trainer)
    del trainer
    gc.collect()
    assert kept() is None
    reward(prompts=["hello"], completions=["world"], kind=["plain"])
    assert len(calls) == 1
    reward.unobserve(calls.append)
    assert reward._observers == []
