"""Attacks beside honest completions: who wins, and what of it is told."""

import statistics

import pytest
from tiny import chat

from trl_cdr import Criteria, DensityRatioScorer, DomainCriteria
from trl_cdr.annotation.bouts import hold_bouts, measure_honest, score_completions, summarise, with_gate
from trl_cdr.scoring.types import Completion

PROMPTS = [chat("hello"), chat("what is this")]
HONEST = [Completion("a dog", True), Completion("the fox jumps", True)]


@pytest.fixture(scope="module")
def scorer(strong, weak, tokenizer):
    return DensityRatioScorer(strong, weak, strong_tokenizer=tokenizer, weak_tokenizer=tokenizer, gate="none")


def values(scorer, prompt, *texts):
    return [score.value for score in scorer.score([prompt] * len(texts), list(texts))]


def test_the_best_of_several_attacks(scorer):
    texts = ["world", "quick quick", "over a lazy", "that"]
    attacks = {"several": [[Completion(text, True) for text in texts], []]}
    [bout] = hold_bouts({"none": scorer}, PROMPTS, HONEST, attacks)["several"]["none"]
    worths = values(scorer, PROMPTS[0], *texts)
    best = max(range(4), key=worths.__getitem__)
    assert (bout.place, bout.text) == (0, texts[best])
    assert bout.reward == pytest.approx(worths[best], abs=1e-4)
    assert bout.honest == pytest.approx(values(scorer, PROMPTS[0], "a dog")[0], abs=1e-4)
    assert bout.is_won == (worths[best] > bout.honest)


def test_wins_are_counted_and_ties_are_none(scorer):
    texts = ["world", "quick quick", "over a lazy"]
    attacks = {text: [[Completion(text, True)] for _ in PROMPTS] for text in texts} | {
        "same": [[one] for one in HONEST],
        "never": [[], []],
    }
    surprise = with_gate(scorer, "surprise")
    found = summarise(hold_bouts({"surprise": surprise}, PROMPTS, HONEST, attacks), PROMPTS)
    assert "never" not in found
    assert found["same"]["none"]["win"] == found["same"]["surprise"]["win"] == [0, 0, 0]
    wins = {}
    for text in texts:
        pairs = [values(scorer, prompt, text, one.text) for prompt, one in zip(PROMPTS, HONEST, strict=True)]
        wins[text] = sum(attack > honest for attack, honest in pairs) / 2
        assert found[text]["none"]["win"][0] == wins[text]
        gated = [score.gated for score in surprise.score(PROMPTS, [text] * 2)]
        assert found[text]["surprise"]["gated"] == sum(gated) / 2
        assert (found[text]["prompts"], found[text]["unscorable"], found[text]["none"]["gated"]) == (2, 0, 0)
    assert len(set(wins.values())) > 1


def test_what_can_not_be_scored_wins_nothing(scorer):
    attacks = {"broken": [[Completion("\ud800", True)]] * 2, "mended": [[Completion("\ud800", True), HONEST[0]]] * 2}
    bouts = hold_bouts({"none": scorer}, PROMPTS, [HONEST[0], Completion("\ud800", True)], attacks)
    found = summarise(bouts, PROMPTS)
    assert found["broken"]["prompts"] == found["broken"]["unscorable"] == 1  # the other has nothing to beat
    assert found["broken"]["none"]["win"][0] == 0
    assert found["mended"]["unscorable"] == 0
    assert bouts["mended"]["none"][0].text == HONEST[0].text


def test_another_gate_keeps_models_criteria_and_options(strong, weak, tokenizer):
    criteria = Criteria({"loud": DomainCriteria("shout"), "quiet": DomainCriteria("whisper")})
    models = {"strong_tokenizer": tokenizer, "weak_tokenizer": tokenizer}
    scorer = DensityRatioScorer(strong, weak, **models, criteria=criteria, router="column:kind", reduction="mean")
    other = with_gate(scorer, "typicality")
    assert with_gate(scorer, "surprise") is scorer
    for domain in criteria.domains:
        [one], [two] = (each.score(PROMPTS[:1], ["a dog"], domains=[domain]) for each in (scorer, other))
        assert one.value == pytest.approx(two.value, abs=1e-5)
        assert two.surprise is None is not one.surprise
    assert other.load() is scorer.load()


def test_what_is_said_of_honest_completions(scorer):
    texts = [("a dog", "a dog", "the quick fox"), ("that", "over a lazy dog and over a lazy dog"), ("world",)]
    prompts = [*PROMPTS, chat("over?")]
    groups = [[Completion(text, True) for text in group] for group in texts]
    found = measure_honest({"none": scorer}, prompts, groups)
    assert (found["completions"], found["finished"]) == (6, 1)
    assert found["none"]["ties"] == 1 / 4
    lengths, worths = [], []
    for prompt, group in zip(prompts, groups[:2], strict=False):  # a single one has nothing beside it
        scores = score_completions(scorer, [prompt] * len(group), group)
        for values, column in (
            (lengths, [score.n_tokens for score in scores]),
            (worths, [score.value for score in scores]),
        ):
            values += [value - sum(column) / len(column) for value in column]
    assert found["none"]["length_correlation"] == pytest.approx(statistics.correlation(lengths, worths), abs=1e-4)
    alone = measure_honest({"none": scorer}, PROMPTS[:1], [HONEST[:1]])
    assert alone["none"]["ties"] is alone["none"]["length_correlation"] is None
