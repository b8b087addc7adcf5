"""The exact test of a completion: against float64, its bound on samples of the model's own, and the reward by hand."""

import math

import pytest
import torch
from oracle import next_logps, surprise_terms, worst_window
from tiny import llama

from trl_cdr.scoring import logps as chunks
from trl_cdr.scoring import surprise
from trl_cdr.scoring.logps import head_logps, token_logps
from trl_cdr.scoring.surprise import is_foreign, largest_window, surprise_reward, surprise_statistics, survival


def draw(count, vocab, *, scale, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, vocab, generator=generator) * scale, torch.randint(vocab, (count,), generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shift", [0, 300])
@pytest.mark.parametrize(
    ("count", "vocab", "scale"), [(1, 2, 1), (17, 101, 5), (8, 32_000, 3), (4, 151_936, 10), (3, 49_152, 0)]
)
def test_statistics_equal_float64(count, vocab, scale, shift, dtype):
    logits, targets = draw(count, vocab, scale=scale)
    logits = (logits + shift).to(dtype)
    result = surprise_statistics(logits, targets, end_ids=(0, vocab - 1))
    own, terms, ends = surprise_terms(logits.double().log_softmax(-1), targets, {0, vocab - 1})
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), torch.stack([own, terms, ends], 1), rtol=1e-5, atol=1e-4)
    assert torch.equal(result[:, 0], token_logps(logits, targets))  # to the bit: equal models have the ratio 0


def test_the_models_own_tokens_have_the_expectation_one():
    """E exp(c / 2) = 1 under every distribution, flat or nearly certain: what the bound rests on."""
    for scale in (0, 0.5, 3, 20):
        logits, _ = draw(4, 300, scale=scale)
        for row in logits:
            everything = surprise_statistics(row.expand(300, -1), torch.arange(300), end_ids=())
            expectation = (everything[:, 0].double().exp() * (everything[:, 1].double() / 2).exp()).sum()
            assert float(expectation) == pytest.approx(1, abs=1e-4)


def examine_samples(model, *, end_ids, temperature=1.0, count=400, length=24):
    """C, S and the tokens of texts that the model draws, each up to its own end or the length."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.full((count, 1), 7)
    for _ in range(length):
        probabilities = (next_logps(model, ids)[:, -1] / temperature).softmax(-1)
        ids = torch.cat([ids, torch.multinomial(probabilities, 1, generator=generator)], dim=1)
    found = []
    for logits, row in zip(next_logps(model, ids[:, :-1]).float(), ids[:, 1:].tolist(), strict=True):
        stop = next((place + 1 for place, token in enumerate(row) if token in end_ids), None)
        said = torch.tensor(row[:stop])
        kept = surprise_statistics(logits[: len(said)], said, end_ids=end_ids)
        lived = survival(kept[:, 2], is_finished=stop is not None)
        found.append((largest_window(kept[:, 1]), lived, len(said)))
    return found


@pytest.mark.parametrize("sharpness", [1, 4])
def test_the_bounds_hold_for_samples_of_the_models_own(sharpness):
    """Of 400 texts; four standard errors of slack, since it is a sample."""
    model, ends = llama(60, seed=3), (1, 2)
    with torch.no_grad():
        model.lm_head.weight *= sharpness
    own = examine_samples(model, end_ids=ends)
    assert len({n for _, _, n in own}) > 10  # some ended early, some were cut off

    def allowed(level):
        return level + 4 * (level * (1 - level) / len(own)) ** 0.5

    for level in (0.5, 0.2, 0.05, 0.01):
        assert sum(worst > 2 * math.log(n / level) for worst, _, n in own) / len(own) <= allowed(level)
        assert sum(lived > math.log(1 / level) for _, lived, _ in own) / len(own) <= allowed(level)
    assert sum(is_foreign(*each) for each in own) / len(own) <= allowed(0.02)
    assert sum(lived > math.log(2) for _, lived, _ in own) / len(own) > 0.1  # the bound is not loose


def test_what_is_drawn_at_temperature_2_is_foreign():
    model = llama(60, seed=3)
    with torch.no_grad():
        model.lm_head.weight *= 4
    hot = examine_samples(model, end_ids=(1, 2), temperature=2.0, count=200)
    assert sum(is_foreign(*each) for each in hot) / len(hot) > 0.3


def test_certain_uniform_and_broken_positions():
    certain = torch.zeros(2, 50_000)
    certain[:, 0] = 100
    kept = surprise_statistics(certain, torch.tensor([0, 1]), end_ids=(0,))
    assert kept[:, 1].tolist() == pytest.approx([0, 100], abs=1e-4)
    assert kept[:, 2].tolist() == pytest.approx([24 * math.log(2)] * 2)  # going on there counts, and stays finite
    one_hot = torch.full((1, 50), -torch.inf)
    one_hot[0, 3] = 0
    assert surprise_statistics(one_hot, torch.tensor([3]), end_ids=(4,)).tolist() == [[0, 0, 0]]
    assert surprise_statistics(one_hot, torch.tensor([4]), end_ids=(4,))[0, :2].tolist() == [-math.inf, math.inf]
    uniform = surprise_statistics(torch.full((1, 64), 3.7), torch.tensor([5]), end_ids=(0, 1))
    assert uniform[0].tolist() == pytest.approx([-math.log(64), 0, -math.log(1 - 2 / 64)], abs=1e-5)
    for broken in (torch.nan, torch.inf):
        assert surprise_statistics(torch.full((2, 9), broken), torch.tensor([0, 1]), end_ids=(0,)).isnan().all()


def test_nothing_of_the_logits_is_changed_and_chunks_change_nothing(monkeypatch):
    monkeypatch.setattr(chunks, "CPU_LOGITS", 20)
    logits, targets = draw(9, 7, scale=2)
    before = logits.clone()

    def reduce(logits, targets):
        return surprise_statistics(logits, targets, end_ids=(1, 3))

    whole = reduce(logits, targets)
    assert torch.equal(logits, before)
    torch.testing.assert_close(head_logps(logits, targets, lambda states: states, vocab_size=7, reduce=reduce), whole)
    assert head_logps(logits[:0], targets[:0], lambda states: states, vocab_size=7, reduce=reduce).shape == (0, 3)
    assert surprise_statistics(logits, targets, end_ids=()).shape == (9, 2)


@pytest.mark.parametrize("length", [1, 2, 3, 10, 60])
def test_the_largest_window_is_the_largest_of_all(length):
    for seed in range(20):
        terms = torch.randn(length, generator=torch.Generator().manual_seed(seed)) * 5 - 1
        assert largest_window(terms) == pytest.approx(worst_window(terms.tolist()), abs=1e-9)
    assert largest_window(-torch.ones(length)) == 0


def test_windows_are_summed_in_float64():
    terms = torch.full((100_001,), 0.1)
    terms[0] = 1e7
    assert largest_window(terms) == pytest.approx(1e7 + 0.1 * 100_000, abs=1e-2)


def test_survival_by_hand():
    terms = torch.tensor([1.0, 2.0, 16.0])
    assert survival(terms, is_finished=True) == 3
    assert survival(terms, is_finished=False) == 19
    assert survival(terms[:1], is_finished=True) == 0  # the end of the turn alone


LEAST = 2 * math.log(10 / 0.01)  # of 10 tokens


@pytest.mark.parametrize(
    ("worst", "lived", "foreign"),
    [
        (LEAST - 0.01, 4.6, False),
        (LEAST + 0.01, 0.0, True),
        (0.0, 4.61, True),
        (LEAST - 0.01, None, False),
        (LEAST + 0.01, None, True),
    ],
)
def test_the_bounds(worst, lived, foreign):
    assert is_foreign(worst, lived, 10) is foreign


def rule(value, worst, lived, *, reduction="sum", n_tokens=10, is_cut_off=False):
    return surprise_reward(
        value, surprise=worst, survived=lived, n_tokens=n_tokens, is_cut_off=is_cut_off, reduction=reduction
    )


def test_the_reward_by_hand():
    free = 2 * math.log(10)
    assert rule(3.0, 0.0, 0.0) == 3
    assert rule(3.0, 2.0, 4.0) == 2.5  # within what the model's own samples may do: a quarter of C
    assert rule(3.0, 8.0, None) == pytest.approx(3 - 2 - (8 - free))
    assert rule(-3.0, 8.0, None) == pytest.approx(-3 - 2 - (8 - free))
    assert rule(50.0, 20.0, None) == pytest.approx(-(20 - free))  # foreign: whatever the ratio
    assert rule(-1.0, 20.0, None) == pytest.approx(-1 - 5 - (20 - free))
    assert rule(3.0, 2.0, 6.0) == -6  # outlived
    assert rule(3.0, 20.0, 6.0) == pytest.approx(3 - 5 - (20 - free) - 6)
    assert rule(3.0, 1.0, None, n_tokens=1) == pytest.approx(3 - 0.25 - 1)


def test_a_mean_is_the_sum_by_token():
    for value, worst, lived in ((3.0, 2.0, 0.0), (30.0, 8.0, 5.0), (-3.0, 20.0, None), (3.0, 20.0, 1.0)):
        assert rule(value / 10, worst, lived, reduction="mean") == pytest.approx(rule(value, worst, lived) / 10)


@pytest.mark.parametrize("share", [0.25, 0.0])
@pytest.mark.parametrize("caps", [True, False])
def test_the_candidates_are_two_constants(monkeypatch, share, caps):
    """What the experiment chooses among."""
    monkeypatch.setattr(surprise, "_SHARE", share)
    monkeypatch.setattr(surprise, "_CAPS_UNFINISHED", caps)
    assert rule(3.0, 2.0, 0.0) == 3 - 2 * share
    assert rule(3.0, 2.0, 0.0, is_cut_off=True) == (0 if caps else 3 - 2 * share)
    assert rule(-3.0, 2.0, 0.0, is_cut_off=True) == -3 - 2 * share
