"""A reward's metrics in the logs of its trainer: sums and counts until they are logged, and what a checkpoint keeps."""

import json
import statistics

import pytest
import torch
from datasets import Dataset
from tiny import TRAINING, chat, llama
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

from trl_cdr import CDRCallback, CDRReward, Criteria, DomainCriteria, OnlinePreferenceConfig, OnlinePreferenceTrainer
from trl_cdr.training.metrics_callback import MetricsCallback, find_prefix

# TRL's configs set gradient_checkpointing, which transformers 5 renamed; drop when TRL follows
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is deprecated:FutureWarning")
TRAINERS = {
    "grpo": (GRPOConfig, GRPOTrainer),
    "rloo": (RLOOConfig, RLOOTrainer),
    "online_preference": (OnlinePreferenceConfig, OnlinePreferenceTrainer),
}
COMMON = {
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,
    "max_steps": 4,
    "logging_steps": 2,
    "learning_rate": 0.0,
    **TRAINING,
    "save_strategy": "no",
}
SHORT, LONG = chat("hi"), chat("the quick brown fox " * 8)
TIMES = ("seconds", "step_share", "step_time", "runtime", "per_second")


@pytest.fixture(scope="module")
def policy(tmp_path_factory, tokenizer):
    """The folder of a policy whose completions end sometimes."""
    folder = str(tmp_path_factory.mktemp("policy") / "policy")
    model = llama(len(tokenizer), seed=2)
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] *= 2
    model.save_pretrained(folder)
    return folder


def make(name, folder, reward, policy, tokenizer, *, prompts=(SHORT, LONG), eval_prompts=None, **options):
    model = AutoModelForCausalLM.from_pretrained(policy)
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    kwargs = {
        "model": model,
        "processing_class": tokenizer,
        "reward_funcs": reward,
        "train_dataset": Dataset.from_dict({"prompt": list(prompts) * 16}),
    }
    if eval_prompts is not None:
        kwargs["eval_dataset"] = {key: Dataset.from_dict({"prompt": rows}) for key, rows in eval_prompts.items()}
    options = {**COMMON, **options}
    if name == "online_dpo":
        args = OnlineDPOConfig(str(folder), max_new_tokens=8, **options)
        return OnlineDPOTrainer(args=args, **kwargs)
    config, kind = TRAINERS[name]
    own = {} if name == "online_preference" else {"beta": 0.0}
    args = config(str(folder), max_completion_length=8, num_generations=2, **own, **options)
    return kind(args=args, **kwargs)


def half_known(checkpoints):
    """A reward that can't score long prompts: it knows no criteria for them."""

    def router(prompt):
        return "short" if len(prompt[-1]["content"]) < 10 else "unknown"

    criteria = Criteria({"short": DomainCriteria("be short")})
    return CDRReward(checkpoints["strong"], checkpoints["weak"], criteria=criteria, router=router)


def logs_of(trainer, key="loss"):
    return [entry for entry in trainer.state.log_history if key in entry]


def watched(reward):
    calls = []
    reward.observe(calls.append)
    return calls


def scored_in(calls):
    return [score for call in calls for score in call.scores if score.value is not None]


@pytest.mark.parametrize("name", ["grpo", "rloo", "online_preference", "online_dpo"])
def test_unscorable_prompts_change_no_mean(name, tmp_path, checkpoints, policy, tokenizer):
    """Prompts of an unknown domain can't be scored: some calls know nothing."""
    reward = half_known(checkpoints)
    calls = watched(reward)
    trainer = make(name, tmp_path, reward, policy, tokenizer, max_steps=8, seed=3)
    if name == "online_dpo":
        trainer.add_callback(CDRCallback(reward, trainer))
    trainer.train()
    unknown = [not scored_in([call]) for call in calls]
    assert 0 < sum(unknown) < len(unknown) == 8
    compared = 0
    for number, entry in enumerate(logs_of(trainer)):
        both = calls[2 * number : 2 * number + 2]
        scored, rows = scored_in(both), [score for call in both for score in call.scores]
        assert entry["cdr/unscorable"] == pytest.approx(1 - len(scored) / len(rows))
        if not scored:
            assert not {"cdr/strong_logps", "cdr/tokens", "cdr/distinct_tokens", "cdr/log_ratio_std"} & set(entry)
            continue
        compared += len(scored) < len(rows)
        strong, tokens = (statistics.fmean(getattr(one, key) for one in scored) for key in ("strong_logps", "n_tokens"))
        assert entry["cdr/strong_logps"] == pytest.approx(strong)
        assert entry["cdr/tokens"] == pytest.approx(tokens)
        assert entry["cdr/strong_logps_per_token"] == pytest.approx(strong / tokens)
    assert compared


@pytest.mark.compat
@pytest.mark.parametrize("name", ["grpo", "rloo"])
def test_no_callback_is_needed(name, tmp_path, checkpoints, policy, tokenizer):
    """Integrations read a log when they are called: the metrics have to be in it by then."""

    class Integration(TrainerCallback):
        logs = ()

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.logs = [*self.logs, dict(logs)]

    reward = CDRReward(checkpoints["strong"], checkpoints["weak"])
    trainer = make(name, tmp_path, reward, policy, tokenizer)
    integration = Integration()
    trainer.add_callback(integration)
    trainer.train()
    seen = [entry for entry in integration.logs if "loss" in entry]
    assert len(seen) == 2
    for entry, logged in zip(seen, logs_of(trainer), strict=True):
        assert {"cdr/tokens", "cdr/surprise", "cdr/step_share", "cdr/seconds"} <= set(entry)
        assert {key: entry[key] for key in entry if key.startswith("cdr/")} == {
            key: logged[key] for key in logged if key.startswith("cdr/")
        }


@pytest.mark.compat
@pytest.mark.parametrize("name", ["grpo", "online_preference"])
def test_each_evaluation_set_has_its_own_metrics(name, tmp_path, checkpoints, policy, tokenizer):
    reward = CDRReward(checkpoints["strong"], checkpoints["weak"])
    calls = watched(reward)
    sets = {"short": [SHORT] * 3, "long": [LONG] * 2}
    trainer = make(name, tmp_path, reward, policy, tokenizer, eval_prompts=sets)
    trainer.train()
    before = len(calls)
    trainer.predict(trainer.eval_dataset["long"])  # no log follows it, and the next has nothing of it
    first = len(calls)
    metrics = trainer.evaluate()
    assert first > before
    expected = {"short": calls[first : first + 3], "long": calls[first + 3 :]}
    for key, part in expected.items():
        name = f"eval_{key}_cdr/strong_logps"
        [entry] = logs_of(trainer, name)
        logps = statistics.fmean(score.strong_logps for score in scored_in(part))
        assert entry[name] == pytest.approx(logps)
        if "eval_reward" in metrics:  # TRL 1.0 hands out a copy of its metrics before it adds GRPO's
            assert metrics[name] == pytest.approx(logps)
        assert f"eval_{key}_cdr/step_share" not in entry
    assert not [key for entry in logs_of(trainer) for key in entry if key.startswith("eval")]


def test_evaluation_does_not_count_in_training(tmp_path, checkpoints, policy, tokenizer):
    """Neither its rewards by domain nor its scores."""
    reward = CDRReward(checkpoints["strong"], checkpoints["weak"], criteria="safety", domain="safety")
    calls = watched(reward)
    sets = {"long": [LONG] * 2}
    trainer = make(
        "grpo",
        tmp_path,
        reward,
        policy,
        tokenizer,
        prompts=[SHORT],
        eval_prompts=sets,
        eval_strategy="steps",
        eval_steps=1,
    )
    modes = []
    reward.observe(lambda call: modes.append(trainer.model.training))
    trainer.train()
    trained = [call for call, is_training in zip(calls, modes, strict=True) if is_training]
    assert len(trained) == 4
    assert len(calls) == 4 + 2 * 4
    for number, entry in enumerate(logs_of(trainer)):
        both = trained[2 * number : 2 * number + 2]
        rewards = [value for call in both for value in call.rewards]
        assert entry["cdr/rewards/safety"] == pytest.approx(statistics.fmean(rewards))
        logps = statistics.fmean(score.strong_logps for score in scored_in(both))
        assert entry["cdr/strong_logps"] == pytest.approx(logps)


@pytest.mark.compat
@pytest.mark.parametrize(
    ("name", "has_callback"),
    [("grpo", True), ("grpo", False), ("rloo", False), ("online_preference", False), ("online_dpo", True)],
)
def test_resumed_run_logs_equal_values(name, has_callback, tmp_path, checkpoints, policy, tokenizer):
    """A checkpoint between two logs: of the log after it a part is known before, and a part after."""
    options = {"save_strategy": "steps", "save_steps": 3, "learning_rate": 1e-3, "max_steps": 6}

    def run(folder, resume=None):
        reward = half_known(checkpoints)
        trainer = make(name, folder, reward, policy, tokenizer, **options)
        if has_callback:
            trainer.add_callback(CDRCallback(reward, trainer))
        trainer.train(resume_from_checkpoint=resume and str(resume))
        return trainer

    whole = run(tmp_path / "whole")
    resumed = run(tmp_path / "resumed", tmp_path / "whole" / "checkpoint-3")
    state = json.loads((tmp_path / "whole" / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["cdr_reward"]["attributes"]["sums"]
    for left, right in zip(logs_of(whole), logs_of(resumed), strict=True):
        ours = {key for key in {*left, *right} if key.startswith("cdr/") and not key.endswith(TIMES)}
        if name == "online_preference":  # all of its values
            ours = {key for key in {*left, *right} if not key.endswith(TIMES)}
        assert len(ours) > 8
        for key in sorted(ours):
            assert left[key] == pytest.approx(right[key], rel=1e-5, abs=1e-7), key


def test_second_run_of_a_trainer_starts_anew(tmp_path, checkpoints, policy, tokenizer):
    reward = CDRReward(checkpoints["strong"], checkpoints["weak"])
    calls = watched(reward)
    trainer = make("grpo", tmp_path, reward, policy, tokenizer, max_steps=3)  # the third step has no log
    trainer.train()
    del calls[:]
    trainer.train()
    callbacks = [one for one in trainer.callback_handler.callbacks if isinstance(one, MetricsCallback)]
    assert len(callbacks) == 1
    logps = statistics.fmean(score.strong_logps for score in scored_in(calls[:2]))
    assert logs_of(trainer)[0]["cdr/strong_logps"] == pytest.approx(logps)


def test_one_reward_in_two_trainers_logs_in_each(tmp_path, checkpoints, policy, tokenizer):
    """Each trainer's logs have its own calls, and the second trainer is set up as the first one was."""
    reward = CDRReward(checkpoints["strong"], checkpoints["weak"])
    for run in "ab":
        calls = watched(reward)
        trainer = make("grpo", tmp_path / run, reward, policy, tokenizer)
        trainer.train()
        for number, entry in enumerate(logs_of(trainer)):
            logps = statistics.fmean(score.strong_logps for score in scored_in(calls[2 * number : 2 * number + 2]))
            assert entry["cdr/strong_logps"] == pytest.approx(logps)
        assert (tmp_path / run / "cdr_labeling.json").is_file()


@pytest.mark.compat
@pytest.mark.parametrize(
    ("keys", "prefix"),
    [
        (["loss", "grad_norm", "learning_rate"], ""),
        (["loss", "learning_rate", "train_runtime"], ""),  # include_num_input_tokens_seen
        (["eval_loss", "eval_runtime", "epoch"], "eval_"),
        (["eval_math_runtime"], "eval_math_"),
        (["train_runtime", "train_loss"], None),
        (["loss"], None),  # a user's
        (["mine"], None),
    ],
)
def test_find_prefix_by_kind_of_log(keys, prefix):
    assert find_prefix(dict.fromkeys(keys, 1.0)) == prefix
