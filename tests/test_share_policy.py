"""Training with the pair on the policy's own base: nothing of the policy is touched, and every step is the same."""

import json

import pytest
import torch
from datasets import Dataset
from lora import save_adapter
from ranks import Run, launch
from tiny import TRAINING, chat, llama
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

from trl_cdr import CDRCallback, CDRReward, ConfigError, ModelError, OnlinePreferenceConfig, OnlinePreferenceTrainer
from trl_cdr.bench.measure import measure
from trl_cdr.scoring.memory import measured_bytes

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.compat,
    # TRL's configs set gradient_checkpointing, which transformers 5 renamed; drop when TRL follows
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*use_reentrant"),
]
TRAINERS = ("grpo", "online_dpo", "online_preference")
CRITERIA = "safety"
TENSORS = ("values", "grads", "optimizer", "random")  # of `everything`


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer):
    """A model that is everybody's base, and ends some of its completions."""
    folder = str(tmp_path_factory.mktemp("base") / "base")
    model = llama(len(tokenizer), seed=2, positions=2048, eos_token_id=tokenizer.eos_token_id)
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] *= 2
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    return save_adapter(tmp_path_factory.mktemp("adapter") / "a", base)


class Watcher(CDRReward):
    """A reward that compares the whole policy before and after each of its calls."""

    trainer = None
    calls = ()

    def __call__(self, prompts, completions, completion_ids=None, **kwargs):
        before = None if self.trainer is None else everything(self.trainer)
        rewards = super().__call__(prompts, completions, completion_ids, **kwargs)
        if before is not None:
            assert_same(before, everything(self.trainer))
        self.calls = [*self.calls, rewards]
        return rewards


def everything(trainer):
    """What a trainer has of its policy: every parameter, flag, mode, hook and number of the optimizer."""
    model, optimizer = trainer.model, trainer.optimizer
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "parameters": {name: (id(p), p.requires_grad) for name, p in model.named_parameters()},
        "values": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "grads": {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None},
        "optimizer": []
        if optimizer is None
        else [value.clone() for state in optimizer.state_dict()["state"].values() for value in state.values()],
        "modules": {
            name: (
                id(m),
                type(m).__name__,
                m.training,
                getattr(m, "gradient_checkpointing", None),
                getattr(m, "active_adapters", None),
                getattr(m, "disable_adapters", None),
                getattr(m, "merged", None),
                [list(getattr(m, kind)) for kind in hooks],
                "forward" in vars(m),
            )
            for name, m in model.named_modules()
        },
        "config": model.config.to_dict(),
        "random": torch.random.get_rng_state(),
    }


def assert_same(before, after):
    assert after.keys() == before.keys()
    for part, was in before.items():
        if part in TENSORS:
            torch.testing.assert_close(after[part], was, rtol=0, atol=0)
        else:
            assert after[part] == was, part


def make(name, out, base, reward, *, steps=3, **options):
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    with torch.random.fork_rng():
        torch.manual_seed(3)
        lora = {"peft_config": peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")}
    words = ["hello", "what is this", "the quick brown fox", "a lazy dog"] * 8
    kwargs = {
        "model": model,
        "reward_funcs": reward,
        "processing_class": tokenizer,
        "train_dataset": Dataset.from_dict({"prompt": [chat(word) for word in words]}),
        **lora,
    }
    options = {
        "per_device_train_batch_size": 4,
        "max_steps": steps,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "gradient_accumulation_steps": 2,
        **TRAINING,
        "gradient_checkpointing": True,
        **options,
    }
    if name == "online_dpo":
        trainer = OnlineDPOTrainer(args=OnlineDPOConfig(str(out), max_new_tokens=8, **options), **kwargs)
    elif name == "grpo":
        args = GRPOConfig(str(out), max_completion_length=8, num_generations=2, steps_per_generation=1, **options)
        trainer = GRPOTrainer(args=args, **kwargs)
    else:
        args = OnlinePreferenceConfig(str(out), max_completion_length=8, num_generations=2, **options)
        trainer = OnlinePreferenceTrainer(args=args, **kwargs)
    return trainer


def run(name, out, base, adapter, *, share, steps=3, callback=True, **options):
    """The trainer after a run, and the rewards of each of its calls."""
    given = {"strong": base, "weak": base, "strong_adapter": adapter, "share_policy": share, "criteria": CRITERIA}
    reward = Watcher(**given, add_special_tokens="false", gate="none")
    trainer = make(name, out, base, reward, steps=steps, **options)
    if callback:
        trainer.add_callback(CDRCallback(reward, trainer))
    reward.trainer = trainer
    trainer.train()
    return trainer, reward


def assert_equal_runs(shared, separate):
    (ours, our_reward), (theirs, their_reward) = shared, separate
    assert our_reward.calls == their_reward.calls
    assert len({value for call in our_reward.calls for value in call}) > 4
    mine, others = ours.model.state_dict(), theirs.model.state_dict()
    assert mine.keys() == others.keys()
    assert all(torch.equal(mine[key], others[key]) for key in mine)
    assert any(key.endswith("lora_B.default.weight") and mine[key].abs().max() > 0 for key in mine)
    timeless = [
        [
            {
                key: value
                for key, value in entry.items()
                if not any(w in key for w in ("time", "second", "share", "runtime"))
            }
            for entry in trainer.state.log_history
        ]
        for trainer in (ours, theirs)
    ]
    assert str(timeless[0]) == str(timeless[1])
    pair = our_reward.scorer._source.get()
    in_policy = {id(parameter) for parameter in ours.model.parameters()}
    assert all(id(parameter) in in_policy for parameter in pair.weak.lm.model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINERS)
def test_a_pair_on_the_policy_s_base_trains_the_same_policy(name, base, adapter, tmp_path):
    runs = [run(name, tmp_path / str(share), base, adapter, share=share) for share in (True, False)]
    assert_equal_runs(*runs)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grpo", "online_preference"])
def test_twenty_steps_are_the_same_in_less_memory(name, base, adapter, tmp_path, capsys):
    runs, peaks = {}, {}
    for share in (True, False):
        cost = measure(
            {
                "run": lambda share=share: runs.update(
                    {share: run(name, tmp_path / str(share), base, adapter, share=share, steps=20)}
                )
            },
            device="cpu",
            runs=0,
        )
        peaks[share] = cost["run"].peak_mb
    assert_equal_runs(runs[True], runs[False])
    held = {share: measured_bytes(*models_of(*found)) / 2**20 for share, found in runs.items()}
    weights = measured_bytes(runs[True][1].scorer._source.get().weak.lm.model) / 2**20
    with capsys.disabled():
        print(
            f"\n{name}: peak {peaks[True]:.2f} MB on the policy's base, {peaks[False]:.2f} MB beside it; "
            f"weights {held[True]:.2f} and {held[False]:.2f} MB, the base {weights:.2f} MB"
        )
    assert held[False] - held[True] == pytest.approx(weights)


def models_of(trainer, reward):
    pair = reward.scorer._source.get()
    return [trainer.model, pair.strong.lm.model, pair.weak.lm.model]


def test_grpo_needs_no_callback(base, adapter, tmp_path):
    """It hands a reward the way to its trainer; online DPO does not."""
    trainer, reward = run("grpo", tmp_path / "a", base, adapter, share=True, callback=False, steps=1)
    assert len(models_of(trainer, reward)) == 3
    with pytest.raises(ConfigError, match="no policy is known. Pass CDRCallback"):
        run("online_dpo", tmp_path / "b", base, adapter, share=True, callback=False, gradient_checkpointing=False)


def test_each_of_two_rewards_is_put_on_the_base(base, adapter, tmp_path):
    """Also where the first one's record asks for the other before that is called."""
    other = save_adapter(tmp_path / "other", base, seed=1)
    pairs = {"one": {"strong_adapter": adapter}, "two": {"strong_adapter": other}}
    rewards = [CDRReward(base, base, share_policy=True, name=name, **pair) for name, pair in pairs.items()]
    trainer = make("grpo", tmp_path / "out", base, rewards, steps=1)
    trainer.train()
    embeddings = trainer.model.get_input_embeddings().weight
    for reward in rewards:
        assert reward.scorer._source.get().weak.lm.model.get_input_embeddings().weight is embeddings
    record = json.loads((tmp_path / "out" / "cdr_labeling.json").read_text())
    assert [record["name"], *(each["name"] for each in record["others"])] == ["one_reward", "two_reward"]


def test_attaching(base, adapter, checkpoints, tmp_path):
    options = {"strong": base, "weak": base, "strong_adapter": adapter}
    reward = CDRReward(**options, share_policy=True)
    trainer = make("online_dpo", tmp_path, base, reward)
    before = everything(trainer)
    reward.attach(trainer)
    [shared] = reward([chat("hello")], ["a lazy dog"])
    assert_same(before, everything(trainer))
    beside = CDRReward(**options)
    assert [shared] == beside([chat("hello")], ["a lazy dog"])
    with pytest.raises(ConfigError, match="share_policy is not set"):
        beside.attach(trainer)
    other = make("grpo", tmp_path, checkpoints["strong"], reward)
    reward.attach(other)
    with pytest.raises(ModelError, match="the policy's base is not"):
        reward([chat("hello")], ["a lazy dog"])


@pytest.mark.slow
def test_two_processes(base, adapter, tmp_path):
    """Each shares the base of its own copy of the policy, inside of what accelerate wraps it in."""
    [ranks] = launch(Run("two_ranks_share.py", [base, adapter, str(tmp_path)]))
    for rank in ranks:
        assert rank["processes"] == 2
        assert rank["wrapper"] == "DistributedDataParallel"
        assert rank["is_shared"]
    assert ranks[0]["rewards"] != ranks[1]["rewards"]
    assert all(torch.equal(weight, ranks[1]["policy"][name]) for name, weight in ranks[0]["policy"].items())
