"""What is refused before and while a pair is loaded."""

import pytest
import torch
from tiny import byte_tokenizer, llama

from trl_cdr import ConfigError, DensityRatioScorer, ModelError


def test_sources_are_checked_before_anything_is_loaded(strong, tokenizer):
    with pytest.raises(ConfigError, match="strong is None. Pass a model's name"):
        DensityRatioScorer(weak="b")
    with pytest.raises(ConfigError, match="weak is 3. Pass a model's name"):
        DensityRatioScorer("a", 3)
    with pytest.raises(ConfigError, match="strong is a loaded LlamaForCausalLM and strong_tokenizer is missing"):
        DensityRatioScorer(strong, "b")
    with pytest.raises(ConfigError, match="weak_tokenizer is a str"):
        DensityRatioScorer("a", strong, weak_tokenizer="b")
    with pytest.raises(ConfigError, match="strong and weak are the same LlamaForCausalLM object"):
        DensityRatioScorer(strong, strong, strong_tokenizer=tokenizer, weak_tokenizer=tokenizer)


def test_a_tokenizer_that_is_too_large_for_its_model(strong, checkpoints):
    larger = byte_tokenizer(400)
    scorer = DensityRatioScorer(strong, checkpoints["weak"], strong_tokenizer=larger)
    with pytest.raises(ModelError, match=r"strong_tokenizer has the token id 329, and strong .* embeds 322 tokens"):
        scorer.load()


def test_a_folder_without_tokenizer(tmp_path, strong, checkpoints):
    strong.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="weak_tokenizer can't be loaded from"):
        DensityRatioScorer(checkpoints["strong"], str(tmp_path)).load()


def test_more_positions_than_the_model_has(checkpoints):
    with pytest.raises(ConfigError, match="cdr_max_length is 300, and strong .* has 256 positions"):
        DensityRatioScorer(checkpoints["strong"], checkpoints["weak"], max_length=300).load()


def test_max_length_cuts_earlier_than_the_model(checkpoints):
    scorer = DensityRatioScorer(checkpoints["strong"], checkpoints["weak"], max_length=20)
    short, long = scorer.score(["hello", "hello " * 30], ["a", "a"])
    assert (short.truncated, long.truncated) == (False, True)


def test_the_generation_configs_end_tokens_count_if_they_are_special(tokenizer):
    """A config's default end id can be any token; only a special one ends a completion."""
    strong, weak = llama(len(tokenizer), seed=0), llama(len(tokenizer), seed=1)
    letter = tokenizer("q", add_special_tokens=False).input_ids[0]
    other_end = tokenizer.convert_tokens_to_ids("</s>")
    strong.generation_config.eos_token_id = [letter, other_end]
    scorer = DensityRatioScorer(strong, weak, strong_tokenizer=tokenizer, weak_tokenizer=tokenizer)
    ids = tokenizer("aqa", add_special_tokens=False).input_ids
    rows = [[*ids, other_end, tokenizer.pad_token_id], ids]
    ended, cut_off = scorer.score(["hello"] * 2, ["aqa"] * 2, completion_ids=rows)
    assert (ended.finished, ended.n_tokens) == (True, len(ids) + 1)
    assert (cut_off.finished, cut_off.n_tokens) == (False, len(ids))


def test_loaded_and_named_models_mix(checkpoints, weak, tokenizer):
    named = DensityRatioScorer(checkpoints["strong"], checkpoints["weak"]).score(["hello"], ["a"])
    mixed = DensityRatioScorer(checkpoints["strong"], weak, weak_tokenizer=tokenizer).score(["hello"], ["a"])
    assert mixed[0].value == named[0].value
    assert torch.is_grad_enabled()


def test_an_added_token_beyond_the_embeddings_is_a_row_s_reason(strong, weak):
    """Gemma 3's text models come with a placeholder of images that they can't embed."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["[IMAGE]"])
    scorer = DensityRatioScorer(strong, weak, strong_tokenizer=tokenizer, weak_tokenizer=tokenizer)
    good, bad = scorer.score(["hello", "[IMAGE]"], ["a", "a"])
    assert good.error is None
    assert "the row holds the token id 322, for which LlamaForCausalLM has no embedding" in bad.error


def test_the_same_name_twice_is_legitimate_and_said(checkpoints, caplog):
    [score] = DensityRatioScorer(checkpoints["strong"], checkpoints["strong"]).score(["hello"], ["a"])
    assert score.value == 0
    assert "every log-ratio will be 0" in caplog.text


def test_the_policys_tokenizer_is_looked_for_first(tmp_path):
    with pytest.raises(ModelError, match="cdr_policy_tokenizer can't be loaded"):
        DensityRatioScorer("no such model", "nor this", policy_tokenizer=str(tmp_path)).load()


def test_a_template_that_is_no_text(tmp_path, checkpoints):
    (tmp_path / "template").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cdr_chat_template is .* can't be read"):
        DensityRatioScorer(checkpoints["strong"], checkpoints["weak"], chat_template=str(tmp_path / "template")).load()
