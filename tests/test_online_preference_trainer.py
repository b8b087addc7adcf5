"""Online SimPO and DPO on N generations: what is learnt from which pair, inherited behaviour, metrics."""

import math
from importlib.metadata import version

import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from oracle import completion_logps
from packaging.version import Version
from ranks import Run, launch
from tiny import TRAINING, chat, llama
from transformers import AutoModelForCausalLM, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM
from trl import GRPOConfig, GRPOTrainer

from trl_cdr import CDRCallback, CDRReward, ConfigError, OnlinePreferenceConfig, OnlinePreferenceTrainer, _compat
from trl_cdr.training.losses import dpo_loss, ipo_loss, simpo_loss

pytestmark = [
    pytest.mark.compat,
    # TRL's configs set gradient_checkpointing, which transformers 5 renamed; drop when TRL follows
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is deprecated:FutureWarning"),
]
WORDS = ["hello", "what is this", "the quick brown fox", "a lazy dog"]
COMMON = {
    "max_completion_length": 8,
    "num_generations": 4,
    "per_device_train_batch_size": 8,
    "max_steps": 2,
    "learning_rate": 1e-3,
    **TRAINING,
    "save_strategy": "no",
    "logging_steps": 1,
}
TRLS = {"rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected"}
SHARES = ("used", "ties", "missing", "truncated", "below_margin")
OURS = {*SHARES, "margin", "chosen_tokens", "rejected_tokens"}


def length(prompts, completions, completion_ids, **kwargs):
    """Longer is better; equal lengths are told apart by their tokens, so that nothing ties."""
    return [len(ids) + sum(ids) / 1e4 for ids in completion_ids]


class Recorder(OnlinePreferenceTrainer):
    """Keeps what each micro-batch was and what it cost."""

    batches = ()

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        weights = {name: weight.detach().clone() for name, weight in self.model.state_dict().items()}
        self.batches = [*self.batches, (inputs, loss.item(), weights)]
        return loss


class Fused(Recorder):
    """With TRL's fused head where a GPU would have it."""

    _fused_devices = ("cpu",)


def make(tmp_path, policy, tokenizer, reward=length, *, kind=Recorder, prompts=WORDS * 4, trainer=None, **options):
    model = AutoModelForCausalLM.from_pretrained(policy)
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    data = Dataset.from_dict({"prompt": [chat(prompt) for prompt in prompts]})
    args = OnlinePreferenceConfig(str(tmp_path), **{**COMMON, **options})
    kwargs = {"processing_class": tokenizer, "train_dataset": data, "eval_dataset": data} | (trainer or {})
    return kind(model, reward, args, **kwargs)


@pytest.fixture(scope="module")
def policy(tmp_path_factory, tokenizer):
    """The folder of a policy that ends some of its completions and runs into the limit with others."""
    folder = str(tmp_path_factory.mktemp("policy") / "policy")
    model = llama(len(tokenizer), seed=2)
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] *= 2
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def logs_of(trainer, key="loss"):
    return [entry for entry in trainer.state.log_history if key in entry]


def pair_logps(model, inputs):
    """Summed log-probabilities (P, 2) and counts (P, 2), each completion run on its own."""
    found = []
    for pair in zip(
        *(inputs[name] for name in ("prompt_ids", "prompt_mask", "completion_ids", "loss_mask")), strict=True
    ):
        rows = [
            (prompt[read.bool()].tolist(), ids[kept.bool()].tolist())
            for prompt, read, ids, kept in zip(*pair, strict=True)
        ]
        found.append([(completion_logps(model, prompt, ids).sum().item(), len(ids)) for prompt, ids in rows])
    found = torch.tensor(found)
    return found[..., 0], found[..., 1]


def entropy_of(model, inputs):
    """Mean entropy at the tokens of all pairs, each completion run on its own."""
    found = []
    for pair in zip(
        *(inputs[name] for name in ("prompt_ids", "prompt_mask", "completion_ids", "loss_mask")), strict=True
    ):
        for prompt, mask, ids, marks in zip(*pair, strict=True):
            kept = marks.bool()
            row = torch.cat([prompt[mask.bool()], ids[kept]])[None]
            with torch.no_grad():
                logps = model(input_ids=row).logits[0, -int(kept.sum()) - 1 : -1].double().log_softmax(-1)
            found.append(-(logps.exp() * logps).sum(-1))
    return torch.cat(found).mean().item()


@pytest.mark.parametrize("kind", [Recorder, Fused])
@pytest.mark.parametrize("loss", ["simpo", "dpo", "ipo"])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_loss_is_that_of_the_best_and_the_worst(loss, temperature, kind, tmp_path, policy, tokenizer):
    """Against each completion run on its own, with the policy as it was at that step; sampling's temperature is not the
    loss's."""
    if kind is Fused and (_compat.fused_head() is None or Version(version("trl")).release < (1, 16)):
        pytest.skip("no fused head, or one that fails on a CPU (TRL 1.15)")
    smoothing = {} if loss == "ipo" else {"label_smoothing": 0.2}
    options = {"preference_loss": loss, "preference_beta": 0.7, "sft_coef": 0.3, "temperature": temperature}
    options |= smoothing
    seen = []

    def reward(completion_ids, **kwargs):
        seen.append((completion_ids, rewards := length(None, None, completion_ids)))
        return rewards

    trainer = make(tmp_path, policy, tokenizer, reward, kind=kind, **options)
    trainer.train()
    model, reference = (AutoModelForCausalLM.from_pretrained(policy).eval() for _ in range(2))
    assert len(trainer.batches) == len(seen) == 2
    for (inputs, found, weights), (ids, rewards), log in zip(trainer.batches, seen, logs_of(trainer), strict=True):
        pairs = set()
        for start in (0, 4):
            group = range(start, start + 4)
            pairs.add(tuple(tuple(ids[of(group, key=rewards.__getitem__)]) for of in (max, min)))
        masks = inputs["loss_mask"].bool()
        assert pairs == {
            tuple(tuple(row[mask].tolist()) for row, mask in zip(pair, mask, strict=True))
            for pair, mask in zip(inputs["completion_ids"], masks, strict=True)
        }
        model.load_state_dict(weights)
        sums, counts = pair_logps(model, inputs)
        ref_sums, _ = pair_logps(reference, inputs)
        means = sums / counts
        if loss == "simpo":
            losses, shown = simpo_loss(*means.unbind(1), beta=0.7, gamma=0.35, **smoothing), 0.7 * means
        else:
            divisor = counts if loss == "ipo" else 1
            names = ("ref_chosen_logps", "ref_rejected_logps")
            kwargs = dict(zip(names, (ref_sums / divisor).unbind(1), strict=True))
            kwargs |= smoothing
            losses = (ipo_loss if loss == "ipo" else dpo_loss)(*(sums / divisor).unbind(1), **kwargs, beta=0.7)
            shown = 0.7 * (sums - ref_sums)
            assert log["kl"] == pytest.approx(((sums - ref_sums).sum() / counts.sum()).item(), abs=1e-5)
        assert ("kl" in log) == (loss != "simpo")
        assert log["entropy"] == pytest.approx(entropy_of(model, inputs), abs=1e-4)
        assert found == pytest.approx((losses - 0.3 * means[:, 0]).mean().item(), abs=1e-5)
        assert log["rewards/chosen"] == pytest.approx(shown[:, 0].mean().item(), abs=1e-4)
        assert log["rewards/margins"] == pytest.approx((shown[:, 0] - shown[:, 1]).mean().item(), abs=1e-4)
        logps = means if loss == "simpo" else sums
        assert log["logps/rejected"] == pytest.approx(logps[:, 1].mean().item(), abs=1e-4)
        assert log["pairs/chosen_tokens"] == counts[:, 0].mean().item()


def test_metrics(tmp_path, policy, tokenizer, checkpoints):
    """Ours beside TRL's and the reward's, in the log and in evaluation."""
    reward = CDRReward(checkpoints["strong"], checkpoints["weak"], gate="none")
    trainer = make(tmp_path, policy, tokenizer, reward, num_generations_eval=2)
    trainer.add_callback(CDRCallback(reward, trainer))
    trainer.train()
    found = trainer.evaluate()
    expected = (
        TRLS
        | {f"pairs/{name}" for name in OURS}
        | {"entropy", "rewards/cdr_reward/mean", "reward", "cdr/log_ratio_std"}
    )
    for log in logs_of(trainer):
        assert expected <= set(log)
        assert sum(log[f"pairs/{name}"] for name in SHARES) == pytest.approx(1)
        assert log["pairs/margin"] > 0
        assert all(math.isfinite(log[name]) for name in expected)
    assert "eval_loss" in found
    assert {f"eval_{name}" for name in expected} <= set(logs_of(trainer, "eval_loss")[0])


def test_what_teaches_nothing(tmp_path, policy, tokenizer):
    """Groups that tie, are silent or too close have weight 0, and shapes stay."""

    def reward(prompts, **kwargs):
        kinds = {
            "hello": [1.0, 1.0, 1.0, 1.0],
            "what is this": [None] * 4,
            "the quick brown fox": [0.0, 0.1, 0.05, 0.0],
            "a lazy dog": [0.0, None, 2.0, 1.0],
        }
        return [kinds[prompt[-1]["content"]][index % 4] for index, prompt in enumerate(prompts)]

    options = {"per_device_train_batch_size": 16, "min_margin": 0.2, "max_steps": 1}
    trainer = make(tmp_path, policy, tokenizer, reward, prompts=WORDS, **options)
    trainer.train()
    [(inputs, loss, _)] = trainer.batches
    assert inputs["completion_ids"].shape[:2] == (4, 2)
    assert sorted(inputs["weights"].tolist()) == [0, 0, 0, 1]
    [log] = logs_of(trainer)
    assert {name: log[f"pairs/{name}"] for name in ("used", "ties", "missing", "below_margin")} == dict.fromkeys(
        ("used", "ties", "missing", "below_margin"), 0.25
    )
    assert log["pairs/margin"] == 2
    model = AutoModelForCausalLM.from_pretrained(policy).eval()
    sums, counts = pair_logps(model, inputs)
    losses = simpo_loss(*(sums / counts).unbind(1), beta=2.0, gamma=1.0)
    assert loss == pytest.approx((losses * inputs["weights"]).sum().item() / 4, abs=1e-5)  # over all pairs


@pytest.mark.parametrize("value", [None, 1.0])
@pytest.mark.parametrize("strategy", ["best_worst", "best_random"])
def test_training_goes_on_without_a_pair(value, strategy, tmp_path, policy, tokenizer):
    before = AutoModelForCausalLM.from_pretrained(policy).state_dict()
    trainer = make(
        tmp_path, policy, tokenizer, lambda prompts, **kwargs: [value] * len(prompts), pair_strategy=strategy
    )
    trainer.train()
    assert all(torch.equal(before[name], weight) for name, weight in trainer.model.state_dict().items())
    for log in logs_of(trainer):
        assert log["loss"] == log["pairs/used"] == 0
        assert log["pairs/ties" if value else "pairs/missing"] == 1
        assert log["rewards/margins"] is None  # no mean of nothing


def test_several_rewards_with_weights(tmp_path, policy, tokenizer):
    def shortness(completion_ids, **kwargs):
        return [-float(len(ids)) for ids in completion_ids]

    def first(completion_ids, **kwargs):
        return [ids[0] / 1e4 for ids in completion_ids]

    options = {"reward_weights": [1.0, 3.0, 0.0], "per_device_train_batch_size": 32}
    trainer = make(tmp_path, policy, tokenizer, [length, shortness, first], **options)
    trainer.train()
    assert all(log["pairs/chosen_tokens"] < log["pairs/rejected_tokens"] for log in logs_of(trainer))


def test_what_others_wrote_is_not_learnt(tmp_path, policy, tokenizer):
    """A rollout marks the tokens of tools or an environment: read as context, and no part of the loss."""

    def write(prompts, trainer):
        ids = tokenizer([prompt[-1]["content"] for prompt in prompts]).input_ids
        written = [[20 + index, 30, 31, 40 + index, tokenizer.eos_token_id] for index in range(len(prompts))]
        marks = [[1, 0, 0, 1, 1]] * len(prompts)
        logprobs = [[-1.0] * 5] * len(prompts)
        return {"prompt_ids": ids, "completion_ids": written, "logprobs": logprobs, "env_mask": marks}

    trainer = make(tmp_path, policy, tokenizer, trainer={"rollout_func": write}, max_steps=1)
    trainer.train()
    [(inputs, loss, _)] = trainer.batches
    model = AutoModelForCausalLM.from_pretrained(policy).eval()
    means = []
    for pair in zip(inputs["prompt_ids"], inputs["prompt_mask"].bool(), inputs["completion_ids"], strict=True):
        rows = zip(*pair, strict=True)
        each = [completion_logps(model, prompt[mask].tolist(), ids.tolist()) for prompt, mask, ids in rows]
        means.append([logps[[0, 3, 4]].mean().item() for logps in each])
    losses = simpo_loss(*torch.tensor(means).unbind(1), beta=2.0, gamma=1.0)
    assert loss == pytest.approx(losses.mean().item(), abs=1e-5)
    assert logs_of(trainer)[0]["pairs/chosen_tokens"] == 3


def test_each_completion_is_trained_on_behind_its_own_prompt(tmp_path, policy, tokenizer):
    """What an environment says first may differ within a group."""
    wrote = {}

    def write(prompts, trainer):
        texts = [f"{prompt[-1]['content']} and observation {row}" for row, prompt in enumerate(prompts)]
        ids = tokenizer(texts).input_ids
        written = [[20 + row, 30 + row, tokenizer.eos_token_id] for row in range(len(prompts))]
        wrote.update({tuple(completion): prompt for completion, prompt in zip(written, ids, strict=True)})
        return {"prompt_ids": ids, "completion_ids": written, "logprobs": [[-1.0] * 3] * len(prompts)}

    trainer = make(tmp_path, policy, tokenizer, trainer={"rollout_func": write}, max_steps=1)
    trainer.train()
    [(inputs, loss, _)] = trainer.batches
    for prompts, masks, pair in zip(
        inputs["prompt_ids"], inputs["prompt_mask"].bool(), inputs["completion_ids"], strict=True
    ):
        own = [wrote[tuple(ids.tolist())] for ids in pair]
        assert own[0] != own[1]
        assert [prompt[mask].tolist() for prompt, mask in zip(prompts, masks, strict=True)] == own
    sums, counts = pair_logps(AutoModelForCausalLM.from_pretrained(policy).eval(), inputs)
    losses = simpo_loss(*(sums / counts).unbind(1), beta=2.0, gamma=1.0)
    assert loss == pytest.approx(losses.mean().item(), abs=1e-5)


@pytest.mark.parametrize("several", [True, False])
def test_a_reward_that_is_not_known_is_not_0(several, tmp_path, policy, tokenizer):
    """Else the policy of which nothing is known would be the best one."""

    def honest(completion_ids, **kwargs):
        return [None if row % 4 == 0 else -10.0 - row % 4 for row in range(len(completion_ids))]

    def form(completion_ids, **kwargs):
        return [0.0] * len(completion_ids)

    options = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 8, "max_steps": 2}
    data = {"eval_dataset": Dataset.from_dict({"prompt": [chat(word) for word in WORDS]})}
    trainer = make(tmp_path, policy, tokenizer, [honest, form] if several else honest, trainer=data, **options)
    trainer.train()
    assert [log["reward"] for log in logs_of(trainer)] == pytest.approx([-12.0] * 2)
    assert [log["eval_reward"] for log in logs_of(trainer, "eval_reward")] == pytest.approx([-12.0] * 2)
    assert [log["reward_std"] for log in logs_of(trainer)] == pytest.approx([math.sqrt(2 / 3 * 6 / 5)] * 2)


def test_a_completion_without_a_token_of_its_own_makes_no_pair(tmp_path, policy, tokenizer):
    def write(prompts, trainer):
        ids = tokenizer([prompt[-1]["content"] for prompt in prompts]).input_ids
        written = [[20 + index, tokenizer.eos_token_id] for index in range(len(prompts))]
        marks = [[int(index > 0)] * 2 for index in range(len(prompts))]  # the first, worst of its group
        logprobs = [[-1.0] * 2] * len(prompts)
        return {"prompt_ids": ids, "completion_ids": written, "logprobs": logprobs, "env_mask": marks}

    trainer = make(tmp_path, policy, tokenizer, trainer={"rollout_func": write}, max_steps=1, log_completions=True)
    trainer.train()
    [log] = logs_of(trainer)
    assert log["pairs/missing"] == log["pairs/used"] == 0.5
    assert math.isfinite(log["loss"])
    assert log["pairs/rejected_tokens"] == 2
    [file] = (tmp_path / "completions").iterdir()
    assert pq.read_table(file)["pair"].to_pylist() == [*[""] * 4, "rejected", "", "", "chosen"]


def test_a_random_other_is_drawn_anew_in_each_group(tmp_path, policy, tokenizer):
    def reward(prompts, **kwargs):
        return [float(index % 4) for index in range(len(prompts))]

    options = {"per_device_train_batch_size": 64, "max_steps": 1, "pair_strategy": "best_random"}
    margins = []
    for seed in (0, 0, 1):
        trainer = make(tmp_path, policy, tokenizer, reward, seed=seed, **options)
        trainer.train()
        margins.append(logs_of(trainer)[0]["pairs/margin"])
    assert margins[0] == margins[1] != margins[2]
    assert 1.2 < margins[0] < 2.8  # of 1, 2 and 3, evenly; always the worst would be 3


def test_a_random_other_is_drawn_anew_at_each_step(tmp_path, policy, tokenizer):
    def reward(prompts, **kwargs):
        return [float(index % 4) for index in range(len(prompts))]

    trainer = make(tmp_path, policy, tokenizer, reward, per_device_train_batch_size=64, pair_strategy="best_random")
    trainer.train()
    first, second = (log["pairs/margin"] for log in logs_of(trainer))
    assert first != second


@pytest.mark.parametrize("loss", ["simpo", "dpo"])
def test_accumulating_gradients(loss, tmp_path, policy, tokenizer):
    """Four times two pairs, or two times four, are eight; some have weight 0."""

    def reward(completion_ids, **kwargs):
        rewards = length(None, None, completion_ids)
        return [0.0 if index // 4 % 3 == 0 else reward for index, reward in enumerate(rewards)]

    ends = []
    for accumulated in (1, 2, 4):
        trainer = make(
            tmp_path,
            policy,
            tokenizer,
            reward,
            preference_loss=loss,
            per_device_train_batch_size=32 // accumulated,
            gradient_accumulation_steps=accumulated,
            optim="sgd",  # Adam hides a wrong scale
            learning_rate=0.05,
        )
        trainer.train()
        [first, _] = logs_of(trainer)
        counted = {name: value for name, value in first.items() if name in TRLS or name.startswith("pairs/")}
        counted |= {name: first[name] for name in ("entropy", "kl") if name in first}
        ends.append((first["loss"], first["grad_norm"], trainer.model.state_dict(), counted))
    before = AutoModelForCausalLM.from_pretrained(policy).state_dict()
    assert any((before[name] - weight).abs().max() > 1e-3 for name, weight in ends[0][2].items())
    assert len(ends[0][3]) == (15 if loss == "simpo" else 16)
    for loss, norm, weights, counted in ends[1:]:
        assert counted == pytest.approx(ends[0][3], abs=1e-4)
        assert loss == pytest.approx(ends[0][0], abs=1e-4)  # transformers rounds it
        assert norm == pytest.approx(ends[0][1], rel=1e-4)
        for name, weight in weights.items():
            torch.testing.assert_close(weight, ends[0][2][name], rtol=0, atol=1e-5)


def test_a_mean_over_steps_weighs_each_pair(tmp_path, policy, tokenizer):
    """One pair with a margin of 10 and three of 1, in one log of two steps, are 3.25 and not 5.5."""
    calls = []

    def reward(prompts, **kwargs):
        calls.append(len(prompts))
        far, near = [10.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]
        return [*far, *[0.0] * 12] if len(calls) == 1 else [*[0.0] * 4, *near * 3]

    options = {"per_device_train_batch_size": 16, "logging_steps": 2, "learning_rate": 0.0}
    trainer = make(tmp_path, policy, tokenizer, reward, **options)
    trainer.train()
    [log] = logs_of(trainer)
    assert calls == [16, 16]
    assert log["pairs/margin"] == pytest.approx((10 + 3 * 1) / 4)
    assert log["pairs/used"] == 0.5
    model = AutoModelForCausalLM.from_pretrained(policy).eval()
    gaps, entropies, tokens = [], 0.0, 0
    for inputs, *_ in trainer.batches:
        used = {name: value[inputs["weights"] > 0] for name, value in inputs.items()}
        sums, counts = pair_logps(model, used)
        gaps += (sums / counts).diff(dim=1)[:, 0].tolist()
        entropies += entropy_of(model, used) * counts.sum().item()
        tokens += counts.sum().item()
    assert len(gaps) == 4
    assert log["rewards/margins"] == pytest.approx(-2.0 * sum(gaps) / 4, abs=1e-4)
    assert log["entropy"] == pytest.approx(entropies / tokens, abs=1e-4)


def test_a_cut_off_completion_is_in_no_pair_where_asked(tmp_path, policy, tokenizer):
    """The longest is the best: without the option the chosen one is mostly one that was cut off."""
    end = tokenizer.eos_token_id
    ended = []
    for masked in (False, True):
        options = {"mask_truncated_completions": masked, "per_device_train_batch_size": 64, "max_steps": 1}
        trainer = make(tmp_path, policy, tokenizer, **options)
        trainer.train()
        [(inputs, _, _)] = trainer.batches
        [log] = logs_of(trainer)
        used = inputs["weights"] > 0
        assert log["pairs/used"] == used.float().mean().item()
        ended.append((inputs["completion_ids"][used] == end).any(dim=2))
        assert (log["pairs/truncated"] > 0) == masked
        assert sum(log[f"pairs/{name}"] for name in SHARES) == pytest.approx(1)
    without, with_option = ended
    assert not without[:, 0].all()
    assert len(with_option) > 1
    assert with_option.all()


def test_where_no_completion_ends(tmp_path, policy, tokenizer):
    options = {"mask_truncated_completions": True, "generation_kwargs": {"suppress_tokens": [tokenizer.eos_token_id]}}
    trainer = make(tmp_path, policy, tokenizer, **options)
    trainer.train()
    for log in logs_of(trainer):
        assert log["pairs/truncated"] == log["completions/clipped_ratio"] == 1
        assert log["loss"] == log["pairs/used"] == log["pairs/missing"] == 0


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_.*able. is deprecated:FutureWarning")  # TRL's calls
def test_gradient_checkpointing_changes_nothing(tmp_path, policy, tokenizer):
    weights = []
    for is_on in (False, True):
        trainer = make(tmp_path, policy, tokenizer, gradient_checkpointing=is_on, preference_loss="dpo")
        trainer.train()
        weights.append(trainer.model.state_dict())
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], rtol=0, atol=1e-6)


def test_a_policy_that_can_only_give_all_its_logits(tmp_path, policy, tokenizer):
    weights = []
    for keeps in (True, False):
        trainer = make(tmp_path, policy, tokenizer)
        assert trainer._keeps_logits  # a Llama can leave out the prompt's
        trainer._keeps_logits = keeps
        trainer.train()
        weights.append(trainer.model.state_dict())
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["refuses", "ignores", "takes"])
def test_last_logits_by_behaviour(kind, tmp_path, policy, tokenizer, caplog, monkeypatch):
    """The same weights, and one warning if all logits are computed. No signature names the argument."""
    own = LlamaForCausalLM.forward

    def forward(self, *args, **kwargs):
        if kind == "refuses" and "logits_to_keep" in kwargs:
            raise TypeError("forward() got an unexpected keyword argument 'logits_to_keep'")
        if kind == "ignores":
            kwargs.pop("logits_to_keep", None)
        return own(self, *args, **kwargs)

    weights = []
    for used in (own, forward):
        monkeypatch.setattr(LlamaForCausalLM, "forward", used)
        trainer = make(tmp_path, policy, tokenizer)
        trainer.train()
        weights.append(trainer.model.state_dict())
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], rtol=0, atol=1e-6)
    warned = [record for record in caplog.records if "does not keep to logits_to_keep" in record.getMessage()]
    assert len(warned) == (kind != "takes")


def test_last_logits_raises_other_errors(tmp_path, policy, tokenizer, monkeypatch):
    trainer = make(tmp_path, policy, tokenizer)

    def fail(**_):
        raise TypeError("can't convert a tensor")

    with pytest.raises(TypeError, match="can't convert a tensor"):
        trainer._last_logits(fail, {}, 3)


def test_a_trl_without_a_fused_head_is_warned_of(tmp_path, policy, tokenizer, caplog, monkeypatch):
    """On a GPU, where it saves memory; on a CPU it is not used."""
    monkeypatch.setattr(_compat, "fused_head", lambda: None)
    make(tmp_path, policy, tokenizer)
    assert "add_fused_lm_head" not in caplog.text
    monkeypatch.setattr(OnlinePreferenceTrainer, "_fused_devices", ("cpu",))
    trainer = make(tmp_path, policy, tokenizer)
    assert not trainer._fuses_head
    assert "has no trl.trainer.utils.add_fused_lm_head: all logits of a micro-batch are computed" in caplog.text


@pytest.mark.parametrize("loss", ["simpo", "dpo"])
def test_peft(loss, tmp_path, policy, tokenizer):
    """The reference is the model without its adapter, or an earlier adapter's copy."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    options = {"preference_loss": loss, "learning_rate": 1e-2, "max_steps": 3}
    trainer = make(tmp_path, policy, tokenizer, trainer={"peft_config": config}, **options)
    trainer.train()
    assert trainer.ref_model is None
    before = AutoModelForCausalLM.from_pretrained(policy).state_dict()
    kept = trainer.model.unload().state_dict()
    assert all(torch.equal(before[name], kept[name]) for name in before)
    if loss == "dpo":
        first, _, last = (log["rewards/margins"] for log in logs_of(trainer))
        assert first == pytest.approx(0, abs=1e-5)
        assert abs(last) > 1e-4


def test_an_adapter_that_was_trained_before_is_its_own_reference(tmp_path, policy, tokenizer):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(policy), config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    data = Dataset.from_dict({"prompt": [chat(word) for word in WORDS * 4]})
    args = OnlinePreferenceConfig(str(tmp_path), **{**COMMON, "preference_loss": "dpo", "learning_rate": 1e-2})
    trainer = OnlinePreferenceTrainer(model, length, args, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    first, second = (log["rewards/margins"] for log in logs_of(trainer))
    assert first == pytest.approx(0, abs=1e-5)
    assert abs(second) > 1e-4
    assert all("default" in name for name, weight in model.named_parameters() if weight.requires_grad)


def test_the_completions_table_shows_the_pairs(tmp_path, policy, tokenizer, capsys):
    make(tmp_path, policy, tokenizer, log_completions=True, max_steps=1).train()
    [file] = (tmp_path / "completions").iterdir()
    rows = pq.read_table(file).to_pylist()
    assert [row["pair"] for row in rows].count("") == 4
    for group in (rows[:4], rows[4:]):
        by_reward = sorted(group, key=lambda row: row["length"])
        assert (by_reward[0]["pair"], by_reward[-1]["pair"]) == ("rejected", "chosen")
    assert "advantage" not in rows[0]
    assert {"step", "prompt", "completion", "length", "pair"} <= set(rows[0])
    printed = capsys.readouterr().out
    assert "Step 1" in printed
    assert "rejected" in printed
    assert "dvantage" not in printed


@pytest.mark.parametrize(("loss", "strategy"), [("simpo", "best_random"), ("dpo", "best_worst")])
def test_a_resumed_run_equals_an_uninterrupted_one(loss, strategy, tmp_path, policy, tokenizer, checkpoints):
    def run(folder, resume=None):
        reward = CDRReward(checkpoints["strong"], checkpoints["weak"], gate="none")
        options = {"preference_loss": loss, "pair_strategy": strategy, "save_strategy": "steps", "save_steps": 2}
        trainer = make(folder, policy, tokenizer, reward, kind=OnlinePreferenceTrainer, max_steps=4, **options)
        trainer.train(resume_from_checkpoint=resume and str(resume))
        return trainer.model.state_dict()

    whole = run(tmp_path / "whole")
    for found in (run(tmp_path / "again"), run(tmp_path / "resumed", tmp_path / "whole" / "checkpoint-2")):
        assert all(torch.equal(weight, found[name]) for name, weight in whole.items())


def test_evaluation_during_training(tmp_path, policy, tokenizer):
    options = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4}
    trainer = make(tmp_path, policy, tokenizer, **options)
    trainer.train()
    evaluations = logs_of(trainer, "eval_loss")
    assert len(evaluations) == 2
    assert all(log["eval_pairs/margin"] > 0 for log in evaluations)
    assert all("eval_rewards/length/mean" in log for log in evaluations)
    steps = [entry["step"] for entry in logs_of(trainer)]
    assert steps == [1, 2]  # evaluation's metrics are not training's
    assert not any(name.startswith("eval_") for log in logs_of(trainer) for name in log)


@pytest.mark.parametrize("loss", ["simpo", "dpo"])
@pytest.mark.parametrize("batch_size", [4, 12])
def test_the_evaluation_loss_is_a_mean_over_the_pairs_that_are_used(loss, batch_size, tmp_path, policy, tokenizer):
    """Of batches of one group, a quarter has no pair; of larger ones, each has another number."""

    def reward(prompts, completion_ids, **kwargs):
        rewards = length(None, None, completion_ids)
        return [
            0.0 if prompt[-1]["content"] == "hello" else reward for prompt, reward in zip(prompts, rewards, strict=True)
        ]

    options = {"preference_loss": loss, "gradient_accumulation_steps": 2, "per_device_eval_batch_size": batch_size}
    options |= {"learning_rate": 0.0, "max_steps": 1}
    trainer = make(tmp_path, policy, tokenizer, reward, **options)
    trainer.train()
    trainer.batches = []
    found = trainer.evaluate()
    model = AutoModelForCausalLM.from_pretrained(policy).eval()
    losses, pairs = [], 0
    for inputs, of_batch, _ in trainer.batches:
        used = {name: value[inputs["weights"] > 0] for name, value in inputs.items()}
        pairs += len(inputs["weights"])
        if not len(used["weights"]):
            assert math.isnan(of_batch)
            continue
        sums, counts = pair_logps(model, used)
        if loss == "simpo":
            found_here = simpo_loss(*(sums / counts).unbind(1), beta=2.0, gamma=1.0).tolist()
        else:
            found_here = [math.log(2)] * len(sums)  # the policy is its reference
        assert of_batch == pytest.approx(sum(found_here) / len(found_here), abs=1e-5)
        losses += found_here
    assert 0 < len(losses) < pairs
    assert found["eval_loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    assert logs_of(trainer, "eval_loss")[0]["eval_loss"] == found["eval_loss"]


@pytest.mark.parametrize(("value", "metric"), [(0.0, "loss"), (None, "loss"), (None, "rewards/margins")])
def test_an_evaluation_without_a_pair_is_nobodys_best(value, metric, tmp_path, policy, tokenizer):
    def reward(prompts, **kwargs):
        return [value] * len(prompts)

    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    options |= {"metric_for_best_model": metric, "load_best_model_at_end": True}
    trainer = make(tmp_path, policy, tokenizer, reward, **options)
    trainer.train()
    evaluations = logs_of(trainer, "eval_loss")
    assert len(evaluations) == 2
    assert all(math.isnan(log["eval_loss"]) for log in evaluations)
    assert trainer.state.best_model_checkpoint is None
    assert math.isnan(trainer.evaluate()["eval_rewards/margins"])


@pytest.mark.parametrize("strategy", ["steps", "best"])
def test_the_best_checkpoint_has_the_highest_reward(strategy, tmp_path, policy, tokenizer):
    calls = []

    def reward(prompts, completion_ids, **kwargs):
        calls.append(None)
        return [value - abs(len(calls) - 5) for value in length(None, None, completion_ids)]

    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": strategy, "max_steps": 4}
    options |= {"per_device_eval_batch_size": 64}
    options |= {"save_steps": 1, "load_best_model_at_end": True} if strategy == "steps" else {}
    trainer = make(tmp_path, policy, tokenizer, reward, **options)
    trainer.train()
    rewards = [log["eval_reward"] for log in logs_of(trainer, "eval_loss")]
    assert len(set(rewards)) == 4
    assert trainer.state.best_metric == max(rewards)
    steps = {int(folder.name.removeprefix("checkpoint-")) for folder in tmp_path.glob("checkpoint-*")}
    if strategy == "steps":
        assert trainer.state.best_global_step == 1 + rewards.index(max(rewards))
        assert steps == {1, 2, 3, 4}
    else:
        assert steps == {1 + number for number in range(4) if rewards[number] == max(rewards[: number + 1])}
        assert len(steps) < 4


def test_what_the_trainer_refuses(tmp_path, policy, tokenizer):
    with pytest.raises(ConfigError, match="args is a GRPOConfig. Pass an OnlinePreferenceConfig"):
        OnlinePreferenceTrainer(policy, length, GRPOConfig(str(tmp_path), use_cpu=True, bf16=False))
    trainer = make(tmp_path, policy, tokenizer, per_device_eval_batch_size=6)
    with pytest.raises(ConfigError, match="per_device_eval_batch_size is 6, and a group has 4 completions"):
        trainer.evaluate()


def test_a_trl_that_it_was_not_tested_with_is_refused(tmp_path, policy, monkeypatch):
    _compat.check_grpo(GRPOTrainer)

    class Renamed(GRPOTrainer):
        _calculate_rewards = None

    class Shorter(GRPOTrainer):
        def compute_loss(self, model, inputs):
            raise NotImplementedError

    class Asking(GRPOTrainer):
        def log(self, logs, start_time, unit):
            raise NotImplementedError

    class Other(GRPOTrainer):
        def _generate_and_score_completions(self, batch):
            raise NotImplementedError

    with pytest.raises(ConfigError, match=r"tested with TRL 1.0 to 1.16 .* there is no Renamed._calculate_rewards"):
        _compat.check_grpo(Renamed)
    with pytest.raises(ConfigError, match=r"Shorter.compute_loss takes other arguments than \['model', 'inputs', 'ret"):
        _compat.check_grpo(Shorter)
    with pytest.raises(ConfigError, match=r"Asking.log takes other arguments"):
        _compat.check_grpo(Asking)
    with pytest.raises(ConfigError, match=r"Other._generate_and_score_completions takes other arguments"):
        _compat.check_grpo(Other)
    monkeypatch.delattr("trl.trainer.utils.use_adapter")
    with pytest.raises(ConfigError, match=r"there is no trl.trainer.utils.use_adapter. Install a version"):
        OnlinePreferenceTrainer(policy, length, OnlinePreferenceConfig(str(tmp_path), **COMMON))


def test_a_trl_that_can_more_is_taken():
    class Longer(GRPOTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None, *, new=None, **more):
            raise NotImplementedError

        def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list, new=None):
            raise NotImplementedError

    _compat.check_grpo(Longer)


def test_what_a_later_trl_hands_over_goes_on_to_it(tmp_path, policy, tokenizer):
    """Each overridden method is called with an argument more, and its base takes it: a step, a log, an evaluation."""
    names = ("_generate_and_score_completions", "_calculate_rewards", "compute_loss", "log")
    seen = []

    def taking(name):
        def method(self, *args, new, **kwargs):
            seen.append((name, new))
            return getattr(GRPOTrainer, name)(self, *args, **kwargs)

        return method

    def passing(name):
        def method(self, *args, **kwargs):
            return getattr(OnlinePreferenceTrainer, name)(self, *args, new=len(args), **kwargs)

        return method

    later = type("Later", (GRPOTrainer,), {name: taking(name) for name in names})
    kind = type("Passing", (OnlinePreferenceTrainer, later), {name: passing(name) for name in names})
    trainer = make(tmp_path, policy, tokenizer, kind=kind, max_steps=1)
    trainer.train()
    assert math.isfinite(logs_of(trainer)[0]["loss"])
    assert {name for name, _ in seen} == {*names} - {"compute_loss"}  # whose loss is not the base's
    seen.clear()
    assert math.isfinite(trainer.evaluate()["eval_loss"])
    assert {name for name, _ in seen} == {*names} - {"compute_loss"}


def test_a_batch_of_another_shape_is_refused():
    batch = ["prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages"]
    _compat.check_generated(batch)
    _compat.check_generated([*batch, "tool_mask", "something_new"])
    with pytest.raises(ConfigError, match="a generated batch lacks prompt_mask"):
        _compat.check_generated([name for name in batch if name != "prompt_mask"])
    for key in ("pixel_values", "num_images", "image_grid_thw", "pixel_values_videos"):
        with pytest.raises(ConfigError, match=f"the prompts hold images .a generated batch has {key}.*Use GRPOTrainer"):
            _compat.check_generated([*batch, key])


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["best_worst", "best_random"])
def test_two_processes_are_one_with_twice_the_batch(strategy, tmp_path, policy):
    """The same completions: sampling differs by process. Losses, metrics and weights agree to float tolerance, also
    where gradients are accumulated over pairs of which some have no weight."""
    runs = [
        Run("two_ranks.py", [policy, strategy, str(batch), str(accumulated)], processes)
        for processes, batch, accumulated in ((1, 16, 1), (2, 8, 1), (2, 4, 2))
    ]
    found = [main for main, *_ in launch(*runs)]
    one, *others = found
    assert [each["processes"] for each in found] == [1, 2, 2]
    for log, rewards in zip(one["logs"], one["rewards"], strict=False):
        groups = [rewards[start : start + 4] for start in range(0, len(rewards), 4)]
        margins = [max(group) - min(group) for group in groups if len(set(group)) > 1]
        assert 0 < len(margins) < len(groups)
        assert log["pairs/used"] == len(margins) / len(groups)
        if strategy == "best_worst":
            assert log["pairs/margin"] == pytest.approx(sum(margins) / len(margins), rel=1e-4)
    # In evaluation what is drawn depends on the batch.
    logs = [each["logs"] if strategy == "best_worst" else each["logs"][:-1] for each in found]
    for two, theirs in zip(others, logs[1:], strict=True):
        for left, right in zip(logs[0], theirs, strict=True):
            for name, value in left.items():
                assert right[name] == pytest.approx(value, abs=2e-4, rel=1e-4), name
        for name, weight in one["weights"].items():
            torch.testing.assert_close(weight, two["weights"][name], rtol=0, atol=1e-5)


def test_best_random_draws_anew_in_each_micro_batch(tmp_path, policy, tokenizer):
    """With gradient accumulation a step generates several times: each generation has draws of its own."""
    drawn = []

    class Draws(OnlinePreferenceTrainer):
        def _select(self, rewards, truncated, *, first_group):
            pairs = super()._select(rewards, truncated, first_group=first_group)
            if self.model.training:
                drawn.append((self.state.global_step, tuple(pair.rejected for pair in pairs)))
            return pairs

    options = {"pair_strategy": "best_random", "gradient_accumulation_steps": 8, "steps_per_generation": 1}
    options |= {"per_device_train_batch_size": 16, "num_generations": 16, "max_steps": 2}

    def by_place(prompts, completions, **kwargs):
        return [float(place) for place in range(len(prompts))]

    runs = []
    for evaluation in ({}, {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 16}):
        drawn.clear()
        make(tmp_path, policy, tokenizer, by_place, kind=Draws, prompts=WORDS * 8, **options, **evaluation).train()
        runs.append(list(drawn))
    assert [step for step, _ in runs[0]] == [0] * 8 + [1] * 8
    assert len({draws for step, draws in runs[0] if step == 0}) > 2
    assert runs[0] == runs[1]  # an evaluation, which a resumed run does not repeat, changes no draw


@pytest.mark.parametrize("order", [("long", "short"), ("short", "long")])
def test_several_evaluation_sets_have_metrics_each(order, tmp_path, policy, tokenizer):
    """And the one that is named decides on the best checkpoint, whatever their order."""
    sets = {name: Dataset.from_dict({"prompt": [chat(f"{name} hello")] * 2}) for name in order}

    def by_set(prompts, completions, **kwargs):
        rewards = []
        for prompt, completion in zip(prompts, completions, strict=True):
            text = prompt[0]["content"]
            base = 10.0 if text.startswith("long") else -10.0 if text.startswith("short") else 0.0
            rewards.append(base + len(completion[0]["content"]) / 1e3)
        return rewards

    options = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4, "max_steps": 2}
    options |= {"save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True}
    named = options | {"metric_for_best_model": "eval_long_reward", "greater_is_better": True}
    trainer = make(tmp_path, policy, tokenizer, by_set, trainer={"eval_dataset": sets}, **named)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "eval_long_reward" in entry]
    assert len(logged) == 2
    assert all(entry["eval_long_reward"] > 5 for entry in logged)
    others = [entry for entry in trainer.state.log_history if "eval_short_reward" in entry]
    assert all(entry["eval_short_reward"] < -5 for entry in others)
    assert not [
        key for entry in trainer.state.log_history for key in entry if key in ("eval_reward", "eval_reward_std")
    ]
    assert trainer.state.best_metric == max(entry["eval_long_reward"] for entry in logged)
    with pytest.raises(ConfigError, match=r"eval_dataset has the sets .*'eval_(long|short)_reward', for example"):
        make(tmp_path, policy, tokenizer, by_set, trainer={"eval_dataset": sets}, **options)


def moe(tokenizer, tmp_path, coef=0.5):
    """The folder of a policy with experts."""
    config = MixtralConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=256,
        router_aux_loss_coef=coef,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MixtralForCausalLM(config)
    model.save_pretrained(tmp_path / "moe")
    return str(tmp_path / "moe")


def balancing_loss(router_logits, top_k):
    """
    The Switch Transformer's load-balancing loss (arXiv 2101.03961, eq. 4 to 6), over layers and rows: N times the sum,
    over N experts, of the share of tokens that an expert gets and its mean probability.
    """
    probs = torch.cat(router_logits).softmax(dim=1)  # (tokens x layers, N)
    chosen = torch.zeros_like(probs).scatter_(1, probs.topk(top_k, dim=1).indices, 1.0)
    return probs.shape[1] * (chosen.mean(dim=0) * probs.mean(dim=0)).sum()


@pytest.mark.skipif(Version(version("trl")) < Version("1.16"), reason="TRL trains experts without that loss")
@pytest.mark.parametrize("kind", [Recorder, Fused])
@pytest.mark.parametrize("loss", ["simpo", "dpo"])
def test_gradient_with_load_balancing_loss(kind, loss, tmp_path, tokenizer):
    """Over two micro-batches, against autograd of each row alone in float64."""
    folder = moe(tokenizer, tmp_path)
    options = {"preference_loss": loss, "gradient_accumulation_steps": 2, "max_steps": 1, "learning_rate": 1e-2}
    options |= {"steps_per_generation": 2, "optim": "sgd", "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
    trainer = make(tmp_path, folder, tokenizer, kind=kind, **options)
    assert trainer.aux_loss_enabled
    trainer.train()
    [logged] = logs_of(trainer, "aux_loss")
    exact, reference = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager")
        for _ in range(2)
    )
    losses, balances = [], []
    for inputs, *_ in trainer.batches:
        sums, ref_sums, counts, routers = [], [], [], []
        names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
        for prompt, read, ids, kept in zip(*(inputs[name].flatten(0, 1) for name in names), strict=True):
            row = torch.cat([prompt[read.bool()], ids[kept.bool()]])[None]
            count = int(kept.sum())
            output = exact(row, output_router_logits=True)
            routers += output.router_logits
            with torch.no_grad():
                ref_logits = reference(row).logits
            for logits, found in ((output.logits, sums), (ref_logits, ref_sums)):
                logps = logits[0, -count - 1 : -1].log_softmax(dim=1)
                found.append(logps.gather(1, row[0, -count:, None]).sum())
            counts.append(count)
        balances.append(balancing_loss(routers, exact.config.num_experts_per_tok))
        found, ref = (torch.stack(each).view(-1, 2) for each in (sums, ref_sums))  # (P, 2)
        if loss == "simpo":
            logps = found / torch.tensor(counts).view(-1, 2)
            each = simpo_loss(*logps.unbind(1), beta=2.0, gamma=1.0)
        else:
            ref_logps = {"ref_chosen_logps": ref[:, 0], "ref_rejected_logps": ref[:, 1]}
            each = dpo_loss(*found.unbind(1), **ref_logps, beta=0.1)
        losses.append((inputs["weights"] * each).mean())
    assert len(losses) == 2
    expected = sum(losses) / 2 + 0.5 * sum(balances) / 2
    expected.backward()
    assert logged["aux_loss"] == pytest.approx(sum(each.item() for each in balances) / 2, abs=1e-4)
    assert logged["loss"] == pytest.approx(expected.item(), abs=1e-4)
    before = AutoModelForCausalLM.from_pretrained(folder)
    largest = 0.0
    for name, weight in trainer.model.named_parameters():
        step = (before.get_parameter(name) - weight).detach().double() / 1e-2
        gradient = exact.get_parameter(name).grad
        torch.testing.assert_close(step, gradient, rtol=0, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
        largest = max(largest, float((step - gradient).abs().max()))
        if name.endswith("gate.weight"):
            assert gradient.abs().max() > 1e-2
    print(f"{kind.__name__} {loss}: gradients differ by {largest:.1e} at most")


def test_policy_without_experts_has_no_balancing_loss(tmp_path, policy, tokenizer):
    trainer = make(tmp_path, policy, tokenizer)
    trainer.train()
    assert not any("aux_loss" in entry for entry in trainer.state.log_history)


def test_normalized_rewards_choose_the_pair(tmp_path, policy, tokenizer):
    """A reward in large units decides alone unless each reward is scaled within its group."""

    def number(prompts, **kwargs):
        return [1000.0 * (index % 4) for index in range(len(prompts))]

    def flag(prompts, **kwargs):
        return [[0.0, 1.0, 9.0, 0.0][index % 4] for index in range(len(prompts))]

    chosen = {}
    for kind in ("sum_then_normalize", "normalize_then_sum"):
        seen = []

        class Choices(OnlinePreferenceTrainer):
            def _generate_and_score_completions(self, inputs, *args, seen=seen, **kwargs):
                output = super()._generate_and_score_completions(inputs, *args, **kwargs)
                seen.extend((pair.chosen, pair.rejected) for pair in self._pairs)
                return output

        options = {"multi_objective_aggregation": kind, "max_steps": 1}
        trainer = make(tmp_path, policy, tokenizer, [number, flag], kind=Choices, **options)
        trainer.train()
        chosen[kind] = set(seen)
        [entry] = logs_of(trainer)
        assert entry["reward"] == pytest.approx((1000 * 6 + 10) / 4)  # logged in the rewards' own units
    assert chosen == {"sum_then_normalize": {(3, 0)}, "normalize_then_sum": {(2, 0)}}


def test_evaluation_of_single_completions_has_rewards(tmp_path, policy, tokenizer):
    """As in GRPO: one completion for each prompt is the cheapest way to a reward. There is no pair, and no loss."""
    trainer = make(tmp_path, policy, tokenizer, num_generations_eval=1, per_device_eval_batch_size=2)
    metrics = trainer.evaluate()
    assert metrics["eval_reward"] > 0
    assert math.isnan(metrics["eval_loss"])
    assert metrics["eval_pairs/missing"] == 1.0


def test_evaluation_after_a_prediction_has_its_own_metrics(tmp_path, policy, tokenizer):
    def by_length(prompts, completions, **kwargs):
        base = [10.0 if len(prompt[0]["content"]) > 10 else -10.0 for prompt in prompts]
        return [value + len(said[0]["content"]) / 1e3 for value, said in zip(base, completions, strict=True)]

    trainer = make(tmp_path, policy, tokenizer, by_length, prompts=["hello", "a dog"] * 2)
    trainer.predict(Dataset.from_dict({"prompt": [chat("the quick brown fox")] * 2}))
    metrics = trainer.evaluate()
    assert metrics["eval_reward"] < -9
    [entry] = logs_of(trainer, "eval_reward")
    assert entry["eval_rewards/by_length/mean"] < -9


def test_completion_ends_with_any_end_token(tmp_path, policy, tokenizer):
    """A generation config may name several; a completion that ends with the second one was not cut off."""
    ends = [[7, tokenizer.eos_token_id], [8, 5], [9, 9], [10, 10]]
    found = []

    class Ended(OnlinePreferenceTrainer):
        def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list, *args, **kwargs):
            given = [ends[index % 4] for index in range(len(completion_ids_list))]
            gathered = super()._calculate_rewards(inputs, prompts, completions, given, *args, **kwargs)
            found.extend((pair.chosen, pair.rejected, pair.skipped) for pair in self._pairs)
            return gathered

    def last(completion_ids, **kwargs):
        return [float(ids[0]) for ids in completion_ids]

    trainer = make(tmp_path, policy, tokenizer, last, kind=Ended, mask_truncated_completions=True, max_steps=1)
    trainer.eos_token_ids = [tokenizer.eos_token_id, 5]  # as TRL from 1.14.2 reads them in the generation config
    trainer.train()
    assert set(found) == {(1, 0, None)}
