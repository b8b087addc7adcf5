"""A reward under attack, on tiny random models; their gates stop nearly everything."""

import json

import pytest
from tiny import byte_tokenizer, chat

from trl_cdr import ConfigError, Criteria, DensityRatioScorer, DomainCriteria, InputError, ModelError
from trl_cdr.annotation.attacks import ATTACKS
from trl_cdr.annotation.probe import GATES, SEARCHES, probe

PROMPTS = [chat("hello"), chat("what is this"), chat("over?")]
COMPLETIONS = ["a dog and that", "the fox jumps over", "and a quick brown dog"]
SMALL = {"best_of": 3, "search_budget": 24, "max_new_tokens": 5}


@pytest.fixture(scope="module")
def scorer(strong, weak, tokenizer):
    return DensityRatioScorer(strong, weak, strong_tokenizer=tokenizer, weak_tokenizer=tokenizer, gate="surprise")


@pytest.fixture(scope="module")
def found(scorer):
    return probe(scorer, PROMPTS, COMPLETIONS, **SMALL)


def test_every_attack_on_every_gate(found):
    assert list(found["attacks"]) == [*ATTACKS, *SEARCHES]
    for name, one in found["attacks"].items():
        assert (one["prompts"], one["unscorable"]) == (3, 0), name
        for gate in GATES:
            mean, low, high = one[gate]["win"]
            assert 0 <= low <= mean <= high <= 1
    assert found["attacks"]["search_ratio"]["none"]["win"] == [1, 1, 1]
    assert (found["gate"], found["prompts"], found["left_out"]) == ("surprise", 3, {})
    assert found["honest"]["completions"] == 3
    assert json.loads(json.dumps(found)) == found


def test_the_figure_is_of_the_scorers_gate_and_without_the_best_of_n(found):
    rates = {name: one["surprise"]["win"][0] for name, one in found["attacks"].items() if name != "best_of"}
    assert found["win"]["mean"] == pytest.approx(sum(rates.values()) / len(rates))
    assert found["win"]["worst"] == max(rates.values()) == rates[found["win"]["attack"]]


def test_examples_are_those_that_won_by_most(found):
    for name, examples in found["examples"].items():
        wins = found["attacks"][name]["surprise"]["win"][0]
        assert len(examples) == round(3 * wins)
        margins = [one["reward"] - one["honest"] for one in examples]
        assert margins == sorted(margins, reverse=True)
        assert all(margin > 0 for margin in margins)
    assert any(found["examples"].values())


def test_the_same_seed_gives_the_same(scorer, found):
    assert probe(scorer, PROMPTS, COMPLETIONS, **SMALL) == found


def test_honest_completions_are_written_where_there_are_none(scorer, checkpoints):
    stages = []
    own = probe(scorer, PROMPTS, [COMPLETIONS[0], None, None], **SMALL, on_stage=stages.append)
    assert own["honest"]["completions"] == 1 + 2 * 4
    assert stages[0] == "honest completions"
    policys = probe(scorer, PROMPTS, gates=(), policy=checkpoints["weak"], **SMALL)
    assert policys["honest"]["completions"] == 3 * 4 - 1  # one has no words
    assert policys["honest"] != probe(scorer, PROMPTS, gates=(), **SMALL)["honest"]
    assert "typicality" not in policys["honest"]
    with pytest.raises(ModelError, match="policy can't be loaded from 'nowhere'"):
        probe(scorer, PROMPTS, policy="nowhere")


def test_completions_to_one_prompt_are_one_prompts(scorer):
    found = probe(scorer, [PROMPTS[0]] * 2 + PROMPTS[1:2], COMPLETIONS, best_of=0, search_budget=0)
    assert found["prompts"] == 2
    assert found["honest"]["completions"] == 3
    assert found["honest"]["none"]["ties"] == 0
    assert list(found["attacks"]) == list(ATTACKS)


def test_one_search_is_on_the_ratio_and_one_on_the_reward(scorer):
    examples = probe(scorer, PROMPTS, COMPLETIONS, gates=(), best_of=0, search_budget=60)["examples"]
    ratio, reward = (sum(one["reward"] for one in examples[name]) for name in ("search_ratio", "search_reward"))
    assert len(examples["search_ratio"]) == len(examples["search_reward"]) == 3
    assert reward > ratio


def test_without_a_gate_there_is_one_search(scorer):
    plain = DensityRatioScorer(share=scorer, gate="none")
    found = probe(plain, PROMPTS, COMPLETIONS, gates=("none",), **SMALL)
    assert list(found["attacks"]) == [*ATTACKS, "best_of", "search_ratio"]
    assert set(found["honest"]) == {"completions", "finished", "tokens", "none"}
    assert found["win"]["worst"] == 1


def test_a_single_prompt_has_no_other(scorer, caplog):
    found = probe(scorer, PROMPTS[:1], COMPLETIONS[:1], **SMALL)
    assert not {"two", "other"} & set(found["attacks"])
    assert [record.message for record in caplog.records] == [
        "There is a single prompt: attacks by another prompt's completion are left out."
    ]


def test_a_pair_without_an_end_token(strong, weak, caplog):
    endless = byte_tokenizer(template=None)
    endless.eos_token = None
    scorer = DensityRatioScorer(strong, weak, strong_tokenizer=endless, weak_tokenizer=endless, gate="surprise")
    found = probe(scorer, ["hello", "what is"], [" this", " a dog"], **SMALL)
    assert "unfinished" not in found["attacks"]
    assert found["honest"]["finished"] == 0
    assert found["attacks"]["search_ratio"]["none"]["win"][0] == 1
    said = [record.message for record in caplog.records if "annotation" in record.name]
    assert said == ["The pair has no end token for these prompts: all texts are scored as neither ended nor cut off."]


def test_completions_of_one_token(scorer):
    found = probe(scorer, PROMPTS, ["a", "a", "a"], **SMALL)
    assert not {"shuffled", "cut", "other"} & set(found["attacks"])
    assert found["attacks"]["word"]["prompts"] == 3


def test_rows_that_can_not_be_used_are_counted(scorer):
    prompts = [*PROMPTS, chat("\ud800"), chat("quick")]
    found = probe(scorer, prompts, [*COMPLETIONS, None, "  "], best_of=0, search_budget=0)
    assert found["prompts"] == 3
    assert found["left_out"] == {
        "the completion has no words": 1,
        "the prompt can't be read, so that nothing is written to it": 1,
    }
    with pytest.raises(InputError, match="no honest completion can be scored: the completion has no words"):
        probe(scorer, PROMPTS[:1], [""])
    with pytest.raises(InputError, match="row 0 can't be used: the completion has 2 messages"):
        probe(scorer, PROMPTS[:1], [chat("a", "b")])
    with pytest.raises(InputError, match="there are no prompts"):
        probe(scorer, [])
    with pytest.raises(InputError, match="prompts has 3 rows, completions 1"):
        probe(scorer, PROMPTS, ["a"])


def test_each_prompt_has_its_domains_criteria(strong, weak, tokenizer):
    criteria = Criteria({"loud": DomainCriteria("shout"), "quiet": DomainCriteria("whisper")})
    models = {"strong_tokenizer": tokenizer, "weak_tokenizer": tokenizer}
    scorer = DensityRatioScorer(strong, weak, **models, criteria=criteria, router="column:kind")
    options = {"best_of": 0, "search_budget": 12, "gates": ("surprise",)}
    loud, quiet = (
        probe(scorer, PROMPTS, COMPLETIONS, domains=[domain] * 3, **options)["honest"] for domain in criteria.domains
    )
    assert loud["none"]["length_correlation"] != quiet["none"]["length_correlation"]
    assert loud["surprise"]["length_correlation"] != quiet["surprise"]["length_correlation"]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"best_of": -1}, "best_of is -1"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"search_budget": 11}, "search_budget is 11, and the first token alone takes 12"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"gates": ("typical",)}, "cdr_gate is 'typical'"),
    ],
)
def test_numbers_are_looked_at_before_anything_is_loaded(option, message):
    with pytest.raises(ConfigError, match=message):
        probe(DensityRatioScorer("nowhere", "either"), PROMPTS, **option)


def test_a_pair_that_sleeps_is_attacked_alike(checkpoints):
    """Writing and searching run its models one by one, and wake them as scoring does."""
    options = {**checkpoints, "device": "cpu", "gate": "surprise"}
    scorer = DensityRatioScorer(**options, offload="disk")
    assert probe(scorer, PROMPTS[:2], **SMALL) == probe(DensityRatioScorer(**options), PROMPTS[:2], **SMALL)
    pair = scorer.load()
    assert all(p.isnan().all() for one in (pair.strong, pair.weak) for p in one.lm.model.parameters())
