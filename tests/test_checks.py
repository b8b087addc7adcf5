"""What is found out before the first step: a name that two rewards have, a column that names no domains."""

import copy
import shutil

import pytest
from datasets import Dataset, IterableDataset
from tiny import TRAINING, chat, llama
from torch.utils.data import Dataset as TorchDataset
from trl import GRPOConfig, GRPOTrainer
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

from trl_cdr import CDRCallback, CDRReward, ConfigError, Criteria, DomainCriteria, InputError
from trl_cdr.conditioning.router import Router
from trl_cdr.training.checks import check_domains, check_name

pytestmark = [
    pytest.mark.compat,
    # TRL's configs set gradient_checkpointing, which transformers 5 renamed; drop when TRL follows
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is deprecated:FutureWarning"),
]
CRITERIA = Criteria({"quick": DomainCriteria("be quick"), "plain": DomainCriteria()})
ROUTER = Router(CRITERIA, router="column:kind")


class Holder:
    def __init__(self, *rewards):
        self.reward_funcs = list(rewards)


def check(router, train, evaluation=None):
    check_domains(router, {"train_dataset": train, "eval_dataset": evaluation})


def column(values, name="kind"):
    return Dataset.from_dict({"prompt": ["a"] * len(values), name: values})


class Streamed(TorchDataset):
    def __len__(self):
        return 1


@pytest.mark.parametrize(
    "dataset",
    [
        column(["quick", "plain", None]),
        column(["law", "quick"]).select([1]),  # the rows that are there
        Streamed(),
        IterableDataset.from_generator(lambda: iter([{"prompt": "a", "kind": "law"}])),
        None,
    ],
)
def test_what_can_be_trained_on(dataset):
    check(ROUTER, dataset, dataset)
    check(ROUTER, column(["quick"]), {"a": dataset or column(["plain"])})


def test_criteria_with_a_default_serve_every_name():
    with_default = Criteria({"quick": DomainCriteria(), "default": DomainCriteria()})
    check(Router(with_default, router="column:kind"), column(["law"]))
    for router in (None, Router(CRITERIA, domain="quick")):
        check(router, column(["law"]))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["quick", "law"], "in train_dataset the domain 'law' is not among the criteria's: quick, plain"),
        ([3, 4], "in train_dataset its domain is 3 .int., and a domain is a name"),
        ([["quick"], ["plain"]], "in train_dataset its domain is .'quick'. .list., and a domain is a name"),
    ],
)
def test_a_column_of_something_else(values, message):
    with pytest.raises(InputError, match="router is 'column:kind', and " + message):
        check(ROUTER, column(values))
    with pytest.raises(InputError, match=message.replace("train_dataset", r"eval_dataset\['a'\]")):
        check(ROUTER, column(["quick"]), {"a": column(values)})


def test_no_column():
    with pytest.raises(InputError, match="router is 'column:kind', and train_dataset has only: prompt, type. Add the"):
        check(ROUTER, column(["quick"], name="type"))
    with pytest.raises(InputError, match="and eval_dataset has only: prompt. Add the column"):
        check(ROUTER, column(["quick"]), column(["quick"]).to_iterable_dataset().remove_columns("kind"))


def test_names():
    def other(**kwargs): ...

    rewards = [CDRReward("a", "b"), CDRReward("a", "b"), other]
    check_name("cdr_reward", Holder(*rewards[1:]))
    check_name("cdr_reward", None)
    with pytest.raises(ConfigError, match="2 of the trainer's rewards are called cdr_reward: their metrics would mix"):
        check_name("cdr_reward", Holder(*rewards))


@pytest.mark.parametrize(("name", "has_callback"), [("online_dpo", True), ("grpo", True), ("grpo", False)])
def test_no_step_is_made(name, has_callback, tmp_path, checkpoints, tokenizer):
    """GRPO and RLOO show the trainer at the first call, before anything is scored."""
    reward = CDRReward(checkpoints["strong"], checkpoints["weak"], criteria=CRITERIA, router="column:kind")
    policy = llama(len(tokenizer), seed=2)
    policy.generation_config.pad_token_id = tokenizer.pad_token_id
    # What the first batch holds is right.
    data = Dataset.from_dict({"prompt": [chat("hello")] * 64, "kind": ["quick"] * 63 + ["law"]})
    options = {"per_device_train_batch_size": 2, "max_steps": 1, "seed": 3, **TRAINING}
    kwargs = {"model": policy, "reward_funcs": reward, "processing_class": tokenizer, "train_dataset": data}
    if name == "online_dpo":
        trainer = OnlineDPOTrainer(args=OnlineDPOConfig(str(tmp_path), max_new_tokens=4, **options), **kwargs)
    else:
        args = GRPOConfig(str(tmp_path), max_completion_length=4, num_generations=2, beta=0.0, **options)
        trainer = GRPOTrainer(args=args, **kwargs)
    if has_callback:
        trainer.add_callback(CDRCallback(reward, trainer))
    with pytest.raises(InputError, match="router is 'column:kind', and in train_dataset the domain 'law' is not among"):
        trainer.train()
    assert trainer.state.global_step == 0


def same(checkpoints, strong, tokenizer, tmp_path):
    """Pairs of one set of weights: by a name twice, by a copy of the folder, as objects."""
    folder = shutil.copytree(checkpoints["strong"], tmp_path / "copy")
    tokenizers = {"strong_tokenizer": tokenizer, "weak_tokenizer": tokenizer}
    yield CDRReward(checkpoints["strong"], checkpoints["strong"])
    yield CDRReward(checkpoints["strong"], folder)
    yield CDRReward(strong, copy.deepcopy(strong), **tokenizers)
    yield CDRReward(strong, checkpoints["strong"], **tokenizers)


@pytest.mark.parametrize("has_callback", [True, False])
def test_equal_models_raise_in_a_trainer(has_callback, checkpoints, strong, tokenizer, tmp_path):
    for reward in same(checkpoints, strong, tokenizer, tmp_path):
        assert reward([chat("hello")], ["a"])[0] <= 0  # outside trainers nothing learns from it
        trainer = GRPOTrainer(
            model=llama(len(tokenizer), seed=2),
            reward_funcs=reward,
            args=GRPOConfig(
                str(tmp_path / "out"),
                beta=0.0,
                num_generations=2,
                per_device_train_batch_size=2,
                max_steps=1,
                max_completion_length=4,
                **TRAINING,
            ),
            train_dataset=Dataset.from_dict({"prompt": [chat("hello")] * 2}),
            processing_class=tokenizer,
        )
        if has_callback:
            trainer.add_callback(CDRCallback(reward, trainer))
        with pytest.raises(ConfigError, match="have the same weights: every log-ratio is 0.* Pass two models"):
            trainer.train()
