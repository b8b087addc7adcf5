"""Log-probabilities against float64, over odd shapes, and the bound on how many logits exist."""

import pytest
import torch

from trl_cdr.scoring import logps
from trl_cdr.scoring.logps import head_logps, token_logps


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
    monkeypatch.setattr(logps, "LOGITS_PER_CHUNK", at_once * vocab + vocab - 1)
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
    monkeypatch.setattr(logps, "LOGITS_PER_CHUNK", 3)
    hidden = torch.eye(4)
    assert head_logps(hidden, torch.arange(4), lambda states: states, vocab_size=4).shape == (4,)
