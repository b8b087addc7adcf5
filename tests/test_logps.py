"""Log-probabilities against float64, over odd shapes, and the bound on how many logits exist."""

import math

import pytest
import torch

from trl_cdr.scoring import logps
from trl_cdr.scoring.logps import head_logps, token_logps, token_statistics


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("count", "vocab"), [(1, 2), (3, 1), (17, 101), (64, 33)])
def test_token_logps_equals_log_softmax_in_float64(count, vocab, dtype):
    generator = torch.Generator().manual_seed(count)
    logits = (torch.randn(count, vocab, generator=generator) * 20).to(dtype)
    targets = torch.randint(vocab, (count,), generator=generator)
    expected = logits.double().log_softmax(-1)[torch.arange(count), targets]
    result = token_logps(logits, targets)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("count", [0, 1, 6, 7, 8, 50])
def test_chunks_change_nothing_and_bound_the_logits(monkeypatch, count):
    vocab, at_once = 11, 7
    monkeypatch.setattr(logps, "CPU_LOGITS", at_once * vocab + vocab - 1)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(count, 5, generator=generator), torch.randn(vocab, 5, generator=generator)
    targets = torch.randint(vocab, (count,), generator=generator)
    sizes = []

    def head(states):
        sizes.append(len(states))
        return states @ weight.T

    result = head_logps(hidden, targets, head, vocab_size=vocab)
    torch.testing.assert_close(result, token_logps(hidden @ weight.T, targets))
    assert sum(sizes) == count
    assert max(sizes, default=0) <= at_once


def test_a_vocabulary_larger_than_a_chunk_still_runs(monkeypatch):
    monkeypatch.setattr(logps, "CPU_LOGITS", 3)
    hidden = torch.eye(4)
    assert head_logps(hidden, torch.arange(4), lambda states: states, vocab_size=4).shape == (4,)


def test_chunks_are_sized_by_device():
    """An accelerator reads the head anew for each: at V = 152k some 440 positions, not 55."""
    rows = {kind: logps.logits_per_chunk(torch.device(kind)) // 151_936 for kind in ("cpu", "cuda")}
    assert rows == {"cpu": 55, "cuda": 441}


def statistics_in_float64(logits, targets):
    logps = logits.double().log_softmax(-1)
    means = (logps.exp() * logps).sum(-1)
    spreads = (logps.exp() * (logps - means[:, None]).square()).sum(-1).sqrt()
    return torch.stack([logps[torch.arange(len(targets)), targets], -means, spreads], dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("count", "vocab", "scale"), [(1, 2, 1), (17, 101, 5), (8, 32_000, 3), (4, 151_936, 10), (5, 7, 40)]
)
def test_token_statistics_equal_float64(count, vocab, scale, dtype):
    generator = torch.Generator().manual_seed(vocab)
    logits = (torch.randn(count, vocab, generator=generator) * scale).to(dtype)
    targets = torch.randint(vocab, (count,), generator=generator)
    result = token_statistics(logits, targets)
    torch.testing.assert_close(result.double(), statistics_in_float64(logits, targets), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("vocab", [2, 100, 151_936])
def test_certain_and_uniform_positions_have_no_spread(vocab):
    targets = torch.zeros(1, dtype=torch.long)
    uniform = token_statistics(torch.full((1, vocab), 3.7), targets)[0]
    assert uniform[1] == pytest.approx(math.log(vocab), rel=1e-5)
    assert uniform[2] == 0
    certain = torch.zeros(1, vocab)
    certain[0, 0] = 100
    assert token_statistics(certain, targets)[0].tolist() == pytest.approx([0, 0, 0], abs=1e-30)
    impossible = torch.zeros(1, vocab)
    impossible[0, 1] = -torch.inf
    assert token_statistics(impossible, targets).isfinite().all()
    nearly = torch.zeros(1, vocab)  # 1 - 1e-8: a spread that E[x^2] - E[x]^2 would lose
    nearly[0, 0] = math.log(vocab) + 18.4
    expected = statistics_in_float64(nearly, targets)[0, 2]
    assert float(token_statistics(nearly, targets)[0, 2]) == pytest.approx(float(expected), rel=1e-3)


def test_statistics_come_in_chunks_too(monkeypatch):
    monkeypatch.setattr(logps, "CPU_LOGITS", 20)
    logits, targets = torch.randn(9, 7, generator=torch.Generator().manual_seed(1)), torch.arange(9) % 7
    chunked = head_logps(logits, targets, lambda states: states, vocab_size=7, reduce=token_statistics)
    torch.testing.assert_close(chunked, token_statistics(logits, targets))
    assert head_logps(logits[:0], targets[:0], lambda states: states, vocab_size=7, reduce=token_statistics).shape == (
        0,
        3,
    )
