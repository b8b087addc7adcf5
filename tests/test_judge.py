"""The judge says what the reward says, in TRL's judge protocol, and inside TRL's own trainers while they take one."""

import logging
import math
import pickle
import subprocess
import sys

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from tiny import TRAINING, answer, chat, llama

from trl_cdr import CDRConfig, CDRJudge, CDRReward, ConfigError, InputError, UnscorableError
from trl_cdr._compat import has_judges
from trl_cdr.training.judge import best_first, better, read_rendered, win_probability

PROMPTS = [chat("hello"), chat("system:be brief", "what is this", "a fox", "and that")]
PAIRS = [[answer("a lazy dog"), answer("what is this")], [answer("the fox"), answer("jumps over it")]]


def render(messages):
    """A conversation as TRL 1.0 shows it to a judge."""
    return "".join(f"{message['role'].capitalize()}: {message['content']}\n\n" for message in messages)


@pytest.fixture(scope="module")
def reward(checkpoints):
    """The plain ratio: what random models say of text is never typical."""
    return CDRReward(checkpoints["strong"], checkpoints["weak"], gate="none")


@pytest.fixture(scope="module")
def judge(reward):
    return CDRJudge(reward)


def rewards_of(reward, prompts, groups):
    """Each completion by itself. In a TRL with judges a string is what the trainer's policy reads."""
    host = {"trainer_state": None} if has_judges() else {}
    return [
        [reward([prompt], [text], **host)[0] for text in group] for prompt, group in zip(prompts, groups, strict=True)
    ]


@pytest.mark.parametrize("is_text", [False, True])
def test_the_verdicts_are_the_rewards(judge, reward, is_text):
    prompts, pairs = PROMPTS, PAIRS
    if is_text:
        prompts, pairs = ["hello", "User: hi"], [[" world", " dog"], ["Assistant: a", " what\n\n"]]
    expected = rewards_of(reward, prompts, pairs)
    assert judge.judge(prompts, pairs) == [0 if first > second else 1 for first, second in expected]
    swapped = judge.judge(prompts, [pair[::-1] for pair in pairs], shuffle_order=False)
    assert swapped == [1 - verdict for verdict in judge.judge(prompts, pairs)]
    margins = [first - second for first, second in expected]
    probabilities = judge.judge(prompts, pairs, return_scores=True)
    assert probabilities == pytest.approx([1 / (1 + math.exp(-margin)) for margin in margins], abs=1e-4)
    assert {type(value) for value in probabilities} == {float}


def test_a_rendered_conversation_is_judged_as_its_messages(judge, reward):
    prompts = [render(prompt) for prompt in PROMPTS]
    pairs = [tuple(render(completion) for completion in pair) for pair in PAIRS]
    soft = judge.judge(prompts, pairs, return_scores=True)
    assert soft == judge.judge(PROMPTS, PAIRS, return_scores=True)
    raw = [first - second for first, second in rewards_of(reward, prompts, pairs)]
    assert soft != pytest.approx([1 / (1 + math.exp(-margin)) for margin in raw], abs=1e-3)


# Everything but what the rendering loses: a turn's opening after an empty line.
CONTENT = (
    st.lists(st.sampled_from(["User: ", "Assistant:", " ", "\n", "a"]), max_size=6)
    .map("".join)
    .filter(lambda text: "\n\nUser: " not in text and "\n\nAssistant: " not in text)
)


@given(
    turns=st.lists(CONTENT, min_size=1, max_size=4), system=st.none() | CONTENT, texts=st.lists(st.text(), max_size=3)
)
def test_rendering_is_undone(turns, system, texts):
    prompt = ([] if system is None else [{"role": "system", "content": system}]) + chat("", *turns)[1:]
    completions = [answer(text) for text in texts]
    assert read_rendered(render(prompt), [render(each) for each in completions]) == (prompt, completions)


@pytest.mark.parametrize(
    ("prompt", "completions"),
    [
        ("hello", [" world", " dog"]),
        ("User: hello\n\n", ["Assistant: a\n\n", "a"]),
        ("User: hello\n\n", ["Assistant: a", "Assistant: b"]),
        ("User: hello\n\nAssistant:", ["Assistant: a\n\n", "Assistant: b\n\n"]),
        ("hello\n\nUser: you\n\n", ["Assistant: a\n\n", "Assistant: b\n\n"]),
        ("Note: hello\n\n", ["Assistant: a\n\n", "Assistant: b\n\n"]),
        ("User: hello\n\n", [None, "Assistant: b\n\n"]),
        (chat("hello"), ["Assistant: a\n\n", "Assistant: b\n\n"]),
    ],
)
def test_what_was_not_rendered_stays(prompt, completions):
    assert read_rendered(prompt, completions) == (prompt, completions)


def test_a_missing_verdict_is_counted(judge, caplog):
    pairs = [[answer("a"), None], [None, None], PAIRS[1], [None, answer("a")]]
    prompts = [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[0]]
    verdicts = judge.judge(prompts, pairs)
    assert [verdict == -1 for verdict in verdicts] == [True, True, False, True]
    assert caplog.messages == [
        "cdr_judge: 3 of 4 prompts have a completion that can't be scored. The first: completion 1 of prompt 0 can't "
        "be scored: the completion is None: pass a string or a list with one assistant message."
    ]
    probabilities = judge.judge(prompts, pairs, return_scores=True)
    assert [value == 0.5 for value in probabilities] == [True, True, False, True]


def test_raise_names_the_completion(checkpoints, reward):
    strict = CDRJudge(CDRReward(share=reward, name="strict", on_unscorable="raise"))
    with pytest.raises(UnscorableError, match="completion 1 of prompt 1 can't be scored: the completion is None"):
        strict.judge(PROMPTS, [PAIRS[0], [answer("a"), None]])


def test_equal_completions_tie(judge):
    """To the last bit: a place in the pack, and the rounding that comes with it, breaks no tie."""
    others = [answer("x" * length) for length in (1, 30, 7)]
    for text in ("a lazy dog", "what is this and that"):
        assert judge.judge([chat("hello")], [[answer(text), answer(text)]]) == [0]
        assert judge.judge([chat("hello")], [[answer(text), answer(text)]], return_scores=True) == [0.5]
        [order] = judge.rank([chat("hello")], [[answer(text), *others, answer(text)]])
        assert order.index(4) == order.index(0) + 1


def test_the_gate(checkpoints, reward):
    """The judge compares rewards: random models find both texts unknown, and positive ratios are worth -1."""
    with pytest.warns(FutureWarning, match="cdr_typicality is deprecated"):
        gated = CDRJudge(CDRReward(share=reward, name="gated", typicality=0.01), temperature=2.0)
    expected = rewards_of(gated.reward, PROMPTS, PAIRS)
    plain = rewards_of(reward, PROMPTS, PAIRS)
    for rewards, ratios in zip(expected, plain, strict=True):
        assert rewards == pytest.approx([min(ratio, 0) - 1 for ratio in ratios], abs=1e-4)
    margins = [first - second for first, second in expected]
    probabilities = gated.judge(PROMPTS, PAIRS, return_scores=True)
    assert probabilities == pytest.approx([1 / (1 + math.exp(-margin / 2)) for margin in margins], abs=1e-4)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_what_surprises_the_strong_model(checkpoints, reduction):
    """Its rewards are those of the reward: less by nats, or by nats per token."""
    options = {"gate": "surprise", "reduction": reduction}
    judge = CDRJudge(strong=checkpoints["strong"], weak=checkpoints["weak"], **options)
    expected = rewards_of(judge.reward, PROMPTS, PAIRS)
    probabilities = judge.judge(PROMPTS, PAIRS, return_scores=True)
    margins = [first - second for first, second in expected]
    assert probabilities == pytest.approx([1 / (1 + math.exp(-margin)) for margin in margins], abs=1e-4)
    assert judge.judge(PROMPTS, PAIRS) == [0 if margin >= 0 else 1 for margin in margins]
    assert all(reward is not None for pair in expected for reward in pair)


def test_better():
    assert [better(1.0, 0.5), better(-2.0, -1.0), better(3.0, 3.0)] == [0, 1, 0]
    assert [better(None, 1.0), better(1.0, None), better(None, None)] == [-1, -1, -1]


def test_win_probability():
    assert win_probability(1.0, 0.0, temperature=1.0) == pytest.approx(1 / (1 + math.exp(-1)))
    assert win_probability(3.0, 1.0, temperature=4.0) == pytest.approx(1 / (1 + math.exp(-0.5)))
    assert win_probability(2.0, 2.0, temperature=1e-300) == 0.5
    assert win_probability(1e6, -1e6, temperature=1e-3) == 1.0
    assert win_probability(-1e6, 1e6, temperature=1e-3) == 0.0
    assert win_probability(None, 1.0, temperature=1.0) == win_probability(1.0, None, temperature=1.0) == 0.5


def test_best_first():
    assert best_first([1.0, 3.0, 2.0]) == [1, 2, 0]
    assert best_first([None, -5.0, None, -5.0, 0.0]) == [4, 1, 3, 0, 2]


def test_rank(judge, reward, caplog):
    groups = [[answer(text) for text in ("a lazy dog", "what is this", "the fox", "hello")], PAIRS[1]]
    expected = rewards_of(reward, PROMPTS, groups)
    orders = judge.rank(PROMPTS, groups)
    assert [[group[index] for index in order] for group, order in zip(expected, orders, strict=True)] == [
        sorted(group, reverse=True) for group in expected
    ]
    assert [order[0] for order in judge.rank(PROMPTS, PAIRS)] == judge.judge(PROMPTS, PAIRS)
    rendered = [[render(text) for text in group] for group in groups]
    assert judge.rank([render(prompt) for prompt in PROMPTS], rendered) == orders
    assert not caplog.records
    assert judge.rank(["hello"], [[None, " a", " world"]])[0][-1] == 0
    assert "1 of 1 prompts have a completion that can't be scored" in caplog.text


def test_no_rows(judge):
    assert judge.judge([], []) == judge.judge([], [], return_scores=True) == judge.rank([], []) == []


@pytest.mark.parametrize(
    ("prompts", "completions", "message"),
    [
        (["a"], [["b"]], r"completions\[0\] has length 1: a judge compares two completions"),
        (["a", "b"], [["b", "c"], ["b", "c", "d"]], r"completions\[1\] has length 3: .* or use rank for larger groups"),
        (["a", "b"], [["b", "c"]], "completions has 1 groups and prompts has 2 entries"),
        (["a", "b"], ["bc", "de"], r"completions\[0\] is 'bc': a judge compares several completions"),
        (["a"], [{"role": "assistant", "content": "b"}], r"completions\[0\] is {'role'"),
        ("a", [["b", "c"]], "prompts is 'a'. Pass a list with one entry for each prompt"),
        (["a"], None, "completions is None. Pass a list"),
    ],
)
def test_bad_calls(judge, prompts, completions, message):
    with pytest.raises(InputError, match=message):
        judge.judge(prompts, completions)


def test_one_completion_has_no_order(judge):
    with pytest.raises(InputError, match=r"completions\[1\] has length 1: an order needs at least two completions"):
        judge.rank(["a", "b"], [["c", "d", "e"], ["c"]])


@pytest.mark.parametrize("temperature", [0, -1.0, math.nan, math.inf, "1", True, None])
def test_bad_temperatures(reward, temperature):
    with pytest.raises(ConfigError, match=r"temperature is .*: margins are divided by it. Use a number above 0"):
        CDRJudge(reward, temperature=temperature)


def test_bad_constructions(reward):
    with pytest.raises(ConfigError, match="reward is 'strong'. Pass a CDRReward, or the options of one by name"):
        CDRJudge("strong")
    with pytest.raises(ConfigError, match="reward is given, and dtype too: a judge compares what the reward says"):
        CDRJudge(reward, dtype="float32")
    with pytest.raises(ConfigError, match="strong"):
        CDRJudge()
    with pytest.raises(ConfigError, match="'temprature' is no option"):
        CDRJudge(strong="a", weak="b", temprature=2.0)
    with pytest.raises(ConfigError, match="router is 'column:domain', and a judge is told no columns. Use"):
        CDRJudge(strong="a", weak="b", criteria="safety+chat", router="column:domain")


def test_sharing_and_building(judge, reward, checkpoints):
    assert judge.reward is reward
    own = CDRJudge(strong=checkpoints["strong"], weak=checkpoints["weak"], gate="none")
    config = CDRConfig(cdr_strong=checkpoints["strong"], cdr_weak=checkpoints["weak"], cdr_gate="none")
    for other in (own, CDRJudge.from_config(config), pickle.loads(pickle.dumps(judge))):
        assert other.judge(PROMPTS, PAIRS) == judge.judge(PROMPTS, PAIRS)


def test_construction_touches_no_model_and_only_a_trl_that_has_judges():
    assert not isinstance(CDRJudge(strong="/no/such/folder", weak="/nor/this"), torch.nn.Module)
    code = (
        "import sys; from importlib.metadata import version; from trl_cdr import CDRJudge; "
        "assert 'trl' not in sys.modules; CDRJudge(strong='/no/such/folder', weak='/nor/this'); "
        "assert ('trl' in sys.modules) == version('trl').startswith('1.0.')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ----------------------------------------------------------------------------------------------------------------------
# Inside TRL, while it has judges. Everything here needs the trainers and the callback of TRL 1.0.


@pytest.fixture
def judges():
    return pytest.importorskip("trl.experimental.judges", reason="TRL 1.1 removed judges")


COMMON = {
    "per_device_train_batch_size": 2,
    "max_steps": 3,
    **TRAINING,
    "save_strategy": "no",
    "logging_steps": 1,
}


class Recorder(CDRJudge):
    """A judge that keeps what it was called with."""

    calls = ()

    def judge(self, prompts, completions, shuffle_order=True, return_scores=False):
        verdicts = super().judge(prompts, completions, shuffle_order, return_scores)
        self.calls = [*self.calls, (prompts, completions, return_scores, verdicts)]
        return verdicts


@pytest.fixture
def policy(tokenizer):
    model = llama(len(tokenizer), seed=2)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model


@pytest.mark.compat
def test_it_is_a_judge_where_trl_has_them(judges, judge):
    assert isinstance(judge, judges.BasePairwiseJudge)
    assert isinstance(judge, judges.BaseJudge)
    assert not isinstance(object(), judges.BasePairwiseJudge)


@pytest.mark.compat
def test_the_rendering_is_trls(judges):
    jinja2 = pytest.importorskip("jinja2")
    from trl.experimental.utils import SIMPLE_CHAT_TEMPLATE

    template = jinja2.Environment().from_string(SIMPLE_CHAT_TEMPLATE)
    for messages in (*PROMPTS, *PAIRS[0], chat("two\n\nparagraphs\n", "\n and an answer")):
        assert template.render(messages=messages) == render(messages)


def make_trainer(name, **kwargs):
    if name == "online_dpo":
        from trl.experimental.online_dpo import OnlineDPOConfig as Config
        from trl.experimental.online_dpo import OnlineDPOTrainer as Trainer
    elif name == "xpo":
        from trl.experimental.xpo import XPOConfig as Config
        from trl.experimental.xpo import XPOTrainer as Trainer
    else:
        from trl.experimental.nash_md import NashMDConfig as Config
        from trl.experimental.nash_md import NashMDTrainer as Trainer
    return Trainer(args=Config(kwargs.pop("output_dir"), max_new_tokens=8, **COMMON), **kwargs)


@pytest.mark.compat
@pytest.mark.parametrize("conversational", [True, False])
@pytest.mark.parametrize("name", ["online_dpo", "xpo", "nash_md"])
def test_three_steps(name, conversational, judges, tmp_path, reward, tokenizer, policy, caplog):
    words = ["hello", "what is this", "the quick brown fox", "a lazy dog"]
    prompts = [chat("system:be brief", word) if conversational else word for word in words * 2]
    judge = Recorder(reward)
    trainer = make_trainer(
        name,
        output_dir=str(tmp_path),
        model=policy,
        ref_model=llama(len(tokenizer), seed=3),
        judge=judge,
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
    )
    before = [parameter.clone() for parameter in policy.parameters()]
    with caplog.at_level(logging.WARNING, logger="trl_cdr"):
        trainer.train()
    assert not [record for record in caplog.records if record.name.startswith("trl_cdr")]
    assert trainer.state.global_step == 3
    assert any(not torch.equal(old, new) for old, new in zip(before, policy.parameters(), strict=True))
    assert all(math.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)
    assert len(judge.calls) == 3
    for call_prompts, pairs, return_scores, verdicts in judge.calls:
        assert len(call_prompts) == len(pairs) == len(verdicts) == 2
        assert return_scores == (name == "nash_md")
        if conversational:
            known = {render(prompt): prompt for prompt in prompts}
            call_prompts = [known[prompt] for prompt in call_prompts]
            pairs = [[answer(text[len("Assistant: ") : -2]) for text in pair] for pair in pairs]
        margins = [first - second for first, second in rewards_of(reward, call_prompts, pairs)]
        if return_scores:
            assert verdicts == pytest.approx([1 / (1 + math.exp(-margin)) for margin in margins], abs=1e-4)
        else:
            assert verdicts == [0 if margin > 0 else 1 for margin in margins]


@pytest.mark.compat
@pytest.mark.parametrize("use_soft_judge", [False, True])
def test_the_win_rate(use_soft_judge, judges, tmp_path, reward, tokenizer, policy):
    from transformers import GenerationConfig
    from trl import DPOConfig, DPOTrainer
    from trl.experimental.winrate_callback import WinRateCallback

    rows = {"prompt": ["hello", "what is"], "chosen": [" world", " this"], "rejected": [" fox", " dog"]}
    trainer = DPOTrainer(
        model=policy,
        ref_model=llama(len(tokenizer), seed=3),
        args=DPOConfig(
            str(tmp_path), learning_rate=0.1, eval_strategy="steps", eval_steps=1, **COMMON | {"max_steps": 2}
        ),
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict(rows),
        eval_dataset=Dataset.from_dict(rows),
    )
    judge = Recorder(reward)
    greedy = GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    trainer.add_callback(WinRateCallback(judge, trainer, generation_config=greedy, use_soft_judge=use_soft_judge))
    trainer.train()
    (_, ties, _, at_start), *later = judge.calls
    assert all(first == second for first, second in ties)
    assert at_start == ([0.5, 0.5] if use_soft_judge else [0, 0])
    assert len(later) == 2
    logged = [entry for entry in trainer.state.log_history if "eval_win_rate" in entry]
    assert len(logged) == 3
    for entry, (prompts, pairs, _, verdicts) in zip(logged[1:], later, strict=True):
        margins = [first - second for first, second in rewards_of(reward, prompts, pairs)]
        assert entry["eval_win_rate"] == sum(margin < 0 for margin in margins) / len(margins)
        if use_soft_judge:
            assert entry["eval_avg_win_prob"] == pytest.approx(1 - sum(verdicts) / len(verdicts))
