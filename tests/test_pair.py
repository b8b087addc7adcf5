"""What is refused before and while a pair is loaded."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from lora import adapt
from tiny import byte_tokenizer, llama
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from trl_cdr import ConfigError, DensityRatioScorer, ModelError
from trl_cdr.scoring import loading, pair_loading
from trl_cdr.scoring.encoding import Encoder


def test_objects_are_in_every_process(tokenizer, strong, weak):
    with pytest.raises(ConfigError, match="replicas is 'node', and strong is a loaded LlamaForCausalLM.*or leave"):
        DensityRatioScorer(strong, weak, strong_tokenizer=tokenizer, weak_tokenizer=tokenizer, replicas="node")


def test_sources_are_checked_before_anything_is_loaded(strong, tokenizer):
    with pytest.raises(ConfigError, match="strong is None. Pass a model's name"):
        DensityRatioScorer(weak="b")
    with pytest.raises(ConfigError, match="weak is 3. Pass a model's name"):
        DensityRatioScorer("a", 3)
    with pytest.raises(ConfigError, match="strong is a loaded LlamaForCausalLM and strong_tokenizer is missing"):
        DensityRatioScorer(strong, "b")
    with pytest.raises(ConfigError, match="weak_tokenizer is a str"):
        DensityRatioScorer("a", strong, weak_tokenizer="b")
    with pytest.raises(ConfigError, match="strong and weak are one LlamaForCausalLM, or what peft"):
        DensityRatioScorer(strong, strong, strong_tokenizer=tokenizer, weak_tokenizer=tokenizer)


def test_a_base_that_peft_put_the_adapter_into_is_no_second_model(strong, tokenizer):
    base = copy.deepcopy(strong)
    adapted = adapt(base)
    tokenizers = {"strong_tokenizer": tokenizer, "weak_tokenizer": tokenizer}
    for pair in ((adapted, base), (base, adapted), (adapted, adapted)):
        with pytest.raises(ConfigError, match="they have the same parameters, and every log-ratio would be 0"):
            DensityRatioScorer(*pair, **tokenizers)
    [score] = DensityRatioScorer(adapted, strong, **tokenizers).score(["a"], ["b"])
    assert abs(score.value) > 1e-3


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


@pytest.mark.parametrize("role", ["strong", "weak"])
def test_the_generation_configs_end_tokens_count_if_they_are_special(role, tokenizer):
    """A config's default end id can be any token; only a special one ends a completion. One model has to name it."""
    strong, weak = llama(len(tokenizer), seed=0), llama(len(tokenizer), seed=1)
    letter = tokenizer("q", add_special_tokens=False).input_ids[0]
    other_end = tokenizer.convert_tokens_to_ids("</s>")
    {"strong": strong, "weak": weak}[role].generation_config.eos_token_id = [letter, other_end]
    scorer = DensityRatioScorer(strong, weak, strong_tokenizer=tokenizer, weak_tokenizer=tokenizer)
    ids = tokenizer("aqa", add_special_tokens=False).input_ids
    rows = [[*ids, other_end, tokenizer.pad_token_id], ids]
    ended, cut_off = scorer.score(["hello"] * 2, ["aqa"] * 2, completion_ids=rows)
    assert (ended.finished, ended.n_tokens) == (True, len(ids) + 1)
    assert (cut_off.finished, cut_off.n_tokens) == (False, len(ids))


def test_a_path_is_a_name(checkpoints):
    named = DensityRatioScorer(**checkpoints)
    by_path = DensityRatioScorer(**{role: Path(folder) for role, folder in checkpoints.items()})
    assert by_path.config == named.config
    assert DensityRatioScorer("a", "b", strong_adapter=Path("c")).config.cdr_strong_adapter == "c"
    assert by_path.score(["hello"], ["a"]) == named.score(["hello"], ["a"])


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


@pytest.mark.parametrize("smaller", ["strong", "weak"])
def test_an_id_that_only_one_model_has_is_a_row_s_reason(smaller):
    """Both read alike, so that a row is encoded once; on an accelerator the lookup would end the process."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["[IMAGE]"])
    models = {
        role: llama(len(tokenizer) - (role == smaller), seed=seed) for seed, role in enumerate(("strong", "weak"))
    }
    scorer = DensityRatioScorer(**models, strong_tokenizer=tokenizer, weak_tokenizer=tokenizer)
    assert scorer.describe()["reads_alike"]
    by_prompt, good, by_completion = scorer.score(["[IMAGE]", "hello", "hello"], ["a", "a", "[IMAGE]"])
    assert good.error is None
    for bad in (by_prompt, by_completion):
        assert "the row holds the token id 322, for which LlamaForCausalLM has no embedding" in bad.error


def test_a_token_that_the_head_lacks_is_a_row_s_reason(weak):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["[IMAGE]"])
    strong = llama(len(tokenizer))
    strong.lm_head.weight = torch.nn.Parameter(strong.lm_head.weight[:-1])
    scorer = DensityRatioScorer(strong, weak, strong_tokenizer=tokenizer, weak_tokenizer=tokenizer)
    [score] = scorer.score(["hello"], ["[IMAGE]"])
    assert "token id 322" in score.error


def test_whether_a_pair_reads_alike_is_decided_once(strong, weak, tokenizer, monkeypatch):
    asked = []
    is_like = Encoder.is_like
    monkeypatch.setattr(Encoder, "is_like", lambda self, other: asked.append(1) or is_like(self, other))
    scorer = DensityRatioScorer(strong, weak, strong_tokenizer=tokenizer, weak_tokenizer=tokenizer)
    for _ in range(2):
        scorer.score(["hello"] * 5, list("abcde"))
    assert len(asked) == 1


def test_each_model_is_loaded_at_its_revision(checkpoints, monkeypatch):
    loaded = {}
    load, load_tokenizer = loading.AutoModelForCausalLM.from_pretrained, pair_loading.AutoTokenizer.from_pretrained

    def take(name, kind, kwargs):
        loaded[name, kind] = kwargs.pop("revision")
        return kwargs

    monkeypatch.setattr(
        loading.AutoModelForCausalLM, "from_pretrained", lambda name, **kw: load(name, **take(name, "model", kw))
    )
    monkeypatch.setattr(
        pair_loading.AutoTokenizer,
        "from_pretrained",
        lambda name, **kw: load_tokenizer(name, **take(name, "tokenizer", kw)),
    )
    DensityRatioScorer(**checkpoints, strong_revision="aligned", weak_revision="base").load()
    revisions = {"strong": "aligned", "weak": "base"}
    assert loaded == {
        (checkpoints[role], kind): revisions[role] for role in revisions for kind in ("model", "tokenizer")
    }


def test_per_token_ratios_need_a_shared_vocabulary(strong):
    """Equal ids may stand for different tokens."""
    tokenizer, other = byte_tokenizer(), byte_tokenizer()
    spec = json.loads(other.backend_tokenizer.to_str())
    vocabulary = spec["model"]["vocab"]
    vocabulary["q"], vocabulary["z"] = vocabulary["z"], vocabulary["q"]  # the text below has neither
    weak = llama(len(tokenizer), seed=1)
    other = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(spec)), eos_token="<|im_end|>", pad_token="<|pad|>"
    )
    other.chat_template = tokenizer.chat_template
    scorer = DensityRatioScorer(strong, weak, strong_tokenizer=tokenizer, weak_tokenizer=other)
    [score] = scorer.score(["hello"], ["world"])
    assert score.error is None
    assert score.per_token is None
    same = DensityRatioScorer(strong, weak, strong_tokenizer=tokenizer, weak_tokenizer=tokenizer)
    assert same.score(["hello"], ["world"])[0].per_token is not None


@pytest.mark.parametrize("way", ["one name", "a link", "a copy"])
def test_the_same_weights_twice_are_said_and_loaded_once(way, checkpoints, caplog, tmp_path):
    other = checkpoints["strong"]
    if way == "a link":
        other = str(tmp_path / "link")
        (tmp_path / "link").symlink_to(checkpoints["strong"])
    if way == "a copy":
        other = str(shutil.copytree(checkpoints["strong"], tmp_path / "copy"))
    scorer = DensityRatioScorer(checkpoints["strong"], other)
    [score] = scorer.score(["hello"], ["a"])
    assert score.value == 0
    assert "every log-ratio will be 0" in caplog.text
    pair = scorer._source.get()
    assert pair.strong.lm.model is pair.weak.lm.model


def test_weights_that_differ_in_a_single_number_are_two_models(strong, tokenizer, checkpoints, caplog, tmp_path):
    """Whatever a digest of some blocks of a large file says."""
    other = copy.deepcopy(strong)
    with torch.no_grad():
        other.model.norm.weight[0] += 1
    other.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    [score] = DensityRatioScorer(checkpoints["strong"], str(tmp_path)).score(["hello"], ["a"])
    assert score.value != 0
    assert "every log-ratio will be 0" not in caplog.text


def test_the_policys_tokenizer_is_looked_for_first(tmp_path):
    with pytest.raises(ModelError, match="cdr_policy_tokenizer can't be loaded"):
        DensityRatioScorer("no such model", "nor this", policy_tokenizer=str(tmp_path)).load()


def test_a_template_that_is_no_text(tmp_path, checkpoints):
    (tmp_path / "template").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cdr_chat_template is .* can't be read"):
        DensityRatioScorer(checkpoints["strong"], checkpoints["weak"], chat_template=str(tmp_path / "template")).load()
