"""What each judge says of a completion, beside the scorer's own figures."""

import pytest
from tiny import chat

from trl_cdr import DensityRatioScorer
from trl_cdr.annotation.judges import JUDGES, judge
from trl_cdr.annotation.passes import Entry
from trl_cdr.config import CDRConfig
from trl_cdr.scoring.rewards import rewards_from_scores
from trl_cdr.scoring.score import Score

TEXTS = ["a dog and that", "the the the the the the the the", "fox"]


@pytest.mark.parametrize("gate", ["surprise", "typicality", "none"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_values_are_the_scorers(strong, weak, tokenizer, gate, reduction):
    options = {"gate": gate, "reduction": reduction}
    scorer = DensityRatioScorer(strong, weak, strong_tokenizer=tokenizer, weak_tokenizer=tokenizer, **options)
    scores = scorer.score([chat("hello")] * 3, TEXTS)
    entries = [
        Entry(score.strong_logps, score.n_tokens, score.surprise, score.survival, score.typicality, score.gated)
        for score in scores
    ]
    others = [Entry(score.weak_logps, score.n_tokens) for score in scores]
    found = judge(entries, others, TEXTS, CDRConfig("a", "b", cdr_gate=gate, cdr_reduction=reduction))
    assert list(found) == [name for name in JUDGES if gate != "none" or name not in ("reward", "gate")]
    assert found[reduction].tolist() == pytest.approx([score.value for score in scores])
    assert found["strong_sum"].tolist() == [score.strong_logps for score in scores]
    assert found["strong_mean"].tolist() == [score.strong_logps / score.n_tokens for score in scores]
    assert found["weak_sum"].tolist() == [score.weak_logps for score in scores]
    assert found["longer"].tolist() == [14, 31, 3]
    if gate != "none":
        rewards = rewards_from_scores(scores, on_unscorable="none", reduction=reduction)
        assert found["reward"].tolist() == pytest.approx(rewards)
        zero = [
            Score(0.0, n_tokens=s.n_tokens, surprise=s.surprise, survival=s.survival, gated=s.gated) for s in scores
        ]
        assert found["gate"].tolist() == rewards_from_scores(zero, on_unscorable="none", reduction=reduction)


def test_each_model_counts_its_own_tokens():
    found = judge([Entry(-6.0, 3)], [Entry(-6.0, 2)], ["abc"], CDRConfig("a", "b", cdr_gate="none"))
    assert (found["sum"].tolist(), found["mean"].tolist(), found["strong_mean"].tolist()) == ([0.0], [1.0], [-2.0])
