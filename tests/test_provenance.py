"""What labelled, wherever a trained model lies: in its folder, in its checkpoints, before a push, in its model card."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers.trainer
from datasets import Dataset
from lora import save_adapter
from tiny import TRAINING, chat, llama
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

from trl_cdr import (
    CDRCallback,
    CDRReward,
    Criteria,
    DomainCriteria,
    OnlinePreferenceConfig,
    OnlinePreferenceTrainer,
)
from trl_cdr.scoring import pair_source
from trl_cdr.training.environment import EnvironmentReward
from trl_cdr.training.provenance import PROVENANCE, labelling_section, provenance

pytestmark = [
    pytest.mark.compat,
    # TRL's configs set gradient_checkpointing, which transformers 5 renamed; drop when TRL follows
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is deprecated:FutureWarning"),
]
HOSTS = {
    "grpo": (GRPOConfig, GRPOTrainer),
    "rloo": (RLOOConfig, RLOOTrainer),
    "online_dpo": (OnlineDPOConfig, OnlineDPOTrainer),
    "online_preference": (OnlinePreferenceConfig, OnlinePreferenceTrainer),
}
CRITERIA = Criteria({"quick": DomainCriteria("be quick"), "plain": DomainCriteria()})


def make(name, tmp_path, rewards, tokenizer, **options):
    config, kind = HOSTS[name]
    policy = llama(len(tokenizer), seed=2)
    policy.config.eos_token_id = policy.generation_config.eos_token_id = tokenizer.eos_token_id
    policy.generation_config.pad_token_id = tokenizer.pad_token_id
    if name == "online_dpo":
        options |= {"max_new_tokens": 4}
    else:
        options |= {"max_completion_length": 4, "num_generations": 2}
    if name in ("grpo", "rloo"):
        options |= {"beta": 0.0}
    args = config(
        str(tmp_path),
        **{"per_device_train_batch_size": 2, "max_steps": 1, "save_strategy": "no", **TRAINING, **options},
    )
    data = Dataset.from_dict({"prompt": [chat("hello"), chat("what is this")] * 4, "kind": ["quick", "plain"] * 4})
    return kind(model=policy, reward_funcs=rewards, args=args, train_dataset=data, processing_class=tokenizer)


def read(folder):
    return json.loads((folder / PROVENANCE).read_text())


@pytest.fixture
def reward(checkpoints):
    return CDRReward(checkpoints["strong"], checkpoints["weak"], criteria=CRITERIA, router="column:kind")


@pytest.mark.parametrize(
    ("name", "has_callback"),
    [("grpo", False), ("rloo", False), ("grpo", True), ("online_dpo", True), ("online_preference", False)],
)
def test_the_final_models_folder_and_card(name, has_callback, tmp_path, reward, tokenizer, checkpoints):
    """Without a checkpoint, and in GRPO and RLOO without a callback."""
    trainer = make(name, tmp_path, reward, tokenizer)
    if has_callback:
        trainer.add_callback(CDRCallback(reward, trainer))
    trainer.train()
    trainer.save_model()
    found = read(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    trainer.save_model(output_dir=str(tmp_path / "elsewhere"))
    assert (tmp_path / "elsewhere" / "model.safetensors").is_file()
    assert read(tmp_path / "elsewhere") == found
    assert found["config"]["cdr_strong"] == checkpoints["strong"]
    assert found["models"]["weak"]["way"] == "packed"
    assert found["criteria_sha256"] == CRITERIA.digest
    for _ in range(2):  # a card that is written anew has it, once
        trainer.create_model_card(model_name="mine")
        card = (tmp_path / "README.md").read_text()
        assert card.startswith("---\n")
        assert card.count("## How it was labelled") == 1
    losses = {"online_dpo": "sigmoid", "online_preference": "simpo", "rloo": None}
    loss = losses.get(name, getattr(trainer.args, "loss_type", None))
    assert f"`{type(trainer).__name__}`{f' (loss `{loss}`)' if loss else ''} learnt from labels" in card
    assert "| strong | `strong`, sha256 `" in card  # no path of this machine
    assert checkpoints["strong"] not in card
    assert f"(SHA-256 `{CRITERIA.digest[:12]}`), domain: `column:kind` |" in card


@pytest.mark.parametrize("has_callback", [True, False])
def test_checkpoints_have_it(has_callback, tmp_path, reward, tokenizer):
    trainer = make("grpo", tmp_path, reward, tokenizer, save_strategy="steps", save_steps=1)
    if has_callback:
        trainer.add_callback(CDRCallback(reward))  # not told the trainer
    trainer.train()
    assert read(tmp_path) == read(tmp_path / "checkpoint-1")
    assert "## How it was labelled" in (tmp_path / "README.md").read_text()


def test_it_is_there_when_the_folder_is_pushed(tmp_path, reward, tokenizer, monkeypatch):
    """The upload itself needs a network."""
    pushed = {}

    def upload_folder(*, folder_path, **kwargs):
        pushed.update({path.name: path.read_bytes() for path in Path(folder_path).iterdir() if path.is_file()})

    trainer = make("grpo", tmp_path, reward, tokenizer)
    trainer.train()
    trainer.hub_model_id = "me/mine"
    monkeypatch.setattr(transformers.trainer, "upload_folder", upload_folder, raising=False)
    monkeypatch.setattr(
        transformers.trainer, "hf_api", lambda: SimpleNamespace(upload_folder=upload_folder), raising=False
    )
    trainer.push_to_hub()
    assert json.loads(pushed[PROVENANCE])["name"] == "cdr_reward"
    assert b"## How it was labelled" in pushed["README.md"]


def test_from_the_environment(tmp_path, tokenizer, checkpoints, monkeypatch):
    """As `trl grpo` and `trl rloo` have it."""
    monkeypatch.setenv("CDR_STRONG", checkpoints["strong"])
    monkeypatch.setenv("CDR_WEAK", checkpoints["weak"])
    monkeypatch.setenv("CDR_REDUCTION", "mean")
    trainer = make("rloo", tmp_path, EnvironmentReward(), tokenizer, save_strategy="steps", save_steps=1)
    trainer.train()
    assert read(tmp_path)["config"]["cdr_reduction"] == "mean"
    assert read(tmp_path / "checkpoint-1") == read(tmp_path)
    assert "`cdr_reward`" in (tmp_path / "README.md").read_text()


def test_several_rewards(tmp_path, reward, tokenizer):
    second = CDRReward(share=reward, name="second", gate="none")
    trainer = make("grpo", tmp_path, [reward, second], tokenizer)
    trainer.add_callback(CDRCallback(second, trainer))
    trainer.train()
    found = read(tmp_path)
    assert found["name"] == "cdr_reward"
    assert [other["name"] for other in found["others"]] == ["second_reward"]
    trainer.create_model_card(model_name="mine")
    card = (tmp_path / "README.md").read_text()
    assert "| | `cdr_reward` | `second_reward` |\n|---|---|---|\n" in card
    assert "| gate | surprise | none: the plain ratio |" in card


def test_a_pair_with_revisions():
    record = {
        "name": "cdr_reward",
        "config": {"cdr_gate": "typicality", "cdr_typicality": 2.0, "cdr_criteria": "safety"}
        | {"cdr_router": None, "cdr_domain": "safety"},
        "models": {"strong": {"name": "a/b", "weights": "commit c0ffee"}, "weak": {"name": "a/c", "weights": None}},
        "criteria_sha256": "0123456789abcdef",
        "versions": {"trl-cdr": "1.2.3"},
    }
    section = labelling_section([record], trainer="GRPOTrainer", loss="dapo")
    assert "`GRPOTrainer` (loss `dapo`) learnt from labels that trl-cdr 1.2.3 computed" in section
    assert "| strong | `a/b`, commit `c0ffee` |\n| weak | `a/c` |\n| gate | typicality 2.0 |\n" in section
    assert "| criteria | `safety` (SHA-256 `0123456789ab`), domain: `safety` |\n" in section
    surprise = record | {"config": record["config"] | {"cdr_gate": "surprise", "cdr_typicality": None}}
    assert "| gate | surprise |\n" in labelling_section([surprise], trainer="GRPOTrainer", loss=None)
    plain = record | {"criteria_sha256": None}
    assert "| criteria | none |" in labelling_section([plain], trainer="RLOOTrainer", loss=None)


def test_no_secret_is_written_and_everything_is_json(tmp_path, tokenizer, checkpoints):
    kwargs = {"token": "hf_secret", "dtype": torch.float32, "cache_dir": "/home/me"}
    reward = CDRReward(**checkpoints, model_init_kwargs=kwargs, gate="none")
    trainer = make("grpo", tmp_path, reward, tokenizer)
    trainer.train()
    trainer.create_model_card(model_name="mine")
    text = (tmp_path / PROVENANCE).read_text() + (tmp_path / "README.md").read_text()
    assert "hf_secret" not in text
    assert "/home/me" not in text
    assert "Infinity" not in text
    assert read(tmp_path)["config"]["cdr_model_init_kwargs"] == {"dtype": "torch.float32"}
    assert "| gate | none: the plain ratio |" in text


def test_a_model_is_saved_whatever_becomes_of_its_record(tmp_path, reward, tokenizer, monkeypatch, caplog):
    trainer = make("grpo", tmp_path, reward, tokenizer)
    trainer.train()
    reward.scorer.unload()
    monkeypatch.setattr(pair_source, "load_pair", None)  # it is not loaded again for this
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / PROVENANCE).mkdir()  # a folder: it can't be written
    trainer.save_model(str(tmp_path / "elsewhere"))
    assert (tmp_path / "elsewhere" / "model.safetensors").is_file()
    assert "cdr_labeling.json can't be written into" in caplog.text


def test_the_output_folder_of_the_moment(tmp_path, reward, tokenizer):
    trainer = make("grpo", tmp_path / "a", reward, tokenizer)
    trainer.train()
    trainer.args.output_dir = str(tmp_path / "b")
    trainer.save_model()
    trainer.create_model_card(model_name="mine")
    assert read(tmp_path / "b") == read(tmp_path / "a")
    assert "## How it was labelled" in (tmp_path / "b" / "README.md").read_text()


class Wrapper:
    """A user's own reward function, with names that ours have, too."""

    __name__ = "wrapper"

    def __init__(self, reward):
        self.reward = reward
        self.scorer = None

    def __call__(self, **kwargs):
        return [2 * reward for reward in self.reward(**kwargs)]


def test_a_users_function_that_holds_ours_is_not_ours(tmp_path, reward, tokenizer, monkeypatch):
    """It does not expect None, and is no CDRReward."""
    trainer = make("grpo", tmp_path, Wrapper(reward), tokenizer)
    trainer.train_dataset = trainer.train_dataset.map(lambda row: row | {"kind": None})  # none can be scored
    trainer.train()
    assert read(tmp_path)["name"] == "cdr_reward"


def test_an_adapter_is_recorded_beside_its_base(checkpoints, tmp_path):
    folder = save_adapter(tmp_path / "tuned", checkpoints["strong"])
    record = provenance(CDRReward(checkpoints["strong"], checkpoints["strong"], strong_adapter=folder))
    strong, weak = (record["models"][role] for role in ("strong", "weak"))
    assert (strong["name"], strong["weights"]) == (weak["name"], weak["weights"])
    assert (strong["adapter"], weak["adapter"], weak["adapter_weights"]) == (folder, None, None)
    section = labelling_section([record], trainer="GRPOTrainer", loss=None)
    assert "| strong | `strong`, sha256 `" in section
    kind, digest = strong["adapter_weights"].split(" ")
    assert f", with the adapter `tuned`, {kind} `{digest[:12]}` |" in section
    assert section.count("adapter") == 1
