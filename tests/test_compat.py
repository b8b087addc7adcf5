"""The same scores on every supported version: weights are set by name, not by a library's initialisation."""

import pickle
import random
import threading

import pytest
import torch
from datasets import Dataset
from tiny import TRAINING, answer, byte_tokenizer, chat, llama

from trl_cdr import CDRReward, DensityRatioScorer, OnlinePreferenceConfig, OnlinePreferenceTrainer

pytestmark = pytest.mark.compat
# Nats, and standard deviations per token: value, strong_logps, weak_logps, typicality.
VALUES = [
    (5.094576, -27.371089, -32.465666, -1.592305),
    (-7.528908, -61.979871, -54.450962, -1.626834),
    (-1.646076, -21.209025, -19.56295, -1.686739),
    (-6.3302, -35.573522, -29.243322, -1.783853),
]
# Of the same completions, nats: surprise, survival.
SURPRISES = [(7.11022, 0.00273), (17.15618, 0.01565), (6.30564, 0.00272), (10.0129, 0.01985)]
# Loss and reward margin of the first steps.
STEPS = {
    "simpo": [(2.2018, 12.479), (1.0096, 13.136), (1.1995, 13.052)],
    "dpo": [(0.6931, 12.479), (0.6514, 18.427), (0.7222, 12.387)],
}


class Draws:
    """`torch.multinomial` with numbers that no version of torch decides on."""

    def __init__(self, seed):
        self.rng = random.Random(seed)

    def __call__(self, probabilities, num_samples):
        assert num_samples == 1
        places = torch.tensor([[self.rng.random()] for _ in probabilities]) * probabilities.sum(-1, keepdim=True)
        return (probabilities.cumsum(-1) < places).sum(-1, keepdim=True)


def fixed_model(seed):
    """A model whose weights no library's initialisation decides on."""
    model = llama(322, seed=seed, positions=512)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if "norm" not in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    return model


@pytest.fixture(scope="module")
def fixed_pair():
    return [fixed_model(0), fixed_model(1)]


def test_scores_are_the_same_everywhere(fixed_pair):
    tokenizer = byte_tokenizer()
    tokenizers = {"strong_tokenizer": tokenizer, "weak_tokenizer": tokenizer}
    scorer = DensityRatioScorer(*fixed_pair, **tokenizers, gate="typicality", string_prompts="text")
    prompts = [chat("hello"), chat("hello"), "the quick brown", chat("system:be quick", "what", "this", "and that")]
    scores = scorer.score(prompts, ["world", "é 日本", " fox", "jumps over"], finished=[True, False, True, True])
    found = [(score.value, score.strong_logps, score.weak_logps, score.typicality) for score in scores]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(VALUES), rtol=0, atol=5e-5)  # processors differ too
    exact = DensityRatioScorer(share=scorer, gate="surprise")
    scores = exact.score(prompts, ["world", "é 日本", " fox", "jumps over"], finished=[True, False, True, True])
    found = [(score.surprise, score.survival) for score in scores]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(SURPRISES), rtol=0, atol=5e-5)


# TRL's configs set gradient_checkpointing, which transformers 5 renamed; drop when TRL follows
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("loss", STEPS)
def test_online_preferences_are_the_same_everywhere(loss, fixed_pair, tmp_path, monkeypatch):
    """Generation, rewards, pairs, losses and updates."""
    monkeypatch.setattr(torch, "multinomial", Draws(0))
    tokenizer, policy = byte_tokenizer(), fixed_model(2)
    policy.config.eos_token_id = policy.generation_config.eos_token_id = tokenizer.eos_token_id
    policy.generation_config.pad_token_id = tokenizer.pad_token_id
    policy.save_pretrained(tmp_path / "policy")
    args = OnlinePreferenceConfig(
        str(tmp_path / "out"),
        preference_loss=loss,
        num_generations=4,
        per_device_train_batch_size=16,
        max_steps=6,
        max_completion_length=8,
        learning_rate=1e-3,
        **TRAINING,
        save_strategy="no",
        logging_steps=1,
    )
    trainer = OnlinePreferenceTrainer(
        str(tmp_path / "policy"),
        CDRReward(*fixed_pair, strong_tokenizer=tokenizer, weak_tokenizer=tokenizer, gate="none"),
        args,
        train_dataset=Dataset.from_dict(
            {"prompt": [chat(word) for word in ("hello", "what is this", "the quick brown fox", "a lazy dog") * 8]}
        ),
        processing_class=tokenizer,
    )
    trainer.train()
    found = [(log["loss"], log["pairs/margin"]) for log in trainer.state.log_history if "loss" in log]
    torch.testing.assert_close(torch.tensor(found[:3]), torch.tensor(STEPS[loss]), rtol=0, atol=2e-3)


def test_calls_from_several_threads_and_after_pickling(checkpoints):
    """Asynchronous GRPO calls from threads of a spawned child, without trainer_state."""
    reward = pickle.loads(pickle.dumps(CDRReward(checkpoints["strong"], checkpoints["weak"])))
    rows = {"prompts": [chat("hello")] * 2, "completions": [answer("world"), answer("fox")]}
    results = {}

    def call(index):
        results[index] = reward(**rows, environments=None)

    threads = [threading.Thread(target=call, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all(values == results[0] for values in results.values())
