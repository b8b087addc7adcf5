"""Training on a pair that is on servers: from YAML alone, and beside other rewards that wait for something."""

import asyncio
import json
import threading
from pathlib import Path

import pytest
import waiting
import yaml
from datasets import Dataset
from tiny import TRAINING, llama
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from vllm_stand_in import StandIn

from trl_cdr import CDRCallback, CDRReward, OnlinePreferenceConfig, OnlinePreferenceTrainer
from trl_cdr.cli import main

pytestmark = [
    pytest.mark.compat,
    # TRL's configs set gradient_checkpointing, which transformers 5 renamed; drop when TRL follows
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is deprecated:FutureWarning"),
]
WORDS = ["hello", "what is this", "the quick brown fox", "a lazy dog"]
TRAINERS = {
    "grpo": (GRPOConfig, GRPOTrainer),
    "rloo": (RLOOConfig, RLOOTrainer),
    "online_preference": (OnlinePreferenceConfig, OnlinePreferenceTrainer),
}
OPTIONS = {
    "per_device_train_batch_size": 4,
    "max_completion_length": 4,
    "num_generations": 2,
    "max_steps": 1,
    "save_strategy": "no",
    "logging_steps": 1,
    **TRAINING,
}


@pytest.fixture(scope="module")
def addresses(strong, weak, tokenizer, checkpoints):
    servers = {
        role: StandIn(model, tokenizer, role, root=checkpoints[role])
        for role, model in (("strong", strong), ("weak", weak))
    }
    yield {role: server.address for role, server in servers.items()}
    for server in servers.values():
        server.kill()


@pytest.mark.parametrize("name", TRAINERS)
def test_an_awaited_reward_is_the_same_beside_another_at_once(name, tmp_path, checkpoints, addresses, tokenizer):
    here = CDRReward(**checkpoints, gate="none")
    reward, calls, meeting = CDRReward(**addresses, gate="none"), [], threading.Barrier(2)
    called = reward.scorer.score

    def score(*args, **kwargs):
        meeting.wait(60)  # until the other one runs, too
        return called(*args, **kwargs)

    reward.scorer.score = score

    async def other(prompts, completions, completion_ids, **kwargs):
        await asyncio.to_thread(meeting.wait, 60)
        calls.append((prompts, completions, completion_ids))
        return [0.0] * len(prompts)

    config, trainer = TRAINERS[name]
    policy = llama(len(tokenizer), seed=2)
    policy.config.eos_token_id = policy.generation_config.eos_token_id = tokenizer.eos_token_id
    trainer = trainer(
        model=policy,
        processing_class=tokenizer,
        reward_funcs=[reward.awaitable, other],
        args=config(str(tmp_path), **OPTIONS, **({"beta": 0.0} if name == "rloo" else {})),
        train_dataset=Dataset.from_dict({"prompt": WORDS * 2}),
    )
    trainer.add_callback(CDRCallback(reward, trainer))
    trainer.train()
    logged = {key: value for entry in trainer.state.log_history for key, value in entry.items()}
    expected = here(*calls[0], trainer_state=trainer.state)  # strings are raw text in a trainer
    assert len(calls) == 1
    assert logged["rewards/cdr_reward/mean"] == pytest.approx(sum(expected) / len(expected), abs=1e-3)
    assert "cdr/gated" in logged
    labelled = json.loads((tmp_path / "cdr_labeling.json").read_text())
    assert labelled["models"]["strong"]["name"] == "strong"


@pytest.mark.parametrize("name", ["grpo", "online_dpo"])
def test_from_yaml(name, tmp_path, addresses, checkpoints, capsys):
    """Online DPO calls a reward and can't await it."""
    rows = [{"prompt": word} for word in WORDS * 2]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    policy = llama(322, seed=2)
    policy.save_pretrained(tmp_path / "policy")
    for file in Path(checkpoints["strong"]).glob("*token*"):
        (tmp_path / "policy" / file.name).write_bytes(file.read_bytes())
    own = {"max_completion_length", "num_generations"}
    options = {key: value for key, value in OPTIONS.items() if key not in own} | {"max_new_tokens": 4}
    options = (OPTIONS if name == "grpo" else options) | {
        "trainer": name,
        "model_name_or_path": str(tmp_path / "policy"),
        "dataset_name": str(tmp_path / "prompts.jsonl"),
        "output_dir": str(tmp_path / "out"),
        **{f"cdr_{role}": address for role, address in addresses.items()},
        "cdr_gate": "none",
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(options))
    main(["train", "--config", str(tmp_path / "run.yaml")])
    said = capsys.readouterr()
    assert f"loading the pair: strong {addresses['strong']}, weak {addresses['weak']}" in said.err
    assert f"1 steps of {name}" in said.out
    options.pop("cdr_gate")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(options))
    with pytest.raises(SystemExit):
        main(["train", "--config", str(tmp_path / "run.yaml")])
    assert "Write cdr_gate='none'" in capsys.readouterr().err


def test_what_awaiting_saves_can_be_measured(capsys):
    waiting.main(0.0, 1)
    assert capsys.readouterr().out.count(" s\n") == 7
