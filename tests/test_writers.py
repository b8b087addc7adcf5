"""Samples for the probe, of tiny random models."""

import random
import shutil
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from families import FAMILIES, V, build_family
from lora import save_adapter, save_merged
from tiny import byte_tokenizer, chat, llama
from transformers import GenerationConfig

from trl_cdr import CDRConfig, ConfigError, DensityRatioScorer, ModelError
from trl_cdr.annotation import writers
from trl_cdr.annotation.writers import end_id, load_policy, prompt_ids, write
from trl_cdr.scoring.causal_lm import CausalLM

PROMPTS = [chat("hello"), "the quick brown fox jumps", chat("what is this and that?", "a dog", "over?")]


@pytest.fixture(scope="module")
def pair(strong, weak, tokenizer):
    return DensityRatioScorer(strong, weak, strong_tokenizer=tokenizer, weak_tokenizer=tokenizer).load()


def sample(member, prompts=PROMPTS, *, seed=0, **options):
    seeds = [f"{seed} {prompt}" for prompt in prompts]
    return write(
        member, prompts, **{"per_prompt": 2, "temperature": 1.0, "max_new_tokens": 6, "seeds": seeds, **options}
    )


def test_samples_are_seeded_and_leave_no_trace(pair):
    model = pair.strong.lm.model
    model.train()
    state = torch.random.get_rng_state()
    groups = sample(pair.strong)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training
    model.eval()
    assert [len(group) for group in groups] == [2, 2, 2]
    assert groups == sample(pair.strong)
    assert groups != sample(pair.strong, seed=1)
    assert groups != sample(pair.weak)


def test_what_others_share_a_batch_does_not_matter(pair):
    together = sample(pair.strong)
    assert together == [sample(pair.strong, [prompt])[0] for prompt in PROMPTS]
    assert together == sample(pair.strong, PROMPTS[::-1])[::-1]
    assert [group[:2] for group in sample(pair.strong, per_prompt=5)] == together  # more of them change none
    assert together[0][0] != together[0][1]


def test_the_coldest_sample_is_greedy(pair):
    ids = pair.strong.encoder.tokenizer("the quick brown fox jumps")["input_ids"]
    written = len(ids)
    with torch.no_grad():
        for _ in range(6):
            ids.append(int(pair.strong.lm.model(torch.tensor([ids])).logits[0, -1].argmax()))
    cold = sample(pair.strong, temperature=1e-4, per_prompt=1)
    assert cold[1][0].text == pair.strong.encoder.tokenizer.decode(ids[written:], skip_special_tokens=True)


def test_samples_are_of_the_models_distribution(pair):
    """First tokens of many samples beside the probabilities that they have."""
    tokenizer, lm = pair.strong.encoder.tokenizer, pair.strong.lm.model
    [group] = sample(pair.strong, ["over"], per_prompt=4000, max_new_tokens=1, temperature=1.5)
    with torch.no_grad():
        logits = lm(torch.tensor([tokenizer("over")["input_ids"]])).logits[0, -1].double()
    expected = {}
    for token, share in enumerate((logits / 1.5).softmax(-1).tolist()):
        text = tokenizer.decode([token], skip_special_tokens=True)
        expected[text] = expected.get(text, 0.0) + share
    found = Counter(one.text for one in group)
    likely = [text for text, share in expected.items() if share > 0.01]
    assert len(likely) >= 4
    for text in likely:
        assert abs(found[text] / 4000 - expected[text]) < 4 * (expected[text] / 4000) ** 0.5


def test_a_prompt_is_read_once_for_all_its_completions(pair):
    read = []
    model = pair.strong.lm.model
    hook = model.get_input_embeddings().register_forward_hook(lambda _, args, out: read.append(args[0].numel()))
    try:
        groups = sample(pair.strong, per_prompt=8, max_new_tokens=2)
    finally:
        hook.remove()
    lengths = [len(prompt_ids(pair.strong, prompt)) for prompt in PROMPTS]
    assert sum(read) == len(PROMPTS) * (max(lengths) - 1) + 8 * len(PROMPTS) * 2
    assert [group[:1] for group in groups] == sample(pair.strong, per_prompt=1, max_new_tokens=2)


def unshared(caplog):
    records = [record for record in caplog.records if record.name == "trl_cdr.annotation.writers"]
    return [(record.levelname, record.getMessage().partition("completions: ")[2]) for record in records]


def test_write_warns_once_if_prompts_cannot_be_shared(pair, caplog, monkeypatch):
    """The samples stay the same; each prompt is read once for each completion."""
    expected = sample(pair.strong)
    monkeypatch.setattr(writers, "_unshared", set())

    def fail(output, *, length):
        raise TypeError(f"after {length} tokens the cache has keys and values of 0")

    monkeypatch.setattr(writers, "find_shareable", fail)
    for _ in range(2):
        assert sample(pair.strong) == expected
    [(level, reason)] = unshared(caplog)
    assert level == "WARNING"
    assert reason.startswith("after ")


def test_write_warns_of_a_cache_implementation(pair, caplog, monkeypatch):
    """Such as Gemma 2's generation config has."""
    expected = sample(pair.strong)
    monkeypatch.setattr(writers, "_unshared", set())
    monkeypatch.setattr(pair.strong.lm.model.generation_config, "cache_implementation", "static", raising=False)
    assert sample(pair.strong) == expected
    assert unshared(caplog) == [("WARNING", "its generation config has cache_implementation='static'.")]


@pytest.mark.filterwarnings("ignore:The `sliding_window_pattern` attribute is deprecated:FutureWarning")
def test_read_once_of_a_recurrent_model_is_no_loss(caplog, monkeypatch):
    monkeypatch.setattr(writers, "_unshared", set())
    lm = CausalLM(build_family("Mamba"), "policy")
    batch = torch.tensor([[3, 5, 7, 9]])
    read = []
    lm.model.get_input_embeddings().register_forward_hook(lambda _, args, out: read.append(args[0].numel()))
    with caplog.at_level("INFO"), torch.inference_mode():
        for _ in range(3):
            assert writers._read_once(lm, batch, torch.ones_like(batch), torch.tensor([0, 0]), pad=0) == {}
    [(level, _)] = unshared(caplog)
    assert level == "INFO"
    assert sum(read) == 3  # once, to find out


@pytest.mark.compat
@pytest.mark.filterwarnings("ignore:The `sliding_window_pattern` attribute is deprecated:FutureWarning")
@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_read_once_changes_nothing(name):
    """Of every family, also of those whose states are no keys and values, or not those of all tokens."""
    lm = CausalLM(build_family(name), "policy")
    tokenizer = SimpleNamespace(pad_token_id=None, decode=lambda ids, **_: str(ids))
    member = SimpleNamespace(local=lm, encoder=SimpleNamespace(tokenizer=tokenizer), final_ids=(), max_length=None)
    draw = random.Random(0)
    prompts = [tuple(draw.randrange(1, V) for _ in range(count)) for count in (1, 5, 19, 21)]
    rows = [prompt for prompt in prompts for _ in range(3)]
    generator = torch.Generator().manual_seed(0)
    numbers = torch.rand(len(rows), 6, generator=generator, dtype=torch.float64)

    def written(rows, numbers):
        found = writers._generate(member, rows, numbers=numbers, temperature=1.0, max_new_tokens=6)
        return [one.text for one in found]

    with torch.inference_mode():
        together = written(rows, numbers)
        # No two of one prompt in a batch.
        apart = [written(rows[first::3], numbers[first::3]) for first in range(3)]
    assert together == [apart[place % 3][place // 3] for place in range(len(rows))]


def test_the_end_of_the_turn_ends_a_sample(tokenizer, weak):
    quick = llama(len(tokenizer), seed=0)
    with torch.no_grad():
        quick.lm_head.weight[tokenizer.eos_token_id] *= 20
    models = {"strong_tokenizer": tokenizer, "weak_tokenizer": tokenizer}
    member = DensityRatioScorer(quick, weak, **models).load().strong
    several = [one for group in sample(member, per_prompt=8, max_new_tokens=24) for one in group]
    lengths = {len(tokenizer(one.text)["input_ids"]) for one in several if one.finished}
    assert len(lengths) > 1
    assert all(one.finished or len(tokenizer(one.text)["input_ids"]) >= 12 for one in several)
    assert not any("<|im_end|>" in one.text for one in several)


def test_prompts_that_can_not_be_read_or_leave_no_room(pair):
    longest = pair.strong.max_length
    length = len(prompt_ids(pair.strong, chat("hello")))
    groups = sample(pair.strong, [chat("\ud800"), "word " * 400, "hello"], per_prompt=1)
    assert [len(group) for group in groups] == [0, 0, 1]
    assert [len(group) for group in sample(pair.strong, [chat("hello")], max_new_tokens=longest - length)] == [2]
    assert sample(pair.strong, [chat("hello")], max_new_tokens=longest - length + 1) == [[]]
    with pytest.raises(ConfigError, match=f"may have {longest} tokens, and the model that writes takes {longest} with"):
        sample(pair.strong, ["hello"], max_new_tokens=longest)


@pytest.mark.parametrize(
    "shaped",
    [
        {"repetition_penalty": 5.0},
        {"no_repeat_ngram_size": 1},
        {"suppress_tokens": [*range(40, 110)]},
        {"min_new_tokens": 6},
        {"num_beams": 2},
        {"num_return_sequences": 2, "do_sample": True, "top_k": 1},
        {"use_cache": False},
    ],
    ids=lambda shaped: next(iter(shaped)),
)
def test_a_model_s_own_way_to_generate_is_left_aside(shaped, pair):
    model = pair.strong.lm.model
    plain = sample(pair.strong, per_prompt=8, max_new_tokens=24)
    own = model.generation_config
    model.generation_config = GenerationConfig(**{**own.to_dict(), **shaped})
    given = model.generation_config
    try:
        assert sample(pair.strong, per_prompt=8, max_new_tokens=24) == plain
        assert model.generation_config is given
    finally:
        model.generation_config = own


def test_where_the_model_s_own_generation_ends_a_sample_ends(tokenizer, weak, quick):
    pair = DensityRatioScorer(quick, weak, strong_tokenizer=tokenizer, weak_tokenizer=tokenizer).load()
    before = sample(pair.strong, per_prompt=16, max_new_tokens=24)
    pad = tokenizer.convert_tokens_to_ids("<|pad|>")
    model = pair.strong.lm.model
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, pad]  # a special token that nothing else names
    assert pad in pair.strong.final_ids
    assert sum(one.finished for group in sample(pair.strong, per_prompt=16, max_new_tokens=24) for one in group) >= sum(
        one.finished for group in before for one in group
    )


def test_a_model_without_an_end_token(strong, weak):
    endless = byte_tokenizer(template=None)
    endless.eos_token = None
    pair = DensityRatioScorer(strong, weak, strong_tokenizer=endless, weak_tokenizer=endless).load()
    assert end_id(pair.strong, "hello") is None
    [[one]] = sample(pair.strong, ["hello"], per_prompt=1)
    assert one.finished is None


def test_a_policy_is_loaded_by_name(pair, checkpoints, tmp_path):
    config = CDRConfig("a", "b")
    policy = load_policy(checkpoints["weak"], config, pair)
    assert sample(policy) == sample(pair.weak)
    assert end_id(policy, chat("a")) == policy.encoder.tokenizer.convert_tokens_to_ids("<|im_end|>")
    with pytest.raises(ModelError, match="policy can't be loaded from"):
        load_policy(str(tmp_path / "none"), config, pair)


def test_a_policy_that_is_an_adapter(pair, checkpoints, tokenizer, tmp_path):
    """As a trainer with LoRA leaves it: the base is the one that it names."""
    adapter = save_adapter(tmp_path / "adapter", checkpoints["weak"])
    merged = save_merged(tmp_path / "merged", checkpoints["weak"], adapter, tokenizer)
    config = CDRConfig("a", "b")
    written = sample(load_policy(adapter, config, pair), per_prompt=8)
    assert written == sample(load_policy(merged, config, pair), per_prompt=8)
    assert written != sample(load_policy(checkpoints["weak"], config, pair), per_prompt=8)
    with pytest.raises(ModelError, match="policy is .*, an adapter whose config names no base. Write base_model_name"):
        load_policy(save_adapter(tmp_path / "b", checkpoints["weak"], names_base=False), config, pair)


def test_a_revision_of_a_policy(pair, checkpoints, tmp_path):
    """Of the Hub's, in a cache of its own."""
    for name, source in (("main", "strong"), ("later", "weak")):
        commit = f"{len(name):040}"
        place = tmp_path / "models--some--model"
        (place / "refs").mkdir(parents=True, exist_ok=True)
        (place / "refs" / name).write_text(commit)
        shutil.copytree(checkpoints[source], place / "snapshots" / commit)
    config = CDRConfig("a", "b", cdr_model_init_kwargs={"cache_dir": str(tmp_path)})
    assert sample(load_policy("some/model", config, pair)) == sample(pair.strong)
    assert sample(load_policy("some/model", config, pair, revision="later")) == sample(pair.weak)


def test_a_pair_that_sleeps_is_woken_to_write(checkpoints):
    awake = DensityRatioScorer(**checkpoints, device="cpu").load()
    scorer = DensityRatioScorer(**checkpoints, device="cpu", offload="disk")
    with scorer.use() as pair:
        assert sample(pair.strong) == sample(awake.strong)
        assert sample(pair.weak) == sample(awake.weak)
    assert all(p.isnan().all() for one in (pair.strong, pair.weak) for p in one.lm.model.parameters())
