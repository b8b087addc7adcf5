"""One frozen model: heads that scale or cap, memory that runs out, checkpoints that are not what they seem."""

import copy
import logging
import math
from types import SimpleNamespace

import pytest
import torch
from families import ALL_FAMILIES, V, build_family, random_rows
from oracle import assert_naive, completion_logps
from tiny import llama, scarce
from transformers import BertConfig, BertModel, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from trl_cdr import ModelError, _compat
from trl_cdr.bench.naive import naive_logps
from trl_cdr.scoring import causal_lm, forward, tree_attention
from trl_cdr.scoring.causal_lm import CausalLM
from trl_cdr.scoring.forward import Padded
from trl_cdr.scoring.packed import Packed, attention_windows
from trl_cdr.scoring.packing import Layout
from trl_cdr.scoring.tree_attention import TreeAttention
from trl_cdr.scoring.types import Row

ROWS = [Row((1, 2, 3), (4, 5)), Row((9,), (8, 7, 6, 5, 4)), Row((3, 1, 4, 1, 5, 9, 2, 6), (5,))]

SHARED = [Row((1, 2, 3, 4, 5, 6), (7, first, 8)) for first in range(9)]  # one prompt
DISTINCT = [Row((first, 2, 3), (4, 5, 6, 7)) for first in range(9)]


# transformers 4.56's own config reads the attribute that it warns of; drop with the floor
@pytest.mark.filterwarnings("ignore:The `sliding_window_pattern` attribute is deprecated:FutureWarning")
@pytest.mark.compat
@pytest.mark.filterwarnings("ignore:.*have no functionality in BLOOM:FutureWarning")  # transformers 4
@pytest.mark.parametrize("by_tree", [True, False], ids=["by tree", "under the mask"])
@pytest.mark.parametrize("num_prefix", [0, 45])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_every_family_gives_the_models_own_log_probabilities(family, num_prefix, by_tree, caplog, monkeypatch):
    if not by_tree:  # as on an accelerator
        monkeypatch.setattr(tree_attention, "_attend", None)
    model = build_family(family)
    lm = CausalLM(model, "strong", prefix_cache_tokens=100)
    way, reason = lm.way()
    assert way == ALL_FAMILIES[family][3], reason
    lost = {"full_attention"} <= set(attention_windows(model.config)) and model.config._attn_implementation == "sdpa"
    assert bool(reason) == (way != "packed" or (lost and not by_tree)), reason
    told = lm.describe(token_budget=1024)
    assert told["work_mb"] > 0
    assert (told["prefix_mb"] > 0) == (way == "packed")
    rows = random_rows(family, num_prefix=num_prefix)
    for budget in (4096, 60):  # whole trees in a pack; most of them cut, the long prompts at their fork
        layout = Layout(rows)
        assert len(layout.prefix) >= num_prefix
        assert_naive(model, rows, lm.per_token_logps(layout, token_budget=budget))
    if way == "packed":
        with lm._frozen():
            stems = {job.pack.stem for job in lm._packed.plan(Layout(rows), 60)}
        assert stems - {()}
    warned = [r for r in caplog.records if r.name.startswith("trl_cdr") and r.levelname == "WARNING"]
    assert len(warned) == (way == "packed" and bool(reason))


@pytest.mark.compat
@pytest.mark.parametrize("family", ["Llama", "GPT-2", "Gemma 2"])
def test_completions_of_one_token_behind_a_prefix(family):
    """A pack of a single token, which transformers 5 hands to attention with a group's heads as queries."""
    model = build_family(family)
    lm = CausalLM(model, "strong")
    rows = [Row(tuple(range(1, 50)), (token,)) for token in range(50, 56)]
    results = lm.per_token_logps(Layout(rows), token_budget=1000)
    assert_naive(model, rows, results)
    assert lm.way() == ("packed", "")


def test_single_rows_and_distinct_prompts_are_not_packed():
    """A mask costs attention that rows of their own don't pay."""
    lm = CausalLM(build_family("Llama"), "strong")
    lm.way()
    with lm._frozen():
        assert lm._choose(Layout(ROWS[:1]), 4096) is lm._padded
        assert lm._choose(Layout(DISTINCT), 4096) is lm._padded
        assert lm._choose(Layout(SHARED), 4096) is lm._packed


@pytest.mark.parametrize("by_tree", [True, False], ids=["by tree", "under the mask"])
def test_what_is_not_finite_stays_in_its_row(by_tree, monkeypatch):
    """Under a mask it reaches a pack's other rows through a weight of 0, and they are run again."""
    if not by_tree:
        monkeypatch.setattr(tree_attention, "_attend", None)
    model = build_family("Llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[60] = float("nan")
    lm = CausalLM(model, "strong")
    rows = [Row((1, 2, 3, 4, 5, 6), (7, first, 8)) for first in (9, 60, 10)]
    results = lm.per_token_logps(Layout(rows), token_budget=4096)
    assert [bool(logps.isfinite().all()) for logps in results] == [True, False, True]
    assert_naive(model, [rows[0], rows[2]], [results[0], results[2]])


def test_partly_finite_rows_are_run_again(monkeypatch):
    """A kernel may reach some tokens of another row only."""
    model = build_family("Llama")
    lm = CausalLM(model, "strong")
    rows = [Row((1, 2, 3, 4, 5, 6), (7, first, 8)) for first in (9, 60, 10)]
    lm.per_token_logps(Layout(rows), token_budget=4096)
    run = lm._packed.run

    def reaches_one_token(*args):
        logps = run(*args).clone()
        logps[1] = float("nan")
        return logps

    monkeypatch.setattr(lm._packed, "run", reaches_one_token)
    assert_naive(model, rows, lm.per_token_logps(Layout(rows), token_budget=4096))


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


def test_log_way_warns_once_of_lost_speed(caplog, monkeypatch):
    """A Llama is known to pack: if it does not, the reason and the cost are a warning, at the first call."""
    monkeypatch.setattr(_compat, "attention_implementation", lambda config: "flash_attention_9")
    lm = CausalLM(llama(V), "strong")
    with caplog.at_level(logging.INFO, logger="trl_cdr"):
        assert lm.way()[0] == "padded"
        assert lm.per_token_logps(Layout([]), token_budget=1000) == []
        assert caplog.records == []
        for _ in range(2):
            lm.per_token_logps(Layout(SHARED), token_budget=1000)
    [record] = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage() == (
        "strong (LlamaForCausalLM, LlamaForCausalLM) runs padded, not packed: its attention (flash_attention_9) takes "
        "no mask of ours; load it with attn_implementation='sdpa'. The first call runs 72 tokens for 24 unique tokens "
        "(3.0 times)."
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_log_way_warns_of_a_lost_kernel(dtype, caplog, monkeypatch):
    """In other types than float32 packs are always computed under their mask: nothing is lost there."""
    monkeypatch.setattr(tree_attention, "_attend", None)
    CausalLM(llama(V).to(dtype), "strong").per_token_logps(Layout(SHARED), token_budget=1000)
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warned) == (dtype == torch.float32)
    assert all("runs packed under its mask: this torch has no attention kernel" in message for message in warned)


class Keeping(LlamaForCausalLM):
    """A model whose own forward takes `logits_to_keep`, ignores it, or refuses it."""

    kind = "takes"

    def forward(self, *args, **kwargs):
        if self.kind == "refuses" and "logits_to_keep" in kwargs:
            raise TypeError("forward() got an unexpected keyword argument 'logits_to_keep'")
        if self.kind == "ignores":
            kwargs.pop("logits_to_keep", None)
        return super().forward(*args, **kwargs)


@pytest.mark.compat
@pytest.mark.parametrize("kind", ["takes", "ignores", "refuses"])
def test_keeps_logits_by_behaviour(kind):
    """The signature names nothing."""
    model = llama(V)
    model.__class__, model.kind = Keeping, kind
    lm = CausalLM(model, "strong")
    assert lm.decoder.keeps_logits == (kind == "takes")
    assert_naive(llama(V), ROWS, lm.per_token_logps(Layout(ROWS), token_budget=64))


def test_keeps_logits_passes_a_lack_of_memory_on():
    model = llama(V)
    lm = CausalLM(model, "strong")
    hook = model.model.register_forward_pre_hook(lambda module, args: exhaust())

    def exhaust():
        raise MemoryError

    with pytest.raises(MemoryError):
        _ = lm.decoder.keeps_logits
    hook.remove()
    assert lm.decoder.keeps_logits


def test_check_notices_attention_that_is_not_taken_over(monkeypatch):
    """As if transformers copied the mask: packs are right, and computed under it."""
    monkeypatch.setattr(TreeAttention, "_is_ours", lambda self, *args, **kwargs: False)
    way, reason = CausalLM(llama(V), "strong").way()
    assert way == "packed"
    assert reason.startswith("under its mask: its attention does not call scaled_dot_product_attention")


@pytest.mark.filterwarnings("ignore:.*have no functionality in BLOOM:FutureWarning")  # transformers 4
@pytest.mark.parametrize(("family", "level"), [("Llama", "INFO"), ("BLOOM", "INFO"), ("Qwen3-MoE", "WARNING")])
def test_log_way_warns_if_the_type_is_known_to_pack(family, level, caplog, monkeypatch):
    if level == "WARNING":
        monkeypatch.setattr(causal_lm, "missing_input", lambda decoder: "its forward ignores attention_mask")
    lm = CausalLM(build_family(family), "weak")
    with caplog.at_level(logging.INFO, logger="trl_cdr"):
        lm.per_token_logps(Layout(SHARED), token_budget=1000)
    [record] = caplog.records
    assert record.levelname == level
    assert ("unique" in record.getMessage()) == (family != "Llama")


def test_the_head_runs_only_where_a_completion_token_is_predicted():
    model = llama(V)
    lm = CausalLM(model, "strong")
    lm.per_token_logps(Layout(ROWS), token_budget=64)  # the check at load is over
    shapes = []
    model.lm_head.register_forward_hook(lambda module, args, output: shapes.append(tuple(output.shape)))
    lm.per_token_logps(Layout(ROWS), token_budget=64)
    assert shapes == [(sum(len(row.completion_ids) for row in ROWS), V)]


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


def test_a_halved_budget_is_remembered(monkeypatch, caplog):
    lm = CausalLM(llama(V), "strong")
    expected = lm.per_token_logps(Layout(DISTINCT), token_budget=1000)
    sizes = scarce(monkeypatch, Padded, most=2)
    for _ in range(2):
        sizes.clear()
        results = lm.per_token_logps(Layout(DISTINCT), token_budget=1000)
        torch.testing.assert_close(results, expected, rtol=0, atol=1e-4)
    assert max(sizes) <= 2  # the second time nothing fails
    warnings = [record.getMessage() for record in caplog.records if "ran out of memory" in record.getMessage()]
    assert len(warnings) == 2  # 9 rows, then 4: said when it happened
    assert "forwards of 12 tokens at most. Pass a smaller cdr_token_budget" in warnings[1]


def test_kept_prefixes_are_dropped_when_memory_runs_out(monkeypatch):
    lm = CausalLM(build_family("Llama"), "strong", prefix_cache_tokens=1000)
    rows = random_rows(0, num_prefix=45)
    layout = Layout(rows, constant=Layout(rows).prefix)
    expected = lm.per_token_logps(layout, token_budget=1000)
    assert lm._packed._kept._states
    kept_at_failure = []
    run, drop = Packed.run, Packed.drop

    def fail_once(self, layout, job, *reduce):
        if not kept_at_failure:
            self.fill_cache(layout, job)
            kept_at_failure.append((len(self._kept._states), len(self._held)))
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return run(self, layout, job, *reduce)

    def check_dropped(self):
        drop(self)
        kept_at_failure.append((len(self._kept._states), len(self._held)))

    monkeypatch.setattr(Packed, "run", fail_once)
    monkeypatch.setattr(Packed, "drop", check_dropped)
    torch.testing.assert_close(lm.per_token_logps(layout, token_budget=1000), expected, rtol=0, atol=1e-4)
    assert kept_at_failure == [(1, 1), (0, 0)]


@pytest.mark.parametrize("num_tokens", [1, 3])
def test_rows_that_do_not_fit_packed_are_padded_from_then_on(num_tokens, monkeypatch, caplog):
    """Completions of one token put none of their own into a pack, which can't be made smaller."""
    lm = CausalLM(llama(V), "strong")
    rows = [Row(tuple(range(1, 50)), (first,) * num_tokens) for first in range(50, 56)]
    expected = lm.per_token_logps(Layout(rows), token_budget=1000)
    sizes = scarce(monkeypatch, Packed, most=0)
    for _ in range(2):
        sizes.clear()
        results = lm.per_token_logps(Layout(rows), token_budget=1000)
        torch.testing.assert_close(results, expected, rtol=0, atol=1e-4)
    assert sizes == []  # the second time nothing is tried in vain
    assert "rows of 5" in caplog.text
    assert "tokens and more are padded" in caplog.text
    short = Layout([Row((1, 2, 3, 4, 5, 6), (7, first, 8)) for first in range(9)])
    with lm._frozen():
        assert lm._choose(short, 1000) is lm._packed


def test_rows_that_are_run_again_start_with_what_the_memory_has_allowed(monkeypatch):
    """Those that are not finite in a pack."""
    monkeypatch.setattr(tree_attention, "_attend", None)
    model = build_family("Llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[60] = float("nan")
    lm = CausalLM(model, "strong")
    rows = Layout([Row((1, 2, 3, 4, 5, 6), (7, first, 8)) for first in (9, 60, 10, 11, 12, 13, 14, 15)])
    lm.way()
    scarce(monkeypatch, Packed, most=2)
    lm.per_token_logps(rows, token_budget=1000)
    most = lm._most_tokens
    assert most < 1000
    lm.per_token_logps(rows, token_budget=1000)
    assert lm._most_tokens == most
    assert lm.count_tokens(rows, token_budget=1000) == lm.count_tokens(rows, token_budget=most)


def test_eager_attention_bounds_padded_batches_too(monkeypatch):
    model = llama(V)
    model.set_attn_implementation("eager")
    lm = CausalLM(model, "strong")
    lm.way()
    monkeypatch.setattr(forward, "CPU_SCORES", 4 * 7 * 7 * 3)  # heads x tokens x tokens of three rows
    results = lm.per_token_logps(Layout(DISTINCT), token_budget=1000)
    with lm._frozen():
        jobs = lm._padded.plan(Layout(DISTINCT), 1000)
    assert max(len(job.rows) for job in jobs) == 3
    assert_naive(model, DISTINCT, results)


def test_results_are_copied_to_the_host_once_a_call(monkeypatch):
    lm = CausalLM(llama(V), "strong")
    lm.way()
    copies, to_cpu = [], torch.Tensor.cpu

    def count(tensor, *args, **kwargs):
        copies.append(tuple(tensor.shape))
        return to_cpu(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "cpu", count)
    rows = random_rows(0, num_prefix=0)
    lm.per_token_logps(Layout(rows), token_budget=60)
    assert copies == [(sum(len(row.completion_ids) for row in rows),)]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padded_rows_are_run_without_a_mask(attention):
    """It would rule the flash kernels out; what stands on a row's right is not seen in any case."""
    model = llama(V)
    model.set_attn_implementation(attention)
    lm = CausalLM(model, "strong")
    lm.way()
    masks = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: masks.append(kwargs.get("attention_mask")), with_kwargs=True
    )
    results = lm.per_token_logps(Layout(ROWS), token_budget=64, padded=True)
    assert masks == [None]
    assert_naive(model, ROWS, results)


def test_a_single_row_that_does_not_fit_says_what_to_change(monkeypatch):
    lm = CausalLM(llama(V), "weak")
    lm.per_token_logps(Layout(DISTINCT), token_budget=64)
    scarce(monkeypatch, Padded, most=0)
    with pytest.raises(ModelError, match=r"weak ran out of memory on a single row of \d+ tokens.*cdr_max_length"):
        lm.per_token_logps(Layout(DISTINCT), token_budget=64)


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
    assert errors[0] <= 2 * errors[1]


def test_the_benchmarks_naive_way_is_the_oracle():
    model = build_family("Llama")
    rows = random_rows(0, num_prefix=5)
    assert_naive(model, rows, naive_logps(model, rows, batch_size=5, dtype=torch.float64), atol=1e-5)


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


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 5}
LONGROPE = {"rope_type": "longrope", "original_max_position_embeddings": 40}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}


@pytest.mark.compat
@pytest.mark.parametrize(
    ("config", "switch"),
    [
        ({}, math.inf),
        ({"rope_parameters": YARN}, math.inf),
        ({"rope_parameters": LONGROPE}, 40),
        ({"rope_scaling": {"type": "su"}, "original_max_position_embeddings": 30}, 30),  # transformers 4
        ({"rope_scaling": DYNAMIC}, 100),
        ({"rope_parameters": DYNAMIC | {"original_max_position_embeddings": 200}}, 100),
        ({"rope_parameters": {"full_attention": LONGROPE, "sliding_attention": {"rope_type": "default"}}}, 40),
        ({"rope_parameters": {"full_attention": DYNAMIC, "sliding_attention": LONGROPE}}, 40),
        ({"rope_parameters": {"full_attention": YARN, "sliding_attention": {"rope_type": "default"}}}, math.inf),
    ],
)
def test_rope_switch_is_the_smallest(config, switch):
    decoder = forward.Decoder(llama(V), SimpleNamespace(max_position_embeddings=100, **config))
    assert decoder.rope_switch == switch


@pytest.mark.parametrize("padded", [True, False])
def test_dynamic_rope_forgets_longer_rows(padded):
    """Transformers keeps the frequencies of the longest row: each row has to get those of its own length."""
    model = llama(V, positions=20, rope_scaling={"rope_type": "dynamic", "factor": 2.0})
    lm = CausalLM(copy.deepcopy(model), "strong")
    rows = [Row(tuple(range(1, length)), (3, 4, 5)) for length in (60, 8, 40, 18, 30, 50)]
    results = lm.per_token_logps(Layout(rows), token_budget=4096, padded=padded)
    results += lm.per_token_logps(Layout(rows[-1:]), token_budget=4096)
    for row, logps in zip([*rows, rows[-1]], results, strict=True):
        # As in a trainer's own forward of the whole row, of a model that has seen no other.
        assert_naive(copy.deepcopy(model), [row], [logps])


@pytest.mark.parametrize("way", [forward.OwnLogits, Padded])
def test_rows_at_the_rope_switch(way):
    """The last token is only predicted, and its position decides on all others."""
    model = build_family("Phi-3, LongRoPE")
    way = way(forward.Decoder(model, model.config))
    rows = [Row(tuple(range(1, length)), (3, 4, 5)) for length in (17, 18, 19)]  # of 19, 20 and 21 tokens
    layout = Layout(rows)
    with torch.inference_mode():
        found = {index: way.run(layout, job) for job in way.plan(layout, 1) for index in job.rows}
    assert_naive(model, rows, [found[index] for index in range(3)])


@pytest.mark.parametrize("family", ["Mamba", "RWKV"])
def test_scores_without_heads_are_none(family):
    model = build_family(family)
    assert not hasattr(model.config, "num_attention_heads")
    assert forward.Decoder(model, model.config).scores is None
