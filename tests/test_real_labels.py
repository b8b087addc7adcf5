"""How the real pair's labels and gates are counted, on tiny models and by hand."""

import pytest
from tiny import chat

from trl_cdr import DensityRatioScorer
from trl_cdr.annotation.attacks import ATTACKS
from trl_cdr.demo import real_models, real_world
from trl_cdr.demo.models import Sample
from trl_cdr.demo.real_gate import measure_attacks, measure_gates
from trl_cdr.demo.real_labels import JUDGES, measure_criteria, measure_labels

BEES = next(task for task in real_world.TRAIN if task.request == "Write a sentence about bees. Do not use any commas.")
ROSES = next(
    task for task in real_world.TRAIN if task.request == "Write a sentence about roses. Do not use any commas."
)


def written(*texts):
    return [Sample(text, True) for text in texts]


@pytest.fixture
def scorer(strong, weak, tokenizer):
    return DensityRatioScorer(strong, weak, strong_tokenizer=tokenizer, weak_tokenizer=tokenizer, gate="none")


def test_pairs_are_of_right_and_wrong_and_of_nearly_one_length():
    long, short = "Bees, and this goes on for a while, fly.", "Bees, here."
    group = written(long, "Bees here.", short, "Bees are what this goes on for.", "Bees and nothing more.")
    near = real_models.choose_pairs([BEES], [group], per_prompt=2, nearest=True)
    assert [(pair.right.text, pair.wrong.text) for pair in near] == [
        ("Bees here.", short),
        ("Bees are what this goes on for.", long),
    ]
    drawn = real_models.choose_pairs([BEES], [group], per_prompt=1)
    assert [(pair.right.text, pair.wrong.text) for pair in drawn] == [("Bees here.", long)]
    assert real_models.choose_pairs([BEES], [written("Bees.", "Bees!")], per_prompt=2) == []


def test_pairs_may_differ_in_the_condition_alone():
    group = written("Birds fly.", "Bees here.", "Bees, here.")
    assert real_models.choose_pairs([BEES], [group], per_prompt=1)[0].wrong.text == "Birds fly."
    [pair] = real_models.choose_pairs([BEES], [group], per_prompt=2, only_condition=True)
    assert (pair.right.text, pair.wrong.text) == ("Bees here.", "Bees, here.")


def test_labels_are_counted_as_by_hand(scorer):
    groups = [written("Bees fly.", "Bees, fly on and on and on."), written("Roses, red.", "Roses grow.", "Roses, dry.")]
    found = measure_labels(scorer, [BEES, ROSES], groups)
    assert found["drawn"]["pairs"] == 2
    assert found["kinds"] == {"no_commas": {"gold": 0.4, "pairs": 2, "ratio": found["drawn"]["ratio"][0]}}
    scores = scorer.score(
        [BEES.prompt, BEES.prompt, ROSES.prompt, ROSES.prompt],
        ["Bees fly.", "Bees, fly on and on and on.", "Roses grow.", "Roses, red."],
    )
    wins = [scores[0].value > scores[1].value, scores[2].value > scores[3].value]
    assert found["drawn"]["ratio"][0] == sum(wins) / 2
    shorter = [
        (one.n_tokens < two.n_tokens) + (one.n_tokens == two.n_tokens) / 2
        for one, two in zip(scores[::2], scores[1::2], strict=True)
    ]
    assert found["drawn"]["shorter"][0] == sum(shorter) / 2
    likely = [one.strong_logps > two.strong_logps for one, two in zip(scores[::2], scores[1::2], strict=True)]
    assert found["drawn"]["lead"][0] == (sum(wins) - sum(likely)) / 2
    assert found["matched"]["pairs"] == 1  # the first is of 2 and of 8 words
    assert {*found["matched"]} == {"pairs", "lead", *JUDGES}
    assert found["condition"]["ratio"][0] == sum(wins) / 2  # all four are well-formed


def test_criteria_are_shown_to_the_pair_alone(scorer, monkeypatch):
    asked = []
    score = DensityRatioScorer.score

    def watch(self, prompts, completions, **kwargs):
        asked.append((prompts, kwargs["domains"]))
        return score(self, prompts, completions, **kwargs)

    monkeypatch.setattr(DensityRatioScorer, "score", watch)
    found = measure_criteria(scorer, ["bees"], [written("Bees are here.", "Bees, red bees, were here.")])
    assert all(prompt == chat("Write a sentence about bees.") for prompts, _ in asked for prompt in prompts)
    assert found["no_commas"]["pairs"] == found["colour"]["pairs"] == 1
    assert found["no_commas"]["shorter"] == [1.0, 1.0, 1.0]
    assert "question" not in found  # both fail
    assert found["all"]["pairs"] == sum(row["pairs"] for kind, row in found.items() if kind != "all")
    assert {"no_commas", "colour"} <= {domain for _, domains in asked for domain in domains or ()}


def test_attacks_are_counted_beside_right_completions(scorer):
    right = [(BEES, "Bees fly far from home."), (ROSES, "Roses grow.")]
    surprise = DensityRatioScorer(share=scorer, gate="surprise")
    found = measure_attacks({"surprise": surprise}, right)
    assert list(found) == list(ATTACKS)
    values = [score.value for score in scorer.score([BEES.prompt, ROSES.prompt], [text for _, text in right])]
    swapped = [score.value for score in scorer.score([BEES.prompt, ROSES.prompt], [text for _, text in right[::-1]])]
    wins = [attack > honest for attack, honest in zip(swapped, values, strict=True)]
    assert found["other"]["none"]["win"][0] == sum(wins) / 2
    gated = [score.gated for score in surprise.score([BEES.prompt], [" ".join(["Bees"] * 20)])]
    assert found["word"]["surprise"]["gated"] >= sum(gated) / 2
    honest = measure_gates({"none": scorer}, {"mine": [(*row, True) for row in right]})
    assert honest == {"mine": {"texts": 2, "none": [0.0, 0.0, 0.0]}}
