"""The tiny world's models: tokenizer, training, cache, sampling. Training is cut to a few steps."""

import random
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_cdr.demo import models, world


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """An empty cache folder, and recipes of three steps."""
    monkeypatch.setattr(models, "RECIPES", tuple(replace(recipe, steps=3) for recipe in models.RECIPES))
    monkeypatch.setenv("TRL_CDR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def tokenizer():
    return models.build_tokenizer()


def weights(path):
    return (path / "model.safetensors").read_bytes()


def test_every_sentence_round_trips(tokenizer):
    texts = [text for task in world.TASKS.values() for text in (task.prompt, *task.right, *task.wrong)]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert tokenizer.batch_decode(ids) == texts
    assert [len(row) for row in ids] == [len(text.split()) for text in texts]
    assert not any(tokenizer.unk_token_id in row for row in ids)


def test_the_chat_template_ends_every_turn(tokenizer):
    turns = [
        {"role": "system", "content": "a"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "c"},
    ]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == (
        "<|system|>a<|end|><|user|>b<|end|><|assistant|>c<|end|>"
    )
    assert tokenizer.apply_chat_template(turns[:2], tokenize=False, add_generation_prompt=True).endswith(
        "<|assistant|>"
    )


def test_labels_are_the_completion_and_its_end_token(tokenizer):
    text = "<|user|>add 1 and 2 .<|end|><|assistant|>the answer is 3 .<|end|>"
    batch = tokenizer([text, text[: text.index("3")]], padding=True, padding_side="right", return_tensors="pt")
    labels = models._completion_labels(batch, tokenizer)
    assert [tokenizer.decode(row[row != -100]) for row in labels] == ["the answer is 3 . <|end|>", "the answer is"]


def test_checkpoints_load_as_any_other(cache):
    checkpoints = models.build_checkpoints()
    for path in (checkpoints.base, checkpoints.mild, checkpoints.policy):
        assert path.parent.parent == cache
        assert path.parent.name.startswith(f"tiny-world-v{models.RECIPE_VERSION}-")
        model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
        assert model.dtype == torch.float32
        assert model.generation_config.eos_token_id == tokenizer.eos_token_id
        assert tokenizer.chat_template


def test_a_cached_build_is_reused_and_a_fresh_one_has_the_same_bits(cache, monkeypatch):
    checkpoints = models.build_checkpoints()
    first = {name: weights(getattr(checkpoints, name)) for name in ("base", "mild", "policy")}
    stamp = checkpoints.base.stat().st_mtime_ns
    assert models.build_checkpoints() == checkpoints
    assert checkpoints.base.stat().st_mtime_ns == stamp

    torch.manual_seed(99)
    random.seed(99)
    assert models.build_checkpoints(cache=False) == checkpoints
    assert checkpoints.base.stat().st_mtime_ns != stamp
    assert {name: weights(getattr(checkpoints, name)) for name in first} == first
    assert len(set(first.values())) == 3
    assert [path.name for path in cache.iterdir()] == [checkpoints.base.parent.name]

    monkeypatch.setattr(models, "RECIPE_VERSION", "next")
    assert models.build_checkpoints().base != checkpoints.base


def test_a_build_that_stops_half_way_leaves_nothing(cache, monkeypatch):
    train, built = models._train, []

    def stop_at_the_third(*args, **kwargs):
        built.append(kwargs["recipe"].name)
        if len(built) == 3:
            raise KeyboardInterrupt
        train(*args, **kwargs)

    monkeypatch.setattr(models, "_train", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        models.build_checkpoints()
    assert list(cache.iterdir()) == []


def test_of_two_builds_at_once_the_first_one_stays(cache, monkeypatch):
    build = models._build

    def overtaken(*arguments):
        monkeypatch.setattr(models, "_build", build)
        overtaken.checkpoints = models.build_checkpoints()
        overtaken.stamp = overtaken.checkpoints.base.stat().st_mtime_ns
        build(*arguments)

    monkeypatch.setattr(models, "_build", overtaken)
    assert models.build_checkpoints() == overtaken.checkpoints
    assert overtaken.checkpoints.base.stat().st_mtime_ns == overtaken.stamp
    assert len(list(cache.iterdir())) == 1


@pytest.mark.usefixtures("cache")
def test_building_and_sampling_leave_global_state_alone(capfd):
    torch.manual_seed(5)
    random.seed(5)
    before = torch.get_rng_state(), random.getstate(), torch.get_num_threads()
    path = models.build_checkpoints().policy
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path).train(), AutoTokenizer.from_pretrained(path)
    models.sample(model, tokenizer, prompts=[world.conversation(world.TRAIN[0])], per_prompt=2, seed=0)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert torch.get_num_threads() == before[2]
    assert model.training
    assert capfd.readouterr().out == ""


def test_samples_are_grouped_by_prompt_cut_at_the_end_token_and_repeatable(tokenizer):
    model = models._new_model(0)
    prompts = [world.conversation(task) for task in world.HELD_OUT[:5]]
    groups = models.sample(model, tokenizer, prompts=prompts, per_prompt=30, seed=1)
    assert [len(group) for group in groups] == [30] * 5
    assert groups == models.sample(model, tokenizer, prompts=prompts, per_prompt=30, seed=1)
    assert groups != models.sample(model, tokenizer, prompts=prompts, per_prompt=30, seed=2)
    samples = [one for group in groups for one in group]
    assert {one.finished for one in samples} == {True, False}  # random weights: some end in time, some don't
    assert not any("<|end|>" in one.text for one in samples)
    assert all(len(one.text.split()) < models.MAX_NEW_TOKENS for one in samples if one.finished)


def test_importing_the_world_loads_no_torch():
    code = "import sys, trl_cdr.demo, trl_cdr.demo.world; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
