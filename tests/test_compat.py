"""The same scores on every supported version: weights are set by name, not by a library's initialisation."""

import pickle
import threading

import pytest
import torch
from tiny import answer, byte_tokenizer, chat, llama

from trl_cdr import CDRReward, DensityRatioScorer

pytestmark = pytest.mark.compat
# Nats, and standard deviations per token: value, strong_logps, weak_logps, typicality.
VALUES = [
    (5.094576, -27.371089, -32.465666, -1.592305),
    (-7.528908, -61.979871, -54.450962, -1.626834),
    (-1.646076, -21.209025, -19.56295, -1.686739),
    (-6.3302, -35.573522, -29.243322, -1.783853),
]


@pytest.fixture(scope="module")
def fixed_pair():
    """Two models whose weights no library's initialisation decides on."""
    pair = []
    for seed in (0, 1):
        model = llama(322, seed=seed, positions=512)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, weight in sorted(model.named_parameters()):
                if "norm" not in name:
                    weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
        pair.append(model)
    return pair


def test_scores_are_the_same_everywhere(fixed_pair):
    tokenizer = byte_tokenizer()
    scorer = DensityRatioScorer(*fixed_pair, strong_tokenizer=tokenizer, weak_tokenizer=tokenizer)
    prompts = [chat("hello"), chat("hello"), "the quick brown", chat("system:be quick", "what", "this", "and that")]
    scores = scorer.score(prompts, ["world", "é 日本", " fox", "jumps over"], finished=[True, False, True, True])
    found = [(score.value, score.strong_logps, score.weak_logps, score.typicality) for score in scores]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(VALUES), rtol=0, atol=5e-5)  # processors differ too


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
