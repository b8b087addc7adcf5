"""Scores under criteria: against the naive reference, what is run once, routing by likelihood, and shared pairs."""

import pickle

import pytest
import torch
from oracle import completion_logps, render, split_text, surprise
from tiny import BRACKETS, answer, byte_tokenizer, chat, llama

from trl_cdr import CDRReward, ConfigError, Criteria, DensityRatioScorer, DomainCriteria, Exemplar, InputError
from trl_cdr.conditioning.router import ask

EXEMPLAR = Exemplar("what is this", "the quick brown fox", "that", "hello")
LAZY = DomainCriteria("a lazy dog jumps over the quick brown fox and that is what this is", (EXEMPLAR,))
CRITERIA = Criteria({"lazy": LAZY, "quick": DomainCriteria("be quick"), "plain": DomainCriteria()})
PROMPTS = [chat("hello"), chat("system:the dog", "hello", "fox", "what is this"), "hello world", chat("jumps")]
COMPLETIONS = [" world", "what", " is this", "over"]


def make(kind, strong, weak, tokenizer, weak_tokenizer=None, **options):
    return kind(strong, weak, strong_tokenizer=tokenizer, weak_tokenizer=weak_tokenizer or tokenizer, **options)


@pytest.fixture
def long_pair(tokenizer):
    return [llama(len(tokenizer), seed=seed, positions=1024) for seed in (0, 1)]


@pytest.mark.parametrize("style", ["inline", "turns"])
def test_conditioned_scores_equal_the_naive_reference(long_pair, tokenizer, style):
    """Two templates, one without a system role, and three domains in one call."""
    weak_tokenizer = byte_tokenizer(290, template=BRACKETS, bos=True)
    strong, weak = long_pair[0], llama(len(weak_tokenizer), seed=1, positions=1024)
    prompts = PROMPTS if style == "inline" else [prompt for prompt in PROMPTS if not isinstance(prompt, str)]
    rows = [(p, c, d) for p, c in zip(prompts, COMPLETIONS, strict=False) for d in CRITERIA.domains]
    options = {"criteria": CRITERIA, "exemplar_style": style, "gate": "surprise", "string_prompts": "text"}
    scorer = make(DensityRatioScorer, strong, weak, tokenizer, weak_tokenizer, **options)
    scores = scorer.score(
        [row[0] for row in rows],
        [row[1] for row in rows],
        domains=[row[2] for row in rows],
        is_generated=[True] * len(rows),
    )
    assert [score.error for score in scores] == [None] * len(rows)
    assert [score.domain for score in scores] == [row[2] for row in rows]
    for (prompt, completion, domain), score in zip(rows, scores, strict=True):
        shown = CRITERIA.conditioning(domain, num_exemplars=2, style=style, seed=0).apply(prompt)
        sums = []
        for model, own in ((strong, tokenizer), (weak, weak_tokenizer)):
            messages = shown
            if own is weak_tokenizer and not isinstance(shown, str) and shown[0]["role"] == "system":
                first = f"{shown[0]['content']}\n\n{shown[1]['content']}"
                messages = [{"role": "user", "content": first}, *shown[2:]]
            prompt_ids, ids = split_text(own, render(own, messages), completion, own.eos_token)
            bos = [own.bos_token_id] if isinstance(prompt, str) and own is weak_tokenizer else []
            sums.append(float(completion_logps(model, bos + prompt_ids, ids).sum()))
            if model is strong:
                expected = surprise(model, prompt_ids, ids, {own.eos_token_id}, finished=True)
        assert score.value == pytest.approx(sums[0] - sums[1], abs=1e-4)
        assert (score.surprise, score.survival) == pytest.approx(expected, abs=1e-3)


def test_empty_conditioning_is_exactly_the_plain_ratio(strong, weak, tokenizer):
    plain = make(DensityRatioScorer, strong, weak, tokenizer).score(PROMPTS, COMPLETIONS)
    empty = make(DensityRatioScorer, strong, weak, tokenizer, criteria=Criteria({"a": DomainCriteria()}))
    assert [score.value for score in empty.score(PROMPTS, COMPLETIONS)] == [score.value for score in plain]


@pytest.fixture
def long_checkpoints(tmp_path, long_pair, tokenizer):
    for role, model in zip(("strong", "weak"), long_pair, strict=True):
        model.save_pretrained(tmp_path / role)
        tokenizer.save_pretrained(tmp_path / role)
    return {role: str(tmp_path / role) for role in ("strong", "weak")}


def strong_forwards(scorer):
    """The lengths of all later forwards of the strong model."""
    lengths = []
    scorer._source.get().strong.lm.model.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    return lengths


def test_the_conditioning_is_run_once_for_all_calls(long_checkpoints):
    scorer = DensityRatioScorer(**long_checkpoints, criteria=CRITERIA, domain="lazy")
    scorer.score([chat("hello")], ["x"])  # the check at load is over, and the conditioning is kept
    lengths = strong_forwards(scorer)
    cold = scorer.score([chat("the dog"), chat("what")], ["is", "this"])
    single = scorer.score([chat("the dog")], ["is"])
    assert len(lengths) == 2
    assert max(lengths) < 80  # a row whole has more than a hundred
    assert single[0].value == pytest.approx(cold[0].value, abs=1e-4)
    fresh = DensityRatioScorer(**long_checkpoints, criteria=CRITERIA, domain="lazy")
    again = fresh.score([chat("the dog"), chat("what")], ["is", "this"])
    assert [score.value for score in again] == [score.value for score in cold]  # the same bits, cold or warm


def test_nothing_of_models_that_the_caller_holds_is_kept_between_calls(long_pair, tokenizer):
    """Nobody says when he has trained them."""
    strong, weak = long_pair
    scorer = make(DensityRatioScorer, strong, weak, tokenizer, criteria=CRITERIA, domain="lazy")
    scorer.score([chat("hello")], ["x"])
    for parameter in strong.parameters():
        parameter.data.mul_(0.5)
    [again] = scorer.score([chat("hello")], ["x"])
    [fresh] = make(DensityRatioScorer, strong, weak, tokenizer, criteria=CRITERIA, domain="lazy").score(
        [chat("hello")], ["x"]
    )
    assert again.value == fresh.value


def test_the_likelihood_router(long_pair, tokenizer):
    strong, weak = long_pair
    scorer = make(DensityRatioScorer, strong, weak, tokenizer, criteria=CRITERIA, router="likelihood")
    labels = list(CRITERIA.domains)
    expected = []
    for prompt in PROMPTS:
        text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        rendered = render(tokenizer, chat(ask(text, labels)))
        means = [
            float(completion_logps(strong, *split_text(tokenizer, rendered, label, "")).mean()) for label in labels
        ]
        expected.append(labels[means.index(max(means))])
    assert scorer.route(PROMPTS) == expected
    scores = scorer.score(PROMPTS, COMPLETIONS)
    assert [score.domain for score in scores] == expected
    named = make(DensityRatioScorer, strong, weak, tokenizer, criteria=CRITERIA)
    assert [score.value for score in scores] == [
        score.value for score in named.score(PROMPTS, COMPLETIONS, domains=expected)
    ]
    table = scorer.confusion(PROMPTS, ["lazy"] * 4)
    assert sum(table["lazy"].values()) == 4
    unreadable = scorer.score([[{"role": "assistant", "content": "hello"}]], ["x"])
    assert "its domain can't be told" in unreadable[0].error
    assert unreadable[0].domain is None


def favour(model, tokenizer, label):
    """Let a model predict the first token of a label after everything."""
    [first, *_] = tokenizer(label, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.norm.weight.fill_(1)
        model.model.embed_tokens.weight.fill_(1)
        model.lm_head.weight[first] = 9


def test_route_follows_weights_that_change(long_pair, tokenizer):
    """A trainer may train a model that was passed as an object."""
    strong, weak = long_pair
    scorer = make(DensityRatioScorer, strong, weak, tokenizer, criteria=CRITERIA, router="likelihood")
    for label in ("lazy", "plain", "quick"):
        favour(strong, tokenizer, label)
        assert scorer.route(PROMPTS) == [label] * 4


def test_route_asks_again_after_unload(long_checkpoints, long_pair, tokenizer):
    """All who share the pair ask again, also if another scorer unloads it."""
    first = DensityRatioScorer(**long_checkpoints, criteria=CRITERIA, router="likelihood")
    second = DensityRatioScorer(share=first, criteria=CRITERIA, router="likelihood")
    for label in ("lazy", "plain"):
        favour(long_pair[0], tokenizer, label)
        long_pair[0].save_pretrained(long_checkpoints["strong"])
        second.unload()
        assert first.route(PROMPTS) == second.route(PROMPTS) == [label] * 4
        lengths = strong_forwards(first)
        assert first.route(PROMPTS) == [label] * 4  # remembered while the pair is loaded
        assert lengths == []


def test_route_nan_is_a_reason(long_pair, tokenizer):
    strong, weak = long_pair
    with torch.no_grad():
        strong.model.norm.weight.fill_(float("nan"))
    scorer = make(DensityRatioScorer, strong, weak, tokenizer, criteria=CRITERIA, router="likelihood")
    assert scorer.route(PROMPTS) == [None] * 4
    [score] = scorer.score([chat("hello")], ["x"])
    assert "the strong model's mean log-probability of the label 'lazy' is nan, and must be finite" in score.error
    assert score.value is None


def test_route_long_prompts_get_reasons(long_pair, tokenizer):
    """A prompt that is cut would lose the names of the labels, and each label would see another one."""
    options = {"criteria": CRITERIA, "router": "likelihood"}
    free = make(DensityRatioScorer, *long_pair, tokenizer, **options)
    short, long = chat("hello"), chat("hello " * 40)
    text = render(tokenizer, chat(ask(short[0]["content"], list(CRITERIA.domains))))
    longest = max(len(tokenizer(label)["input_ids"]) for label in CRITERIA.domains)
    max_length = len(tokenizer(text)["input_ids"]) + longest
    scorer = make(DensityRatioScorer, *long_pair, tokenizer, max_length=max_length, **options)
    assert scorer.route([short, long]) == [free.route([short])[0], None]
    _, score = scorer.score([short, long], ["x", "x"])
    assert f"the classification prompt has more tokens than strong reads ({max_length})" in score.error
    shorter = make(DensityRatioScorer, *long_pair, tokenizer, max_length=max_length - 1, **options)
    [score] = shorter.score([short], ["x"])
    assert "more tokens than strong reads" in score.error  # one label does not fit


def test_a_base_model_classifies_raw_text(long_pair):
    tokenizer = byte_tokenizer(template=None)
    scorer = make(DensityRatioScorer, *long_pair, tokenizer, criteria=CRITERIA, router="likelihood")
    assert scorer.route(["hello"])[0] in CRITERIA.domains


def test_two_rewards_share_a_pair(checkpoints):
    first = CDRReward(checkpoints["strong"], checkpoints["weak"], max_length=200, name="first")
    second = CDRReward(share=first, name="second", criteria=CRITERIA, domain="quick")
    assert second.__name__ == "second_reward"
    assert second.config.cdr_max_length == 200
    rows = {"prompts": [chat("hello")] * 2, "completions": [answer("world"), answer("dog")]}
    plain, quick = first(**rows), second(**rows)
    assert plain != quick
    pairs = [reward.scorer._source.get() for reward in (first, second)]
    assert pairs[0].strong.lm.model is pairs[1].strong.lm.model
    alone = CDRReward(checkpoints["strong"], checkpoints["weak"], criteria=CRITERIA, domain="quick")
    assert alone(**rows) == quick
    second.scorer.unload()
    assert first(**rows) == plain
    copies = pickle.loads(pickle.dumps([first, second]))
    assert copies[0].scorer._source is copies[1].scorer._source
    assert copies[1](**rows) == quick


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "first"}, "name is 'first', and so is that of the reward that shares its pair"),
        ({"name": "b", "dtype": "float16"}, "share is given, and dtype too"),
        ({"name": "b", "strong": "x"}, "share is given, and strong too"),
        ({"name": "b", "typo": 1}, "'typo' is no option"),
    ],
)
def test_what_sharing_refuses(checkpoints, options, message):
    first = CDRReward(checkpoints["strong"], checkpoints["weak"], name="first")
    with pytest.raises(ConfigError, match=message):
        CDRReward(share=first, **options)
    with pytest.raises(ConfigError, match="share is a str. Pass the CDRReward"):
        CDRReward(share="first", name="b")


def test_the_reward_reads_the_column(checkpoints):
    plain = {"gate": "none"}
    reward = CDRReward(checkpoints["strong"], checkpoints["weak"], criteria=CRITERIA, router="column:kind", **plain)
    rows = {"prompts": [chat("hello")] * 2, "completions": [answer("world")] * 2}
    values = reward(**rows, kind=["lazy", "plain"])
    scores = reward.scorer.score(rows["prompts"], ["world"] * 2, domains=["lazy", "plain"])
    assert values == [score.value for score in scores]
    with pytest.raises(InputError, match="the call has only: other. Add the column to the data set"):
        reward(**rows, other=[1, 2])
    for bad in ("law", ["lazy"], 3, None):
        known, unknown = reward.scorer.score(rows["prompts"], ["world"] * 2, domains=["lazy", bad])
        assert known.value == scores[0].value
        assert "domain" in unknown.error
        assert unknown.domain is None
        assert reward(**rows, kind=["lazy", bad]) == [values[0], values[0] - 1]
    assert reward.scorer.route(rows["prompts"], ["law", "lazy"]) == [None, "lazy"]


def test_wrong_options_are_found_before_anything_is_loaded():
    for options, message in (
        ({"criteria": "no/such.toml"}, "is no preset and can't be read"),
        ({"criteria": CRITERIA}, "criteria has several domains .lazy, quick, plain., and nothing selects one"),
        ({"criteria": CRITERIA, "domain": "law"}, "cdr_domain: the domain 'law'"),
        ({"criteria": CRITERIA, "router": "no.such.function"}, "can't be imported"),
        ({"criteria": {"a": ""}}, "criteria is {'a': ''}. Pass Criteria"),
        ({"router": "likelihood"}, "cdr_criteria is missing"),
    ):
        with pytest.raises(ConfigError, match=message):
            CDRReward("no/model", "no/other", **options)
    assert CDRReward("no/model", "no/other", criteria="safety").scorer.route(["a"]) == ["safety"]


def test_a_group_that_runs_out_of_positions_loses_its_left(strong, weak, tokenizer):
    """256 positions do not hold the conditioning: it is cut from the left, as any prompt is, and the row says so."""
    [score] = make(DensityRatioScorer, strong, weak, tokenizer, criteria=CRITERIA, domain="lazy").score(
        [chat("hello " * 300)], [" world"]
    )
    assert score.truncated
    assert torch.isfinite(torch.tensor(score.value))


def test_criteria_that_no_template_takes_are_a_reason(strong, weak):
    """A template that refuses assistant turns, and exemplars as turns."""
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ raise_exception('no turns') }}{% endif %}"
        "<|im_start|>{{ m.content }}<|im_end|>{% endfor %}<|im_start|>"
    )
    tokenizer = byte_tokenizer(template=template)
    scorer = make(DensityRatioScorer, strong, weak, tokenizer, criteria=CRITERIA, exemplar_style="turns")
    lazy, plain = scorer.score([chat("hello")] * 2, ["a", "b"], domains=["lazy", "plain"])
    assert "refused by strong's chat template: no turns" in lazy.error
    assert plain.error is None
