"""Token search on tiny random models, whose ratio it has to find the way up of."""

import pytest
import torch
from tiny import byte_tokenizer, chat, llama

from trl_cdr import DensityRatioScorer
from trl_cdr.annotation.bouts import score_completions, with_gate
from trl_cdr.annotation.search import CANDIDATES, search_tokens
from trl_cdr.scoring.rewards import rewards_from_scores
from trl_cdr.scoring.types import Completion

PROMPTS = [chat("hello"), chat("what is this?")]


@pytest.fixture(scope="module")
def plain(strong, weak, tokenizer):
    return DensityRatioScorer(strong, weak, strong_tokenizer=tokenizer, weak_tokenizer=tokenizer, gate="none")


def search(scorer, steps, prompts=PROMPTS, seed=0):
    return search_tokens(scorer, prompts, domains=[None] * len(prompts), budget=steps * CANDIDATES, seed=seed)


def rewards(scorer, completions, prompts=PROMPTS):
    return rewards_from_scores(score_completions(scorer, prompts, completions), on_unscorable="raise")


def test_the_reward_is_found_and_grows_with_the_budget(plain, tokenizer):
    found = [search(plain, steps) for steps in (1, 4, 8)]
    worth = [rewards(plain, completions) for completions in found]
    for one, four, eight in zip(*worth, strict=True):
        assert one <= four <= eight
        assert eight > one + 5
    assert found[1] == search(plain, 4)
    for one in found[2]:
        assert one.ids[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")
        assert one.text == tokenizer.decode(one.ids, skip_special_tokens=True)
    counts = [score.n_tokens for score in score_completions(plain, PROMPTS, found[2])]
    assert counts == [len(one.ids) for one in found[2]]  # as ids: the text alone may be other tokens


def test_one_step_tries_the_likeliest_token_and_the_most_raised(plain, strong, weak, tokenizer):
    prompts = [chat(text) for text in ("hello", "over?", "a dog", "what is this?", "jumps", "and that", "quick", "fox")]
    for prompt, one in zip(prompts, search(plain, 1, prompts), strict=True):
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        with torch.no_grad():
            own, other = (model(torch.tensor([ids])).logits[0, -1].log_softmax(-1) for model in (strong, weak))
        special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
        allowed = [id for id in range(len(tokenizer)) if id not in special]
        kinds = {max(allowed, key=own.__getitem__), max(allowed, key=(own - other).__getitem__)}
        end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        tried = [
            rewards(plain, [Completion(tokenizer.decode([id], skip_special_tokens=True), True, (id, end))], [prompt])[0]
            for id in kinds
        ]
        assert rewards(plain, [one], [prompt])[0] >= max(tried) - 1e-4


def test_tokens_that_are_no_text_are_not_tried(weak, tokenizer):
    """Strong writes little but one of two of them, wherever it is."""
    strong = llama(len(tokenizer), seed=0)
    one, other = tokenizer.convert_tokens_to_ids(["<s>", "</s>"])
    with torch.no_grad():
        strong.lm_head.weight[one] *= 20
        strong.lm_head.weight[other] = -strong.lm_head.weight[one]
    scorer = DensityRatioScorer(strong, weak, strong_tokenizer=tokenizer, weak_tokenizer=tokenizer, gate="none")
    assert not any({one, other} & {*found.ids} for found in search(scorer, 6))


def test_what_is_looked_for_is_the_reward_behind_the_gate(plain):
    surprise = with_gate(plain, "surprise")
    by_ratio, by_reward = search(plain, 5), search(surprise, 5)
    assert sum(rewards(surprise, by_reward)) > sum(rewards(surprise, by_ratio))


def test_models_of_two_vocabularies_are_searched_by_text(strong, tokenizer):
    other = byte_tokenizer(300)
    scorer = DensityRatioScorer(
        strong, llama(len(other), seed=1), strong_tokenizer=tokenizer, weak_tokenizer=other, gate="none"
    )
    found = search(scorer, 4)
    assert [(one.ids, one.finished) for one in found] == [(None, True)] * 2
    assert min(rewards(scorer, found)) > min(rewards(scorer, search(scorer, 1)))
