"""One frozen model: heads that scale or cap, memory that runs out, checkpoints that are not what they seem."""

import copy
import logging
import random

import pytest
import torch
from accelerate import PartialState
from families import FAMILIES, V, build_family
from oracle import completion_logps
from tiny import llama
from transformers import BertConfig, BertModel, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from trl_cdr import ConfigError, ModelError
from trl_cdr.bench.naive import naive_logps
from trl_cdr.scoring import causal_lm as module
from trl_cdr.scoring.causal_lm import CausalLM
from trl_cdr.scoring.encoding import Row
from trl_cdr.scoring.forward import Packed, Padded
from trl_cdr.scoring.packing import Layout

OOM = "CUDA out of memory. Tried to allocate 1 GiB."
ROWS = [Row((1, 2, 3), (4, 5)), Row((9,), (8, 7, 6, 5, 4)), Row((3, 1, 4, 1, 5, 9, 2, 6), (5,))]

SHARED = [Row((1, 2, 3, 4, 5, 6), (7, first, 8)) for first in range(9)]  # one prompt
DISTINCT = [Row((first, 2, 3), (4, 5, 6, 7)) for first in range(9)]


def assert_naive(model, rows, results, atol=1e-4):
    for row, logps in zip(rows, results, strict=True):
        expected = completion_logps(model, row.prompt_ids, row.completion_ids)
        torch.testing.assert_close(logps.double(), expected, rtol=0, atol=atol)


def random_rows(seed, *, num_prefix, num_ids=V):
    """Prompts behind a common prefix, shared by some completions, of odd lengths."""
    rng = random.Random(seed)

    def draw(longest):
        return tuple(rng.randrange(num_ids) for _ in range(rng.randint(1, longest)))

    prefix = tuple(rng.randrange(num_ids) for _ in range(num_prefix))
    prompts = [prefix + draw(9) for _ in range(4)]
    return [Row(rng.choice(prompts), draw(17)) for _ in range(12)]


# transformers 4.56's own config reads the attribute that it warns of; drop with the floor
@pytest.mark.filterwarnings("ignore:The `sliding_window_pattern` attribute is deprecated:FutureWarning")
@pytest.mark.parametrize("num_prefix", [0, 45])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_the_models_own_log_probabilities(family, num_prefix, caplog):
    model = build_family(family)
    lm = CausalLM(model, "strong")
    way, reason = lm.way()
    assert (way, bool(reason)) == (FAMILIES[family][3], way != "packed"), reason
    told = lm.describe(token_budget=1024)
    assert told["work_mb"] > 0
    assert (told["prefix_mb"] > 0) == (way == "packed")
    rows = random_rows(family, num_prefix=num_prefix)
    for budget in (4096, 100):
        layout = Layout(rows)
        assert len(layout.prefix) >= num_prefix
        assert_naive(model, rows, lm.per_token_logps(layout, token_budget=budget))
    assert not [r for r in caplog.records if r.name.startswith("trl_cdr") and r.levelname == "WARNING"]


@pytest.mark.filterwarnings("ignore:.*have no functionality in BLOOM:FutureWarning")  # transformers 4
@pytest.mark.parametrize("family", [name for name, (*_, way) in FAMILIES.items() if way == "padded"])
def test_the_check_refuses_what_the_config_would(family, monkeypatch):
    """Two nets: an architecture that the config does not betray is caught by its log-probabilities."""
    monkeypatch.setattr(module, "why_not_packed", lambda decoder: None)
    way, reason = CausalLM(build_family(family), "strong").way()
    assert way == "padded"
    assert "differ" in reason or "fails" in reason


def test_eager_attention_packs_too():
    model = build_family("Llama")
    model.set_attn_implementation("eager")
    lm = CausalLM(model, "strong")
    rows = random_rows(0, num_prefix=40)
    assert_naive(model, rows, lm.per_token_logps(Layout(rows), token_budget=4096))
    assert lm.way() == ("packed", "")


def test_the_prefix_is_run_once_and_kept_between_calls():
    model = build_family("Llama")
    lm = CausalLM(model, "strong", prefix_cache_tokens=100)
    lengths = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    rows = {name: random_rows(name, num_prefix=45) for name in "abc"}
    lm.way()
    first = {name: lm.per_token_logps(Layout(rows[name]), token_budget=4096) for name in "ab"}
    prefixes = {name: len(Layout(rows[name]).prefix) for name in rows}
    lengths.clear()
    again = {name: lm.per_token_logps(Layout(rows[name]), token_budget=4096) for name in "ab"}
    assert not set(prefixes.values()) & set(lengths)
    for name in "ab":  # cold or warm, the same bits
        assert all(torch.equal(x, y) for x, y in zip(first[name], again[name], strict=True))
    lm.per_token_logps(Layout(rows["c"]), token_budget=4096)  # does not fit beside them: a, the oldest, goes
    lengths.clear()
    lm.per_token_logps(Layout(rows["b"]), token_budget=4096)
    assert prefixes["b"] not in lengths
    lm.per_token_logps(Layout(rows["a"]), token_budget=4096)
    assert prefixes["a"] in lengths


def test_a_prefix_that_is_not_kept_is_run_once_a_call():
    model = build_family("Llama")
    lm = CausalLM(model, "strong", prefix_cache_tokens=0)
    lm.way()
    lengths = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    for _ in range(2):
        layout = Layout(random_rows(0, num_prefix=45))
        lm.per_token_logps(layout, token_budget=60)
    assert len(lengths) > 4  # several packs a call
    assert lengths.count(len(layout.prefix)) == 2


def test_no_prefix_cache_gives_the_same_bits():
    model = build_family("Llama")
    rows = Layout(random_rows(0, num_prefix=45))
    without, cached = CausalLM(model, "strong", prefix_cache_tokens=0), CausalLM(model, "strong")
    for _ in range(2):
        results = [lm.per_token_logps(rows, token_budget=4096) for lm in (without, cached)]
        assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_a_held_model_that_was_trained_since_is_not_read_from_the_cache():
    model = build_family("Llama")
    lm = CausalLM(model, "strong")
    rows = random_rows(0, num_prefix=45)
    lm.per_token_logps(Layout(rows), token_budget=4096)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2)
    assert_naive(model, rows, lm.per_token_logps(Layout(rows), token_budget=4096))


def test_single_rows_and_distinct_prompts_are_not_packed():
    """A mask costs attention that rows of their own don't pay."""
    lm = CausalLM(build_family("Llama"), "strong")
    lm.way()
    with lm._frozen():
        assert lm._choose(Layout(ROWS[:1]), 4096) is lm._padded
        assert lm._choose(Layout(DISTINCT), 4096) is lm._padded
        assert lm._choose(Layout(SHARED), 4096) is lm._packed


def test_what_is_not_finite_stays_in_its_row():
    model = build_family("Llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[60] = float("nan")
    lm = CausalLM(model, "strong")
    rows = [Row((1, 2, 3, 4, 5, 6), (7, first, 8)) for first in (9, 60, 10)]
    results = lm.per_token_logps(Layout(rows), token_budget=4096)
    assert [bool(logps.isfinite().all()) for logps in results] == [True, False, True]
    assert_naive(model, [rows[0], rows[2]], [results[0], results[2]])


class Tripled(LlamaForCausalLM):
    """An architecture that does to its logits what no config field tells."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 3
        return output


def test_an_unknown_head_takes_the_slower_path_and_says_so_once(caplog):
    model = llama(V)
    model.__class__ = Tripled
    lm = CausalLM(model, "weak")
    with caplog.at_level(logging.WARNING):
        results = lm.per_token_logps(Layout(ROWS), token_budget=64)
        lm.per_token_logps(Layout(ROWS), token_budget=64)
    assert_naive(model, ROWS, results)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "weak" in caplog.text
    assert "row by row" in caplog.text


def test_the_head_runs_only_where_a_completion_token_is_predicted():
    model = llama(V)
    lm = CausalLM(model, "strong")
    lm.per_token_logps(Layout(ROWS), token_budget=64)  # the check at load is over
    shapes = []
    model.lm_head.register_forward_hook(lambda module, args, output: shapes.append(tuple(output.shape)))
    lm.per_token_logps(Layout(ROWS), token_budget=64)
    assert shapes == [(sum(len(row.completion_ids) for row in ROWS), V)]


def scarce(monkeypatch, way, *, most, error=None):
    """Let a way of running rows fail with more than `most` of them, as a GPU does; returns the sizes tried."""
    sizes, run = [], way.run

    def limited(self, layout, job, *reduce):
        sizes.append(len(job.rows))
        if len(job.rows) > most:
            raise error or torch.OutOfMemoryError(OOM)
        return run(self, layout, job, *reduce)

    monkeypatch.setattr(way, "run", limited)
    return sizes


@pytest.mark.parametrize("way", [Packed, Padded])
def test_what_runs_out_of_memory_is_laid_out_anew_with_half_the_tokens(monkeypatch, way):
    lm = CausalLM(llama(V), "strong")
    rows = Layout(SHARED if way is Packed else DISTINCT)
    whole = lm.per_token_logps(rows, token_budget=1000)
    sizes = scarce(monkeypatch, way, most=2)
    for row, expected in zip(lm.per_token_logps(rows, token_budget=1000), whole, strict=True):
        torch.testing.assert_close(row, expected, rtol=0, atol=1e-4)
    assert sizes[0] == 9
    assert sum(size for size in sizes if size <= 2) == 9  # no row twice


def test_a_single_row_that_does_not_fit_says_what_to_change(monkeypatch):
    lm = CausalLM(llama(V), "weak")
    lm.per_token_logps(Layout(DISTINCT), token_budget=64)
    scarce(monkeypatch, Padded, most=0)
    with pytest.raises(ModelError, match=r"weak ran out of memory on a single row of \d+ tokens.*cdr_max_length"):
        lm.per_token_logps(Layout(DISTINCT), token_budget=64)


def test_a_check_that_runs_out_of_memory_is_no_verdict_on_the_model(monkeypatch):
    lm = CausalLM(llama(V), "weak")
    with monkeypatch.context() as memory:
        scarce(memory, Padded, most=0)
        with pytest.raises(torch.OutOfMemoryError):
            lm.way()
    assert lm.way() == ("packed", "")


def test_a_model_of_few_positions_is_checked_with_short_rows():
    lm = CausalLM(llama(V, positions=8), "strong")
    assert lm.way() == ("packed", "")


def test_other_errors_are_not_taken_for_a_lack_of_memory(monkeypatch):
    lm = CausalLM(llama(V), "weak")
    lm.per_token_logps(Layout(DISTINCT), token_budget=64)
    scarce(monkeypatch, Padded, most=0, error=RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        lm.per_token_logps(Layout(DISTINCT), token_budget=64)


def test_no_rows():
    assert CausalLM(llama(V), "strong").per_token_logps(Layout([]), token_budget=1) == []


def test_half_precision_stays_close():
    model = llama(V).to(torch.bfloat16)
    lm = CausalLM(model, "strong")
    results = lm.per_token_logps(Layout(ROWS), token_budget=64)
    assert lm.way() == ("packed", "")
    assert_naive(model, ROWS, results, atol=0.1)


def test_the_error_of_bfloat16_is_no_larger_than_the_naive_ways():
    model = build_family("Llama")
    exact = copy.deepcopy(model).double()
    half = copy.deepcopy(model).to(torch.bfloat16)
    for parameter, rounded in zip(exact.parameters(), half.parameters(), strict=True):
        parameter.data.copy_(rounded)  # the same weights, so that only the arithmetic differs
    lm = CausalLM(half, "strong")
    ours, naive = [], []
    for seed in range(8):
        rows = random_rows(seed, num_prefix=40)
        expected = torch.cat([completion_logps(exact, row.prompt_ids, row.completion_ids) for row in rows])
        ours.append(torch.cat(lm.per_token_logps(Layout(rows), token_budget=4096)) - expected)
        naive.append(torch.cat(naive_logps(half, rows, batch_size=8, dtype=torch.float32)) - expected)
    assert lm.way() == ("packed", "")
    errors = [torch.cat(differences).square().mean().sqrt() for differences in (ours, naive)]
    assert errors[0] <= 1.05 * errors[1]


def test_the_benchmarks_naive_way_is_the_oracle():
    model = build_family("Llama")
    rows = random_rows(0, num_prefix=5)
    assert_naive(model, rows, naive_logps(model, rows, batch_size=5, dtype=torch.float64), atol=1e-5)


def test_loading_freezes_and_places(checkpoints):
    lm = CausalLM.load(checkpoints["strong"], "strong")
    parameters = list(lm.model.parameters())
    assert not any(parameter.requires_grad for parameter in parameters)
    assert {(p.device, p.dtype) for p in parameters} == {(PartialState().device, torch.float32)}
    assert not lm.model.training
    assert lm.num_positions == 256


def test_loading_takes_dtype_device_and_any_other_argument(checkpoints):
    lm = CausalLM.load(checkpoints["strong"], "strong", dtype="bfloat16", device="cpu")
    assert lm.model.dtype == torch.bfloat16
    eager = CausalLM.load(checkpoints["strong"], "strong", init_kwargs={"attn_implementation": "eager"})
    assert eager.model.config._attn_implementation == "eager"


def test_loading_is_careful(checkpoints, monkeypatch):
    """Only safetensors, no remote code; and what loading draws does not shift the trainer's random numbers."""
    load, seen = module.AutoModelForCausalLM.from_pretrained, {}

    def spy(name, **kwargs):
        seen.update(kwargs)
        torch.rand(3)
        return load(name, **kwargs)

    monkeypatch.setattr(module.AutoModelForCausalLM, "from_pretrained", spy)
    state = torch.random.get_rng_state()
    CausalLM.load(checkpoints["strong"], "strong")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert (seen["use_safetensors"], seen["trust_remote_code"]) == (True, False)


def test_the_old_name_of_dtype_counts(checkpoints):
    lm = CausalLM.load(checkpoints["strong"], "strong", init_kwargs={"torch_dtype": "bfloat16"})
    assert lm.model.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"device": "gpu"}, ConfigError, "cdr_device is 'gpu', which torch does not know"),
        ({"init_kwargs": {"no_such_argument": 1}}, ModelError, "strong is .* can't be loaded"),
        ({"init_kwargs": {"attn_implementation": "no_such"}}, ModelError, "strong is .* can't be loaded"),
    ],
)
def test_what_can_not_be_loaded_so_says_so(checkpoints, options, error, message):
    with pytest.raises(error, match=message):
        CausalLM.load(checkpoints["strong"], "strong", **options)


def test_weights_that_the_checkpoint_lacks_are_an_error(tmp_path, strong):
    """A checkpoint without a head would load, with a random head and a warning that nobody reads."""
    strong.model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"strong is .*lacks 1 weights \(lm_head.weight.*Use a checkpoint of a causal"):
        CausalLM.load(str(tmp_path), "strong")


def test_nothing_there(tmp_path):
    with pytest.raises(ModelError, match="weak is .*can't be loaded as a causal language model"):
        CausalLM.load(str(tmp_path / "nothing"), "weak")


def test_loading_where_weights_would_be_empty_is_refused(checkpoints, monkeypatch):
    """FSDP's RAM-efficient loading leaves every local rank but the first with uninitialised weights."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    CausalLM.load(checkpoints["strong"], "strong")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    with pytest.raises(ModelError, match="weak can't be loaded under FSDP's RAM-efficient loading.*: false"):
        CausalLM.load(checkpoints["weak"], "weak")
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    monkeypatch.setattr(module, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ModelError, match="weak can't be loaded under DeepSpeed ZeRO-3.*use ZeRO-2"):
        CausalLM.load(checkpoints["weak"], "weak")


def test_encoder_decoders_are_refused(tmp_path):
    config = T5Config(vocab_size=V, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8)
    model = T5ForConditionalGeneration(config)
    model.save_pretrained(tmp_path)
    for make in (lambda: CausalLM(model, "strong"), lambda: CausalLM.load(str(tmp_path), "strong")):
        with pytest.raises(ModelError, match="strong is a t5, an encoder-decoder.*Use a decoder-only model"):
            make()


def test_models_without_a_head_are_refused():
    config = BertConfig(vocab_size=V, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(ModelError, match="weak is a BertModel, which has no language-modelling head"):
        CausalLM(BertModel(config), "weak")
    with pytest.raises(ModelError, match="strong is a Linear, which is no transformers model"):
        CausalLM(torch.nn.Linear(2, 2), "strong")


def test_tolerances_cover_the_types_that_can_be_asked_for():
    assert set(module._TOLERANCE) >= {torch.float32, torch.bfloat16, torch.float16}
