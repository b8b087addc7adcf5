"""The reward's arithmetic, by hand."""

import math

import pytest
import torch

from trl_cdr.scoring.logps import token_statistics
from trl_cdr.scoring.ratio import gate, log_ratio, sum_logps, typicality


def test_by_hand():
    strong, weak = torch.tensor([-1.0, -2.0]), torch.tensor([-3.0, -1.0, -2.0])
    assert log_ratio(strong, weak, "sum") == 3.0
    assert log_ratio(strong, weak, "mean") == pytest.approx(-1.5 + 2.0)
    assert log_ratio(weak, strong, "sum") == -3.0


def test_sums_are_float64():
    """A float32 sum would lose a good part of the small steps."""
    logps = torch.full((100_001,), -0.1)
    logps[0] = -1e6
    assert sum_logps(logps) == pytest.approx(-1e6 - 0.1 * 100_000, abs=1e-2)


def statistics(logits, targets):
    return token_statistics(torch.tensor(logits), torch.tensor(targets))


def test_typicality_by_hand():
    """With 1/2, 1/4, 1/4: H = 1.5 log 2, and -log p is log 2 or 2 log 2, each half of the time: s = log 2 / 2."""
    logits = [[math.log(0.5), math.log(0.25), math.log(0.25)]]
    assert typicality(statistics(logits, [0])) == pytest.approx(1)
    assert typicality(statistics(logits, [1])) == pytest.approx(-1)
    assert typicality(statistics(logits * 2, [0, 1])) == pytest.approx(0, abs=1e-6)
    certain = [[100.0, 0.0, 0.0]]
    # Where the model is certain a right token adds nothing; a wrong one adds what it is worth.
    assert typicality(statistics(logits + certain, [1, 0])) == pytest.approx(-1)
    assert typicality(statistics(logits + certain, [0, 1])) == pytest.approx(1 - 100 / (math.log(2) / 2), rel=1e-5)


def test_typicality_without_spread():
    assert typicality(statistics([[0.0] * 5] * 3, [0, 2, 4])) == 0  # a uniform model finds every text typical
    assert typicality(statistics([[100.0, 0.0]] * 3, [0, 0, 0])) == 0
    assert typicality(statistics([[100.0, 0.0]] * 3, [0, 1, 0])) == -math.inf


def test_own_samples_are_typical_at_any_length_and_unlikely_texts_are_not():
    generator = torch.Generator().manual_seed(0)
    for length in (1, 10, 100):
        logits = torch.randn(400, length, 50, generator=generator) * 2
        drawn = torch.distributions.Categorical(logits=logits)
        own = torch.multinomial(drawn.probs.flatten(0, 1), 1, generator=generator).view(400, length)
        values = torch.tensor([typicality(token_statistics(row, said)) for row, said in zip(logits, own, strict=True)])
        assert abs(values.mean()) < 4 / (400 * length) ** 0.5
        least = logits.argmin(-1)
        assert max(typicality(token_statistics(row, said)) for row, said in zip(logits, least, strict=True)) < -1.5
    twice = torch.cat([logits[0], logits[0]]), torch.cat([own[0], own[0]])
    assert typicality(token_statistics(*twice)) == pytest.approx(float(values[0]))  # length alone changes nothing


@pytest.mark.parametrize(
    ("value", "gated", "reward"), [(3.0, True, -1.0), (-2.0, True, -3.0), (3.0, False, 3.0), (-2.0, False, -2.0)]
)
def test_gate(value, gated, reward):
    assert gate(value, gated) == reward
