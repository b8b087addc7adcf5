"""The score against the naive reference, its invariants, and what can't be scored."""

import math
import pickle
import random
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from oracle import completion_logps, render, split_text, surprise, typicality
from tiny import BRACKETS, CHATML, answer, byte_tokenizer, chat, llama

from trl_cdr import ConfigError, DensityRatioScorer, InputError, ModelError, Score
from trl_cdr.scoring.causal_lm import CausalLM
from trl_cdr.scoring.checkpoint import identify_weights
from trl_cdr.scoring.encoding import Encoder

WORDS = [
    "hello",
    " world",
    "\n",
    "  ",
    "é",
    "日本",
    " 🙂",
    "what is this",
    "\t",
    "12",
    ".",
    " the",
    "<think>",
    "</think>",
]


def make_scorer(strong, weak, tokenizer, **options):
    """Strings are raw text, as in a trainer."""
    options = {"string_prompts": "text"} | options
    return DensityRatioScorer(strong, weak, strong_tokenizer=tokenizer, weak_tokenizer=tokenizer, **options)


def random_text(rng, longest):
    return "".join(rng.choice(WORDS) for _ in range(rng.randint(1, longest)))


def random_prompt(rng):
    kind = rng.randrange(4)
    if kind == 0:
        return random_text(rng, 20)
    turns = [random_text(rng, 12) for _ in range(rng.choice([1, 3]))]
    if kind == 2:
        return chat("system:" + random_text(rng, 5), *turns)
    if kind == 3:
        return [{"role": "user", "content": [{"type": "text", "text": part} for part in turns]}]
    return chat(*turns)


def plain(prompt):
    """The prompt with lists of text parts joined, for the reference."""
    if isinstance(prompt, str):
        return prompt
    return [
        {**m, "content": m["content"] if isinstance(m["content"], str) else "".join(p["text"] for p in m["content"])}
        for m in prompt
    ]


@pytest.mark.parametrize("pad", ["<|pad|>", "<|im_end|>"])
def test_ids_path_equals_the_naive_reference(strong, weak, pad):
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = pad
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    rng = random.Random(f"ids {pad}")
    prompts, completions, ids, expected = [], [], [], []
    for _ in range(60):
        prompt, finished = random_prompt(rng), rng.random() < 0.6
        # ids that encoding the text again would not give: a policy may spell a word any way it likes
        wrote = [t for word in random_text(rng, 15) for t in tokenizer(word, add_special_tokens=False).input_ids]
        text = tokenizer.decode(wrote, skip_special_tokens=True)
        wrote += [end] if finished else []
        prompt_ids = tokenizer(render(tokenizer, plain(prompt)), add_special_tokens=False).input_ids
        expected.append(
            float(completion_logps(strong, prompt_ids, wrote).sum() - completion_logps(weak, prompt_ids, wrote).sum())
        )
        padding = [tokenizer.pad_token_id] * rng.randrange(6) if finished or pad == "<|pad|>" else []
        prompts.append(prompt)
        completions.append(text if isinstance(prompt, str) or rng.random() < 0.5 else answer(text))
        ids.append(wrote + padding)
    scores = make_scorer(strong, weak, tokenizer).score(prompts, completions, completion_ids=ids)
    assert [score.error for score in scores] == [None] * len(scores)
    torch.testing.assert_close([score.value for score in scores], expected, rtol=0, atol=1e-4)
    assert {score.finished for score in scores} == {True, False}


@pytest.mark.parametrize("shared", [True, False])
def test_text_path_equals_the_naive_reference(strong, tokenizer, shared):
    weak_tokenizer = tokenizer if shared else byte_tokenizer(290, template=BRACKETS, bos=True)
    weak = llama(len(weak_tokenizer), seed=1)
    rng = random.Random(f"text {shared}")
    prompts = [random_prompt(rng) for _ in range(80)]
    completions = [random_text(rng, 15) for _ in prompts]
    finished = [rng.random() < 0.5 for _ in prompts]
    expected = []
    for prompt, completion, is_finished in zip(prompts, completions, finished, strict=True):
        sums = []
        for model, own in ((strong, tokenizer), (weak, weak_tokenizer)):
            messages = plain(prompt)
            if own.chat_template == BRACKETS and not isinstance(messages, str) and messages[0]["role"] == "system":
                first = f"{messages[0]['content']}\n\n{messages[1]['content']}"
                messages = [{"role": "user", "content": first}, *messages[2:]]
            prompt_ids, ids = split_text(own, render(own, messages), completion, own.eos_token if is_finished else "")
            bos = [own.bos_token_id] if isinstance(prompt, str) and not shared and own is weak_tokenizer else []
            sums.append(float(completion_logps(model, bos + prompt_ids, ids).sum()))
        expected.append(sums[0] - sums[1])
    scorer = DensityRatioScorer(
        strong, weak, strong_tokenizer=tokenizer, weak_tokenizer=weak_tokenizer, string_prompts="text"
    )
    scores = scorer.score(prompts, completions, finished=finished, is_generated=[True] * len(prompts))
    assert [score.error for score in scores] == [None] * len(scores)
    torch.testing.assert_close([score.value for score in scores], expected, rtol=0, atol=1e-4)
    assert [score.finished for score in scores] == finished


def test_typicality_equals_the_naive_reference_whatever_the_company(strong, weak, tokenizer):
    rng = random.Random("typicality")
    prompts = [random_prompt(rng) for _ in range(40)]
    completions = [random_text(rng, 15) for _ in prompts]
    scorer = make_scorer(strong, weak, tokenizer, gate="typicality")
    together = scorer.score(prompts, completions)
    for prompt, completion, score in zip(prompts, completions, together, strict=True):
        prompt_ids, ids = split_text(tokenizer, render(tokenizer, plain(prompt)), completion, tokenizer.eos_token)
        assert score.typicality == pytest.approx(typicality(strong, prompt_ids, ids), abs=1e-4)
        assert score.gated == (score.typicality < -1.5)
    assert sum(score.gated for score in together) > 0
    alone = [scorer.score([prompt], [said])[0] for prompt, said in zip(prompts, completions, strict=True)]
    torch.testing.assert_close([s.typicality for s in alone], [s.typicality for s in together], rtol=0, atol=1e-4)
    off = make_scorer(strong, weak, tokenizer, gate="none").score(prompts, completions)
    assert {(score.typicality, score.surprise, score.gated) for score in off} == {(None, None, False)}
    torch.testing.assert_close([s.value for s in off], [s.value for s in together], rtol=0, atol=1e-4)


@pytest.mark.parametrize("way", ["packed", "padded", "row by row"])
@pytest.mark.parametrize("is_loaded", [True, False])
def test_surprise_and_survival_equal_the_naive_reference(strong, weak, tokenizer, checkpoints, way, is_loaded):
    """Whatever the company, the way and who holds the models; two tokens end a text."""
    rng = random.Random(f"surprise {way}")
    prompts = [random_prompt(rng) for _ in range(10) for _ in range(2)]
    completions = [random_text(rng, 15) for _ in prompts]
    finished = [rng.choice([True, False, None]) for _ in prompts]
    generation, strong.generation_config.eos_token_id = strong.generation_config.eos_token_id, [1, 4]
    ends = {tokenizer.eos_token_id, 4}
    pair = (checkpoints["strong"], checkpoints["weak"]) if is_loaded else (strong, weak)
    scorer = make_scorer(*pair, tokenizer, gate="surprise")
    scorer.load()
    member = scorer._source.get().strong
    member.lm.model.generation_config.eos_token_id = [1, 4]
    member.lm.way()
    if way != "packed":
        member.lm._packed = None
    if way == "row by row":
        member.lm._padded = None
    try:
        scores = scorer.score(prompts, completions, finished=finished)
    finally:
        strong.generation_config.eos_token_id = generation
    assert member.lm.way()[0] == way
    for prompt, completion, said, score in zip(prompts, completions, finished, scores, strict=True):
        end = tokenizer.eos_token if said else ""
        prompt_ids, ids = split_text(tokenizer, render(tokenizer, plain(prompt)), completion, end)
        worst, lived = surprise(strong, prompt_ids, ids, ends, finished=said)
        assert score.surprise == pytest.approx(worst, abs=1e-3)
        assert score.survival == pytest.approx(lived, abs=1e-3)
        assert score.gated == (worst > 2 * math.log(len(ids) / 0.01) or lived > math.log(100))
        assert score.typicality is None
    assert {score.gated for score in scores} == {True, False}


def test_without_an_end_token_survival_is_off_and_said_once(strong, weak, caplog):
    endless = byte_tokenizer(template=None)
    endless.eos_token = None
    scorer = make_scorer(strong, weak, endless, gate="surprise")
    for _ in range(2):
        scores = scorer.score(["hello", "what is"], [" world", " this"], finished=[False, False])
    assert [score.survival for score in scores] == [None, None]
    assert all(score.surprise > 0 for score in scores)
    assert caplog.text.count("has no end token") == 1
    caplog.clear()
    make_scorer(strong, weak, endless, gate="typicality").score(["hello"], [" world"], finished=[False])
    assert "has no end token" not in caplog.text


def test_an_end_token_that_the_model_can_not_predict_is_none(weak, tokenizer):
    """Added behind the embeddings: its logit does not exist."""
    small = llama(tokenizer.convert_tokens_to_ids("<think>"))
    added = byte_tokenizer()
    added.eos_token = "</think>"
    added.chat_template = None
    scorer = make_scorer(small, weak, added, gate="surprise")
    [score] = scorer.score(["hello"], [" world"], finished=[False])
    assert score.error is None
    assert score.survival is None


def test_a_completion_of_one_token(strong, weak, tokenizer):
    scorer = make_scorer(strong, weak, tokenizer, gate="surprise")
    ended, cut = scorer.score(["hello"] * 2, ["", "."], finished=[True, False])
    assert (ended.n_tokens, cut.n_tokens) == (1, 1)
    assert ended.survival == 0  # all that it did was to end
    assert cut.survival > 0
    assert ended.surprise >= 0


def test_equal_models_have_no_ratio_behind_any_gate(strong, tokenizer):
    copy = llama(len(tokenizer), seed=0)
    for gate in ("surprise", "typicality", "none"):
        scorer = make_scorer(strong, copy, tokenizer, gate=gate)
        assert [score.value for score in scorer.score(["hello"] * 2, [" world", "12"])] == [0, 0]


def test_the_random_rows_do_straddle(tokenizer):
    """The text path is only tested where some tokens lie across the boundary."""
    rendered = render(tokenizer, chat("hello"))
    alone = tokenizer(rendered, add_special_tokens=False).input_ids
    prompt_ids, ids = split_text(tokenizer, rendered, "\n hello", "")
    assert len(prompt_ids) < len(alone)
    assert tokenizer.decode(ids) == "\n\n hello"


def rows(count=12):
    rng = random.Random(7)
    return [random_prompt(rng) for _ in range(count)], [random_text(rng, 12) for _ in range(count)]


def values(scores):
    assert all(score.error is None for score in scores)
    return torch.tensor([score.value for score in scores], dtype=torch.float64)


def test_swapping_strong_and_weak_negates(strong, weak, tokenizer):
    there = values(make_scorer(strong, weak, tokenizer).score(*rows()))
    back = values(make_scorer(weak, strong, tokenizer).score(*rows()))
    assert there.abs().min() > 0.01
    assert torch.equal(there, -back)


def test_equal_models_give_exactly_zero(checkpoints, strong, tokenizer):
    scorer = DensityRatioScorer(checkpoints["strong"], strong, weak_tokenizer=tokenizer)
    assert values(scorer.score(*rows())).tolist() == [0.0] * 12


def test_order_batch_and_budget_do_not_matter(strong, weak, tokenizer):
    prompts, completions = rows(20)
    together = values(make_scorer(strong, weak, tokenizer).score(prompts, completions))
    order = random.Random(1).sample(range(20), 20)
    shuffled = make_scorer(strong, weak, tokenizer).score([prompts[i] for i in order], [completions[i] for i in order])
    torch.testing.assert_close(values(shuffled), together[order], rtol=0, atol=1e-4)
    alone = make_scorer(strong, weak, tokenizer, token_budget=1).score(prompts, completions)
    torch.testing.assert_close(values(alone), together, rtol=0, atol=1e-4)


def test_repeated_calls_are_identical_and_leave_the_global_random_state(checkpoints):
    scorer = DensityRatioScorer(checkpoints["strong"], checkpoints["weak"])
    state = torch.random.get_rng_state()
    first = values(scorer.score(*rows()))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(values(scorer.score(*rows())), first)


def test_mean_divides_each_model_by_its_own_count(strong, tokenizer):
    other = byte_tokenizer(290)
    weak = llama(len(other), seed=1)
    pair = {"strong_tokenizer": tokenizer, "weak_tokenizer": other}
    [total] = DensityRatioScorer(strong, weak, **pair).score(["hello"], [" what is this"])
    [mean] = DensityRatioScorer(strong, weak, reduction="mean", **pair).score(["hello"], [" what is this"])
    counts = [len(t(" what is this", add_special_tokens=False).input_ids) + 1 for t in (tokenizer, other)]
    assert counts[0] != counts[1]
    assert mean.value == pytest.approx(total.strong_logps / counts[0] - total.weak_logps / counts[1])
    assert (total.n_tokens, total.per_token) == (counts[0], None)


def test_per_token_sums_to_the_value(strong, weak, tokenizer):
    [score] = make_scorer(strong, weak, tokenizer).score([chat("hello")], ["what is this"])
    assert score.per_token.shape == (score.n_tokens,)
    assert float(score.per_token.double().sum()) == pytest.approx(score.value, abs=1e-4)
    assert score.value == pytest.approx(score.strong_logps - score.weak_logps)


def test_empty_completion(strong, weak, tokenizer):
    end = tokenizer.eos_token_id
    scorer = make_scorer(strong, weak, tokenizer)
    done, cut = scorer.score([chat("hello")] * 2, ["", ""], finished=[True, False])
    prompt_ids = tokenizer(render(tokenizer, chat("hello")), add_special_tokens=False).input_ids
    expected = completion_logps(strong, prompt_ids, [end]) - completion_logps(weak, prompt_ids, [end])
    assert done.value == pytest.approx(float(expected.sum()), abs=1e-4)
    assert done.n_tokens == 1
    assert cut.value is None
    assert "was not finished" in cut.error
    by_ids = scorer.score([chat("hello")] * 2, ["", ""], completion_ids=[[end, end, end], [tokenizer.pad_token_id] * 3])
    assert [score.value for score in by_ids] == [pytest.approx(done.value, abs=1e-6), None]


def test_long_prompt_is_cut_on_the_left_and_completion_kept(strong, tokenizer):
    short = llama(len(tokenizer), seed=1, positions=32)
    scorer = make_scorer(strong, short, tokenizer)
    prompt, completion = "hello world " * 20, " what is this"
    whole, cut_off = scorer.score(["hello", prompt], [completion] * 2)
    assert (whole.truncated, cut_off.truncated) == (False, True)
    completion_ids = [*tokenizer(completion, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    prompt_ids = tokenizer(prompt, add_special_tokens=False).input_ids
    expected = completion_logps(strong, prompt_ids, completion_ids).sum()
    expected -= completion_logps(short, prompt_ids[-(32 - len(completion_ids)) :], completion_ids).sum()
    assert cut_off.value == pytest.approx(float(expected), abs=1e-4)
    [too_long] = scorer.score(["hello"], ["é" * 40])
    assert too_long.value is None
    assert "at most 32 fit" in too_long.error


@pytest.mark.parametrize(
    ("prompt", "completion", "reason"),
    [
        ("hello", None, "completion is None"),
        ("hello", 3, "completion is 3"),
        (None, "x", "prompt is None"),
        ([], "x", "empty conversation"),
        ([{"role": "user", "content": None}], "x", "content of message 0 of the prompt is None"),
        ([{"role": "user"}], "x", "content of message 0 of the prompt is None"),
        ([{"content": "hello"}], "x", "message 0 of the prompt has the role None"),
        ([{"role": "user", "content": [{"type": "image"}]}], "x", "only text can be scored"),
        (chat("hello"), [{"role": "assistant", "content": None}], "content is None"),
        (chat("hello"), [{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}], "holds tool_calls"),
        (chat("hello"), [*answer("a"), *answer("b")], "has 2 messages"),
        (chat("hello"), [], "has 0 messages"),
        (chat("hello"), [{"role": "user", "content": "x"}], "has the role 'user'"),
        ("", "x", "prompt is empty"),
        (chat("<|im_end|>"), "\ufdd0", "U+FDD0"),
        ("hello", "\ud83d", "half of a surrogate pair"),
        ("\udc00", "hello", "half of a surrogate pair"),
        (chat("hello"), [{"role": "assistant", "content": "a", "reasoning_content": "b"}], "holds reasoning_content"),
        (chat("hello"), b"bytes", "completion is b'bytes'"),
    ],
)
def test_a_bad_row_has_a_reason_and_leaves_the_others_alone(strong, weak, tokenizer, prompt, completion, reason):
    scorer = make_scorer(strong, weak, tokenizer)
    before, bad, after = scorer.score(["hello", prompt, chat("hello")], ["a", completion, "b"])
    assert bad.value is None
    assert reason in bad.error
    good = scorer.score(["hello", chat("hello")], ["a", "b"])
    torch.testing.assert_close(values([before, after]), values(good), rtol=0, atol=1e-4)


@pytest.mark.parametrize("gate", ["surprise", "typicality", "none"])
def test_a_non_finite_logit_is_a_reason(strong, tokenizer, gate):
    broken = llama(len(tokenizer), seed=1)
    letter = tokenizer("q", add_special_tokens=False).input_ids[0]
    with torch.no_grad():
        broken.model.embed_tokens.weight[letter] = float("nan")
    for role, pair in (("weak", (strong, broken)), ("strong", (broken, strong))):
        bad, good = make_scorer(*pair, tokenizer, gate=gate).score(["hello q", "hello"], ["a", "a"])
        assert bad.value is None
        assert bad.error.startswith(f"{role} gave the log-probability nan at completion token 0")
        assert (bad.surprise, bad.survival, bad.gated) == (None, None, False)
        assert good.error is None


def test_a_strong_model_that_is_certain_of_everything(weak, tokenizer):
    """Its distributions are one-hot: what it does not expect is foreign, and every number is finite."""
    certain = llama(len(tokenizer), seed=0)
    with torch.no_grad():
        certain.lm_head.weight *= 1e5
    [score] = make_scorer(certain, weak, tokenizer, gate="surprise").score(["hello"], ["what is this"])
    assert score.gated
    assert 1e4 < score.surprise < math.inf
    assert 0 <= score.survival < math.inf


def test_unknown_end_of_completions_adds_no_end_token_and_warns_once(strong, weak, tokenizer, caplog):
    scorer = make_scorer(strong, weak, tokenizer)
    foreign = [[5, 6, 7]] * 2  # ids of some other vocabulary
    [score, _] = scorer.score(["hello"] * 2, ["what is this"] * 2, completion_ids=foreign)
    scorer.score(["hello"] * 2, ["what is this"] * 2, completion_ids=foreign)
    [cut] = scorer.score(["hello"], ["what is this"], finished=[False])
    assert score.finished is None
    assert score.value == pytest.approx(cut.value, abs=1e-6)
    warnings = [record for record in caplog.records if "cdr_policy_tokenizer" in record.message]
    assert len(warnings) == 1


def test_policy_tokenizer_tells_finished_from_cut_off(strong, weak, tokenizer, tmp_path):
    policy = byte_tokenizer(280, template=BRACKETS)
    policy.pad_token = policy.eos_token
    policy.save_pretrained(tmp_path)
    text = "what is this"
    ids = policy(text, add_special_tokens=False).input_ids
    rows_of_ids = [ids + [policy.eos_token_id] * 3, ids]
    offline = make_scorer(strong, weak, tokenizer).score(["hello"] * 2, [text] * 2, finished=[True, False])
    named = make_scorer(strong, weak, tokenizer, policy_tokenizer=str(tmp_path))
    told = make_scorer(strong, weak, tokenizer)
    told.use_policy_tokenizer(policy)
    for scorer in (named, told):
        scores = scorer.score(["hello"] * 2, [text] * 2, completion_ids=rows_of_ids)
        assert [score.finished for score in scores] == [True, False]
        assert torch.equal(values(scores), values(offline))


def test_where_the_policy_s_generation_stops_a_completion_is_finished(strong, weak, tokenizer):
    """Some name an end of the turn in their generation config alone."""
    policy = byte_tokenizer(280)
    text = "what is this"
    ids = policy(text, add_special_tokens=False).input_ids
    scorer = make_scorer(strong, weak, tokenizer)
    [finished] = scorer.score(["hello"], [text], finished=[True])
    for ends, is_finished in (((), False), ((277,), True)):
        scorer.use_policy_tokenizer(policy, end_ids=ends)
        [score] = scorer.score(["hello"], [text], completion_ids=[[*ids, 277]])
        assert score.finished is is_finished
        assert (score.value == finished.value) is is_finished


def test_where_it_stops_is_heard_beside_a_tokenizer_that_was_named(strong, weak, tokenizer, tmp_path):
    policy = byte_tokenizer(280)
    policy.save_pretrained(tmp_path)
    scorer = make_scorer(strong, weak, tokenizer, policy_tokenizer=str(tmp_path))
    ids = policy("what is this", add_special_tokens=False).input_ids
    for ends, is_finished in (((277,), True), ((), False)):  # before the named one is loaded, and after
        scorer.use_policy_tokenizer(tokenizer, end_ids=ends)
        [score] = scorer.score(["hello"], ["what is this"], completion_ids=[[*ids, 277]])
        assert score.finished is is_finished


def test_a_policy_with_another_vocabulary_never_takes_the_ids_path(strong, weak, tokenizer):
    """Ids of another vocabulary can decode to the right text by chance; the known tokenizer says that they are not."""
    policy = byte_tokenizer(280)
    scorer = make_scorer(strong, weak, tokenizer)
    scorer.use_policy_tokenizer(policy)
    ids = tokenizer("wh", add_special_tokens=False).input_ids  # bytes have the same ids in both
    [score] = scorer.score(["hello"], ["wh"], completion_ids=[ids])
    assert score.finished is False


def test_thinking_text_is_scored_as_written(strong, weak, tokenizer):
    scorer = make_scorer(strong, weak, tokenizer, chat_template_kwargs={"enable_thinking": False})
    text = "<think>\nwhat is this\n</think>\n\nhello"
    [score] = scorer.score([chat("hello")], [text], is_generated=[True])
    rendered = render(tokenizer, chat("hello"), enable_thinking=False)
    assert rendered.endswith("</think>\n\n")
    prompt_ids, ids = split_text(tokenizer, rendered, text, tokenizer.eos_token)
    assert tokenizer.convert_tokens_to_ids("<think>") in ids
    expected = completion_logps(strong, prompt_ids, ids).sum() - completion_logps(weak, prompt_ids, ids).sum()
    assert score.value == pytest.approx(float(expected), abs=1e-4)


def test_a_held_model_is_never_changed(tokenizer):
    strong, weak = llama(len(tokenizer), seed=0).train(), llama(len(tokenizer), seed=1, attention_dropout=0.5).train()
    weak.model.layers[0].eval()
    flags = [[m.training for m in model.modules()] for model in (strong, weak)]
    before = [{name: p.clone() for name, p in model.named_parameters()} for model in (strong, weak)]
    scorer = make_scorer(strong, weak, tokenizer)
    assert torch.equal(values(scorer.score(*rows())), values(scorer.score(*rows())))  # dropout is off
    assert [[m.training for m in model.modules()] for model in (strong, weak)] == flags
    for model, parameters in zip((strong, weak), before, strict=True):
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad
            assert parameter.grad is None
            assert torch.equal(parameter, parameters[name])


def test_the_tokenizers_are_never_changed(strong, weak):
    tokenizer = byte_tokenizer()
    before = tokenizer.backend_tokenizer.to_str()
    tokenizer("hello", padding="max_length", max_length=20, truncation=True)
    padded = tokenizer.backend_tokenizer.to_str()
    assert padded != before  # somebody else's padding and truncation are on
    score = make_scorer(strong, weak, tokenizer).score(["hello " * 30], ["<|im_end|>"])
    assert tokenizer.backend_tokenizer.to_str() == padded
    assert values(score) == values(make_scorer(strong, weak, byte_tokenizer()).score(["hello " * 30], ["<|im_end|>"]))


def test_autocast_and_gradients_of_the_caller_do_not_reach_the_pair(strong, weak, tokenizer):
    outside = values(make_scorer(strong, weak, tokenizer).score(*rows()))
    with torch.enable_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        inside = make_scorer(strong, weak, tokenizer).score(*rows())
    assert torch.equal(values(inside), outside)
    assert not inside[0].per_token.requires_grad


def test_threads_get_the_same_scores_one_at_a_time(checkpoints, monkeypatch):
    running, most, loads = [], [], []
    run, load = CausalLM.per_token_logps, CausalLM.load

    def watched(self, *args, **kwargs):
        running.append(self)
        most.append(len(running))
        time.sleep(0.01)
        result = run(self, *args, **kwargs)
        running.remove(self)
        return result

    monkeypatch.setattr(CausalLM, "per_token_logps", watched)
    monkeypatch.setattr(CausalLM, "load", lambda *args, **kwargs: loads.append(args) or load(*args, **kwargs))
    scorer = DensityRatioScorer(checkpoints["strong"], checkpoints["weak"])
    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(lambda _: values(scorer.score(*rows())), range(4)))
    assert all(torch.equal(result, results[0]) for result in results)
    assert max(most) == 1
    assert len(loads) == 2


def test_pickling_keeps_names_and_drops_models(checkpoints, strong, tokenizer):
    by_name = DensityRatioScorer(checkpoints["strong"], checkpoints["weak"])
    expected = values(by_name.score(*rows()))
    pickled = pickle.dumps(by_name)
    assert len(pickled) < 100_000
    assert torch.equal(values(pickle.loads(pickled).score(*rows())), expected)
    held = pickle.loads(pickle.dumps(DensityRatioScorer(strong, checkpoints["weak"], strong_tokenizer=tokenizer)))
    with pytest.raises(ConfigError, match="strong was a loaded model, and loaded models are not pickled"):
        held.score(*rows())


def test_columns_of_the_call_must_be_equally_long(checkpoints):
    scorer = DensityRatioScorer("not loaded", "either")
    with pytest.raises(InputError, match="completions has 1 rows and prompts has 2"):
        scorer.score(["a", "b"], ["c"])
    with pytest.raises(InputError, match="completion_ids has 0 rows"):
        scorer.score(["a"], ["c"], completion_ids=[])
    with pytest.raises(InputError, match="prompts is 'hello'"):
        scorer.score("hello", "world")
    with pytest.raises(InputError, match=r"finished\[1\] is 'no'. Use True, False or None"):
        scorer.score(["a", "b"], ["c", "d"], finished=[True, "no"])
    for row in (None, 5, [None], [1.5]):
        with pytest.raises(InputError, match=r"completion_ids\[0\] is .*Pass a list of token ids"):
            scorer.score(["a"], ["c"], completion_ids=[row])
    with pytest.raises(InputError, match="prompts is None"):
        scorer.score(None, ["c"])
    with pytest.raises(InputError, match="completions is None"):
        scorer.score(["a"], None)
    assert scorer.score([], []) == []


def test_domains_come_back(strong, weak, tokenizer):
    scores = make_scorer(strong, weak, tokenizer).score(["a", "b"], ["c", None], domains=["math", None])
    assert [score.domain for score in scores] == ["math", None]
    [number] = make_scorer(strong, weak, tokenizer).score(["a"], ["c"], domains=[3])  # of a ClassLabel
    assert number.domain == "3"


def test_conversations_need_a_template(strong, weak, tmp_path):
    bare = byte_tokenizer(template=None)
    scorer = make_scorer(strong, weak, bare)
    with pytest.raises(ConfigError, match="no chat template.*cdr_chat_template"):
        scorer.score([chat("hello")], ["a"])
    assert scorer.score(["hello"], ["a"])[0].error is None
    template = tmp_path / "chatml.jinja"
    template.write_text(CHATML)
    with_template = make_scorer(strong, weak, bare, chat_template=str(template)).score([chat("hello")], ["a"])
    assert values(with_template) == values(make_scorer(strong, weak, byte_tokenizer()).score([chat("hello")], ["a"]))


def test_a_model_without_template_reads_its_partners(strong, weak):
    pair = {"strong_tokenizer": byte_tokenizer(), "weak_tokenizer": byte_tokenizer(template=None)}
    borrowed = DensityRatioScorer(strong, weak, **pair).score([chat("hello")], ["a"])
    assert values(borrowed) == values(make_scorer(strong, weak, byte_tokenizer()).score([chat("hello")], ["a"]))


def test_no_end_token_is_an_error_not_a_silent_omission(strong, weak):
    endless = byte_tokenizer(template=None)
    endless.eos_token = None
    scorer = make_scorer(strong, weak, endless)
    with pytest.raises(ModelError, match=r"strong_tokenizer knows no end token.*finished=False"):
        scorer.score(["hello"], ["a"])
    assert scorer.score(["hello"], ["a"], finished=[False])[0].error is None


def test_score_is_frozen():
    with pytest.raises(AttributeError):
        Score(1.0).value = 2.0


def test_a_pair_that_reads_alike_encodes_each_row_once(strong, weak, tokenizer, monkeypatch):
    prompts, completions = rows()
    encoded, encode = [], Encoder.encode
    monkeypatch.setattr(Encoder, "encode", lambda self, *args: encoded.append(self) or encode(self, *args))
    expected = values(make_scorer(strong, weak, tokenizer).score(prompts, completions))
    assert len(encoded) == len(prompts)
    encoded.clear()
    other = byte_tokenizer(bos=True)  # the same vocabulary, but string prompts are read with BOS
    scorer = DensityRatioScorer(strong, weak, strong_tokenizer=tokenizer, weak_tokenizer=other, string_prompts="text")
    scores = scorer.score(prompts, completions)
    assert len(encoded) == 2 * len(prompts)
    same = torch.tensor([not isinstance(prompt, str) for prompt in prompts])
    torch.testing.assert_close(values(scores)[same], expected[same], rtol=0, atol=1e-4)
    assert (values(scores) - expected)[~same].abs().min() > 1e-3


def test_groups_behind_a_common_prefix_equal_the_naive_reference(strong, weak, tokenizer):
    """What GRPO hands over: several completions to each prompt, all behind one system prompt; packed, and cached."""
    rng = random.Random("groups")
    system = "system:" + "what is this and that " * 8
    prompts = [chat(system, text) for text in ("hello", "the quick", "a lazy dog") for _ in range(4)]
    completions = [random_text(rng, 12) for _ in prompts]
    scorer = make_scorer(strong, weak, tokenizer)
    first, again = (scorer.score(prompts, completions) for _ in range(2))
    assert [score.value for score in first] == [score.value for score in again]
    expected = []
    for prompt, completion in zip(prompts, completions, strict=True):
        prompt_ids, ids = split_text(tokenizer, render(tokenizer, prompt), completion, tokenizer.eos_token)
        strong_logps, weak_logps = (completion_logps(model, prompt_ids, ids).sum() for model in (strong, weak))
        expected.append(float(strong_logps - weak_logps))
    torch.testing.assert_close([score.value for score in first], expected, rtol=0, atol=1e-4)


def test_unload_lets_go_of_the_pair_for_all_who_share_it(checkpoints):
    scorer = DensityRatioScorer(checkpoints["strong"], checkpoints["weak"])
    other = DensityRatioScorer(share=scorer, reduction="mean")
    before = [values(each.score(*rows())) for each in (scorer, other)]
    models = [weakref.ref(member.lm.model) for member in (scorer._source.get().strong, scorer._source.get().weak)]
    scorer.unload()
    assert [model() for model in models] == [None, None]
    for each, expected in zip((scorer, other), before, strict=True):
        assert torch.equal(values(each.score(*rows())), expected)


def test_describe(strong, weak, tokenizer):
    told = make_scorer(strong, weak, tokenizer).describe()
    assert told["strong"]["way"] == "packed"
    assert told["weak"]["max_length"] == 256
    assert (told["shares_vocabulary"], told["reads_alike"]) == (True, True)


def test_describe_says_which_weights_were_loaded(checkpoints, weak, tokenizer):
    told = DensityRatioScorer(checkpoints["strong"], weak, weak_tokenizer=tokenizer).describe()
    assert told["strong"]["weights"] == identify_weights(checkpoints["strong"], "strong")
    assert told["weak"]["weights"] is None


def test_equal_rows_are_run_once(strong, weak, tokenizer, monkeypatch):
    """Their scores are then the same to the bit, wherever in a pack they would have been."""
    run, counts = CausalLM.per_token_logps, []

    def watched(self, layout, **kwargs):
        counts.append(len(layout.rows))
        return run(self, layout, **kwargs)

    monkeypatch.setattr(CausalLM, "per_token_logps", watched)
    rng = random.Random("equal")
    prompts = [random_prompt(rng) for _ in range(12)]
    completions = [random_text(rng, 15) for _ in prompts]
    order = [rng.randrange(12) for _ in range(60)]
    scores = make_scorer(strong, weak, tokenizer).score([prompts[i] for i in order], [completions[i] for i in order])
    assert counts == [12, 12]
    assert len({(index, score.value, score.typicality) for index, score in zip(order, scores, strict=True)}) == 12
