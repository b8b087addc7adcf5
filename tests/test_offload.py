"""Between calls a pair sleeps: nothing of it is on its device, and its scores are the same bits."""

import gc
import pickle
import shutil
import threading
import weakref
from pathlib import Path

import pytest
import torch
from lora import save_adapter
from tiny import byte_tokenizer, chat, llama
from torch import nn

from trl_cdr import CDRReward, ConfigError, Criteria, DensityRatioScorer, ModelError
from trl_cdr.scoring import offload, pair_loading
from trl_cdr.scoring.offload import OnDisk, OnHost, Turns

CRITERIA = Criteria.from_toml(
    '[long]\ninstruction = "' + "a good completion is brown and quick and jumps. " * 4 + '"\n[plain]\n'
)
PROMPTS = [chat("hello"), chat("what is this"), chat("hello")]
COMPLETIONS = ["world", "a lazy dog", "fox"]
DOMAINS = ["long", "plain", "long"]


@pytest.fixture(params=["cpu", "disk"])
def kind(request, monkeypatch):
    """On a CPU the host's memory is the device's: take it for another one."""
    monkeypatch.setattr(pair_loading, "has_own_memory", lambda device: True)
    return request.param


def score(scorer):
    return scorer.score(PROMPTS, COMPLETIONS, domains=DOMAINS)


def models(scorer):
    loaded = scorer._source._pair
    return loaded.strong.lm.model, loaded.weak.lm.model


def is_asleep(model):
    return all(p.untyped_storage().nbytes() <= p.element_size() and p.isnan().all() for p in model.parameters())


def is_awake(model):
    return not any(p.isnan().any() or p.untyped_storage().nbytes() < p.nbytes for p in model.parameters())


@pytest.fixture(scope="module")
def expected(checkpoints):
    return score(DensityRatioScorer(**checkpoints, criteria=CRITERIA, router="column:d"))


def same(scores, expected):
    for one, other in zip(scores, expected, strict=True):
        assert (one.value, one.strong_logps, one.weak_logps) == (other.value, other.strong_logps, other.weak_logps)
        assert torch.equal(one.per_token, other.per_token)
    return True


def test_scores_are_the_same_bits_and_nothing_is_left_awake(kind, checkpoints, expected):
    scorer = DensityRatioScorer(**checkpoints, criteria=CRITERIA, router="column:d", offload=kind)
    for _ in range(3):
        assert same(score(scorer), expected)
        assert all(is_asleep(model) for model in models(scorer))


def test_one_base_with_adapters_sleeps_in_one_bed(kind, checkpoints, tmp_path, monkeypatch):
    woken = []
    for bed in (OnHost, OnDisk):
        wake = bed.wake
        monkeypatch.setattr(bed, "wake", lambda self, wake=wake: woken.append(self) or wake(self))
    base = checkpoints["weak"]
    options = {"strong": base, "weak": base, "criteria": CRITERIA, "router": "column:d"}
    options["strong_adapter"] = save_adapter(tmp_path / "one", base)
    options["weak_adapter"] = save_adapter(tmp_path / "two", base, seed=1, r=2, target_modules=["q_proj"])
    expected = score(DensityRatioScorer(**options))
    assert any(one.value for one in expected)
    scorer = DensityRatioScorer(**options, offload=kind)
    for calls in range(3):
        assert same(score(scorer), expected)
        assert len(woken) == calls  # loaded awake; then once for both
        lms = scorer._source._pair.strong.lm, scorer._source._pair.weak.lm
        assert lms[0].base is lms[1].base
        assert is_asleep(lms[0].base)
        own = [p for lm in lms for p in lm.model.parameters() if p.untyped_storage().nbytes() == p.nbytes > 4]
        assert len(own) == 2 * 2 * 7 + 2 * 2  # both adapters stay, and nothing else
        assert not any(p.isnan().any() for p in own)
    with scorer.use() as loaded:
        loaded.weak.lm.wake()  # the one that did not bring the base
        assert is_awake(loaded.strong.lm.base)


def test_what_sleeps_is_described_as_it_is_awake(kind, checkpoints):
    awake, asleep = (DensityRatioScorer(**checkpoints, offload=way) for way in ("none", kind))
    for _ in range(2):
        assert asleep.describe() == awake.describe()


def test_two_bases_with_adapters_take_turns(kind, checkpoints, tmp_path):
    options = {**checkpoints, "criteria": CRITERIA, "router": "column:d"}
    options["strong_adapter"] = save_adapter(tmp_path / "one", checkpoints["strong"])
    scorer = DensityRatioScorer(**options, offload=kind)
    expected = score(DensityRatioScorer(**options))
    for _ in range(2):
        assert same(score(scorer), expected)
        assert all(is_asleep(member.lm.base) for member in (scorer._source._pair.strong, scorer._source._pair.weak))


def test_one_model_is_awake_at_a_time(kind, checkpoints):
    scorer = DensityRatioScorer(**checkpoints, offload=kind)
    scorer.load()
    strong, weak = models(scorer)
    assert is_asleep(strong)
    assert is_asleep(weak)
    seen = []

    def look(module, args, kwargs):
        seen.append((is_awake(strong), is_asleep(strong), is_awake(weak), is_asleep(weak)))

    for model in (strong, weak):
        model.base_model.register_forward_pre_hook(look, with_kwargs=True)
    scorer.score(["hello"], ["world"])
    assert set(seen) == {(True, False, False, True), (False, True, True, False)}


def test_while_a_pair_is_loaded_one_model_is_awake(kind, checkpoints, monkeypatch):
    load, before = pair_loading.CausalLM.load, []

    def spy(name, role, **kwargs):
        before.extend(is_asleep(lm.model) for lm in loaded)
        loaded.append(load(name, role, **kwargs))
        return loaded[-1]

    loaded = []
    monkeypatch.setattr(pair_loading.CausalLM, "load", spy)
    DensityRatioScorer(**checkpoints, offload=kind).load()
    assert before == [True]


def test_who_was_asked_for_the_domain_stays_awake_to_score(kind, checkpoints, monkeypatch):
    """The strong model classifies and scores: waking it twice would double what offloading costs."""
    woken = []
    for bed in (OnHost, OnDisk):
        wake = bed.wake
        monkeypatch.setattr(bed, "wake", lambda self, wake=wake: woken.append(self) or wake(self))
    scorer = DensityRatioScorer(**checkpoints, criteria=CRITERIA, router="likelihood", offload=kind)
    scorer.score(PROMPTS, COMPLETIONS)
    assert len(woken) == 2
    assert woken[0] is not woken[1]


def test_a_call_that_fails_leaves_the_pair_asleep_and_the_next_one_works(kind, checkpoints, expected, monkeypatch):
    scorer = DensityRatioScorer(**checkpoints, criteria=CRITERIA, router="column:d", offload=kind)
    assert same(score(scorer), expected)
    weak = scorer._source._pair.weak.lm
    monkeypatch.setattr(weak.decoder, "hidden", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        score(scorer)
    assert all(is_asleep(model) for model in models(scorer))
    monkeypatch.undo()
    assert same(score(scorer), expected)


def test_weights_that_do_not_wake_are_asleep_still(checkpoints, expected, monkeypatch):
    monkeypatch.setattr(pair_loading, "has_own_memory", lambda device: True)
    scorer = DensityRatioScorer(**checkpoints, criteria=CRITERIA, router="column:d", offload="cpu")
    assert same(score(scorer), expected)
    empty, calls = torch.empty_strided, []

    def too_much(*args, **kwargs):
        calls.append(1)
        if len(calls) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return empty(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(offload.torch, "empty_strided", too_much)
        with pytest.raises(
            ModelError, match="strong can't be moved for cdr_offload='cpu': the device's memory does not"
        ):
            score(scorer)
    assert all(is_asleep(model) for model in models(scorer))
    assert same(score(scorer), expected)


def test_a_host_that_is_too_small_keeps_the_model_where_it_is(strong, monkeypatch):
    model = llama(50, seed=0)
    expected = [p.clone() for p in model.parameters()]
    bed, turns = OnHost(model, "strong"), Turns()
    turns.add(bed, lambda: None)
    with monkeypatch.context() as patch:
        error = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 16 bytes.")
        patch.setattr(offload.torch, "empty", lambda *args, **kwargs: (_ for _ in ()).throw(error))
        with pytest.raises(ModelError, match="the host's memory does not hold it"):
            turns.sleep()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), expected, strict=True))
    turns.sleep()
    assert is_asleep(model)
    turns.wake(bed)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), expected, strict=True))


def test_a_copy_on_the_host_has_every_byte_layout_and_tie(monkeypatch):
    monkeypatch.setattr(offload, "BLOCK", 1000)  # weights of several blocks, blocks of several weights
    model = nn.Sequential(nn.Linear(7, 11), nn.Linear(11, 41).to(torch.bfloat16), nn.Linear(33, 5))
    model[2].weight = nn.Parameter(torch.randn(33, 5, generator=torch.Generator().manual_seed(0)).T)
    model.append(nn.Module())
    model[3].tied = model[0].weight
    expected = {name: (p.detach().clone(), p.stride()) for name, p in model.named_parameters()}
    bed = OnHost(model, "strong")
    for _ in range(2):
        bed.sleep()
        assert is_asleep(model)
        assert [tuple(p.shape) for p in model.parameters()] == [tuple(p.shape) for p, _ in expected.values()]
        bed.wake()
        assert model[3].tied is model[0].weight
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, expected[name][0])
            assert parameter.stride() == expected[name][1]
    size = sum(p.nbytes for p in model.parameters())
    assert [len(block) for block in bed._blocks] == [1000] * (size // 1000) + [size % 1000]


def test_waking_within_inference_mode_gives_ordinary_weights(strong):
    model = llama(50, seed=0)
    bed = OnHost(model, "strong")
    with torch.inference_mode():
        bed.sleep()
        bed.wake()
    assert not any(parameter.is_inference() for parameter in model.parameters())


def test_kept_prefixes_leave_the_device_too(kind, checkpoints, monkeypatch):
    """In the host's memory they are kept, as the weights are; with the weights on disk nothing is kept anywhere."""
    scorer = DensityRatioScorer(**checkpoints, criteria=CRITERIA, router="column:d", offload=kind)
    moved = []
    monkeypatch.setattr(
        pair_loading.CausalLM,
        "rest",
        lambda self, keep, rest=pair_loading.CausalLM.rest: moved.append(rest(self, keep=keep)),
    )
    score(scorer)
    assert moved
    for member in (scorer._source._pair.strong, scorer._source._pair.weak):
        packed = member.lm._packed
        assert len(packed._kept._states) == (1 if kind == "cpu" else 0)
        assert not packed._held
    run = []
    strong = scorer._source._pair.strong.lm.decoder
    monkeypatch.setattr(
        strong, "hidden", lambda ids, hidden=strong.hidden, **kw: run.append(ids.shape[1]) or hidden(ids, **kw)
    )
    score(scorer)
    assert any(count > 100 for count in run) == (kind == "disk")


def test_rewards_that_share_a_pair_and_threads(kind, checkpoints):
    alone = [CDRReward(**checkpoints, criteria=CRITERIA, domain=domain, gate="none") for domain in ("long", "plain")]
    first = CDRReward(**checkpoints, criteria=CRITERIA, domain="long", gate="none", offload=kind)
    second = CDRReward(share=first, name="other", criteria=CRITERIA, domain="plain", gate="none")
    assert second.config.cdr_offload == kind
    expected = [reward(PROMPTS, COMPLETIONS) for reward in alone]
    found = {}

    def work(place):
        found[place] = [(first, second)[place % 2](PROMPTS, COMPLETIONS) for _ in range(2)]

    threads = [threading.Thread(target=work, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {place: [expected[place % 2]] * 2 for place in range(4)}
    assert all(is_asleep(model) for model in models(first.scorer))


def test_unloading_and_pickling(kind, checkpoints, expected):
    scorer = DensityRatioScorer(**checkpoints, criteria=CRITERIA, router="column:d", offload=kind)
    score(scorer)
    scorer.unload()
    assert same(score(scorer), expected)
    copy = pickle.loads(pickle.dumps(scorer))
    assert same(score(copy), expected)
    assert all(is_asleep(model) for model in models(copy))


def test_nothing_is_kept_of_a_pair_of_which_one_can_not_be_loaded(kind, checkpoints, tmp_path, expected):
    weak = tmp_path / "weak"
    shutil.copytree(checkpoints["weak"], weak)
    hidden = (weak / "model.safetensors").rename(tmp_path / "away")
    scorer = DensityRatioScorer(checkpoints["strong"], str(weak), criteria=CRITERIA, router="column:d", offload=kind)
    for _ in range(2):
        with pytest.raises(ModelError, match="weak is .* can't be loaded"):
            scorer.load()
    assert len(scorer._source.turns._on_sleep) <= 1
    hidden.rename(weak / "model.safetensors")
    assert same(score(scorer), expected)
    assert len(scorer._source.turns._on_sleep) == 2


def test_a_checkpoint_that_has_changed_or_gone_is_said(checkpoints, tmp_path, expected):
    folder = tmp_path / "strong"
    shutil.copytree(checkpoints["strong"], folder)
    scorer = DensityRatioScorer(str(folder), checkpoints["weak"], criteria=CRITERIA, router="column:d", offload="disk")
    assert same(score(scorer), expected)
    file = folder / "model.safetensors"
    content = file.read_bytes()
    shutil.copy(Path(checkpoints["weak"]) / "model.safetensors", file)
    with pytest.raises(
        ModelError, match=r"strong is '.*', whose files have changed since it was loaded.*call unload\(\)"
    ):
        score(scorer)
    file.unlink()
    with pytest.raises(ModelError, match="strong is"):
        score(scorer)
    file.write_bytes(content)
    assert same(score(scorer), expected)


def test_what_weights_were_loaded_with_is_let_go(checkpoints, monkeypatch):
    loaded, load = [], offload.load_model

    def spy(*args, **kwargs):
        model = load(*args, **kwargs)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(offload, "load_model", spy)
    scorer = DensityRatioScorer(**checkpoints, offload="disk")
    scorer.score(["hello"], ["world"])
    gc.collect()
    assert len(loaded) == 2
    assert not any(model() for model in loaded)


def test_on_a_cpu_there_is_nowhere_to_go(checkpoints, caplog):
    scorer = DensityRatioScorer(**checkpoints, offload="cpu", device="cpu")
    plain = DensityRatioScorer(**checkpoints, device="cpu")
    for _ in range(2):
        assert scorer.score(["hello"], ["world"])[0].value == plain.score(["hello"], ["world"])[0].value
    assert caplog.text.count("cdr_offload is 'cpu', and the pair's device is the CPU") == 1
    assert "cdr_offload='disk' lets go" in caplog.text
    assert all(is_awake(model) for model in models(scorer))


def test_what_can_not_be_moved_is_refused(checkpoints, strong, tokenizer, tmp_path):
    with pytest.raises(ConfigError, match="offload is 'cpu', and strong is a loaded LlamaForCausalLM"):
        DensityRatioScorer(strong, checkpoints["weak"], strong_tokenizer=tokenizer, offload="cpu")
    for kwargs in ('{"device_map": "auto"}', {"quantization_config": {"load_in_8bit": True}}, {"load_in_4bit": True}):
        with pytest.raises(ConfigError, match="cdr_offload is 'disk', and cdr_model_init_kwargs has .* can't be moved"):
            DensityRatioScorer(**checkpoints, offload="disk", model_init_kwargs=kwargs)
    quantised = tmp_path / "quantised"
    model = llama(len(tokenizer))
    model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    model.config.save_pretrained(quantised)
    tokenizer.save_pretrained(quantised)
    scorer = DensityRatioScorer(str(quantised), checkpoints["weak"], offload="cpu")
    with pytest.raises(ConfigError, match=r"cdr_offload is 'cpu', and strong \(.*\) is quantised"):
        scorer.load()
    with pytest.raises(ConfigError, match="cdr_offload is 'gpu'. Use one of: none, cpu, disk"):
        DensityRatioScorer(**checkpoints, offload="gpu")


def test_what_it_costs_is_a_metric(kind, checkpoints):
    logged = {}

    def log_metric(name, value):
        logged.setdefault(name, []).append(value)

    reward = CDRReward(**checkpoints, offload=kind)
    for _ in range(2):
        reward(["hello"] * 2, ["world", "dog"], log_metric=log_metric)
    assert all(
        0 < spent < total for spent, total in zip(logged["cdr/wake_seconds"], logged["cdr/seconds"], strict=True)
    )
    logged.clear()
    CDRReward(**checkpoints)(["hello"] * 2, ["world", "dog"], log_metric=log_metric)
    assert "cdr/wake_seconds" not in logged
    assert "cdr/seconds" in logged


@pytest.mark.gpu
@pytest.mark.parametrize("sleeping", ["cpu", "disk"])
def test_on_a_gpu_nothing_stays_and_the_peak_is_one_model(sleeping, tmp_path):
    tokenizer = byte_tokenizer()
    folders = {}
    for seed, role in enumerate(("strong", "weak")):
        model = llama(len(tokenizer), seed=seed, hidden_size=1024, intermediate_size=4096, num_hidden_layers=8)
        for part in (model, tokenizer):
            part.save_pretrained(tmp_path / role)
        folders[role] = str(tmp_path / role)
    size = sum(parameter.nbytes for parameter in model.parameters())
    [expected] = DensityRatioScorer(**folders, device="cuda").score(["hello"], ["world"])
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    scorer = DensityRatioScorer(**folders, device="cuda", offload=sleeping)
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        [found] = scorer.score(["hello"], ["world"])
        assert found.value == expected.value
        assert torch.cuda.memory_allocated() - before < 0.05 * size
        assert torch.cuda.max_memory_allocated() - before < 1.3 * size
