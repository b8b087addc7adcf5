"""The way that runs no token twice: prefixes that are kept, stems of long prompts, and what is let go of."""

import pytest
import torch
from families import ALL_FAMILIES, V, build_family, random_rows
from oracle import assert_naive, completion_logps
from peft import LoraConfig, get_peft_model
from tiny import llama

from trl_cdr.scoring import packed as module
from trl_cdr.scoring import tree_attention
from trl_cdr.scoring.causal_lm import CausalLM
from trl_cdr.scoring.forward import Decoder
from trl_cdr.scoring.packed import VERIFIED, Packed, _PrefixStore
from trl_cdr.scoring.packing import Layout
from trl_cdr.scoring.types import Row

LONG = [Row((prompt, *range(1, 50)), (7, first, 8, 9)) for prompt in (3, 4) for first in range(10, 16)]


def constant_layout(rows):
    """Rows whose common prefix is a conditioning's."""
    return Layout(rows, constant=Layout(rows).prefix)


def lengths_of(model):
    """The lengths of all later forwards."""
    lengths = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    return lengths


def test_the_verified_architectures_are_those_of_the_tests():
    tested = {build_family(name).config.model_type for name, (*_, way) in ALL_FAMILIES.items() if way == "packed"}
    assert tested == VERIFIED - ({"olmo3"} if "OLMo 3" not in ALL_FAMILIES else set())


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
    lengths = lengths_of(model)
    rows = {name: random_rows(name, num_prefix=45) for name in "abc"}
    lm.way()
    first = {name: lm.per_token_logps(constant_layout(rows[name]), token_budget=4096) for name in "ab"}
    prefixes = {name: len(Layout(rows[name]).prefix) for name in rows}
    lengths.clear()
    again = {name: lm.per_token_logps(constant_layout(rows[name]), token_budget=4096) for name in "ab"}
    assert not set(prefixes.values()) & set(lengths)
    for name in "ab":  # cold or warm, the same bits
        assert all(torch.equal(x, y) for x, y in zip(first[name], again[name], strict=True))
    lm.per_token_logps(constant_layout(rows["c"]), token_budget=4096)  # does not fit beside them: a, the oldest, goes
    lengths.clear()
    lm.per_token_logps(constant_layout(rows["b"]), token_budget=4096)
    assert prefixes["b"] not in lengths
    lm.per_token_logps(constant_layout(rows["a"]), token_budget=4096)
    assert prefixes["a"] in lengths


def test_a_prefix_that_is_not_kept_is_run_once_a_call():
    model = build_family("Llama")
    lm = CausalLM(model, "strong", prefix_cache_tokens=0)
    lm.way()
    lengths = lengths_of(model)
    for _ in range(2):
        layout = Layout(random_rows(0, num_prefix=45))
        lm.per_token_logps(layout, token_budget=60)
    assert len(lengths) > 4  # several packs a call
    assert lengths.count(len(layout.prefix)) == 2


def test_no_prefix_cache_gives_the_same_bits():
    model = build_family("Llama")
    rows = constant_layout(random_rows(0, num_prefix=45))
    without, cached = CausalLM(model, "strong"), CausalLM(model, "strong", prefix_cache_tokens=100)
    for _ in range(2):
        results = [lm.per_token_logps(rows, token_budget=4096) for lm in (without, cached)]
        assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def train_one_step(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)  # leaves data_ptr and _version as they were
    model(input_ids=torch.tensor([[1, 2, 3, 4]]), labels=torch.tensor([[1, 2, 3, 4]])).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def scale_in_place(model):
    for parameter in model.parameters():  # as SyncRefModelCallback does
        parameter.data.mul_(0.5)


@pytest.mark.parametrize("change", [train_one_step, scale_in_place])
def test_a_held_model_that_changed_since_is_not_read_from_the_cache(change):
    model = build_family("Llama")
    lm = CausalLM(model, "strong")
    rows = random_rows(0, num_prefix=45)
    layout = constant_layout(rows)
    before = lm.per_token_logps(layout, token_budget=4096)
    change(model)
    after = lm.per_token_logps(layout, token_budget=4096)  # the same layout, too
    assert_naive(model, rows, after)
    assert max(float((x - y).abs().max()) for x, y in zip(before, after, strict=True)) > 0.1


# peft 0.21 reads what transformers 5 deprecates
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_held_model_whose_adapter_is_switched_off_is_not_read_from_the_cache():
    config = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(llama(V), config).eval()
    model = adapted.get_base_model()
    lm = CausalLM(model, "strong")
    rows = random_rows(0, num_prefix=45)
    assert_naive(model, rows, lm.per_token_logps(constant_layout(rows), token_budget=4096))
    assert lm.way() == ("packed", "")
    with adapted.disable_adapter():
        assert_naive(model, rows, lm.per_token_logps(constant_layout(rows), token_budget=4096))


def test_only_what_recurs_is_kept_between_calls():
    """The common prefix of a call's prompts may never come again."""
    lm = CausalLM(build_family("Llama"), "strong", prefix_cache_tokens=1000)
    for seed in range(3):
        lm.per_token_logps(Layout(random_rows(seed, num_prefix=45)), token_budget=60)
        assert not lm._packed._kept._states
        assert not lm._packed._held
    layout = constant_layout(random_rows(0, num_prefix=45))
    lm.per_token_logps(layout, token_budget=60)
    assert [prefix for _, prefix in lm._packed._kept._states] == [layout.prefix]


def test_what_is_kept_depends_on_the_size_of_forwards():
    """Rewards that share a pair may have other budgets, and other chunks give other bits."""
    layout = constant_layout(random_rows(0, num_prefix=57))
    model = build_family("Llama")
    lm, fresh = (CausalLM(model, "strong", prefix_cache_tokens=1000) for _ in range(2))
    lm.per_token_logps(layout, token_budget=7)
    results = [each.per_token_logps(layout, token_budget=4096) for each in (lm, fresh)]
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_the_least_recently_used_prefix_goes_first():
    model = build_family("Llama")
    layouts = {name: constant_layout(random_rows(name, num_prefix=45)) for name in "abc"}
    lm = CausalLM(model, "strong", prefix_cache_tokens=100)
    for name in "aba" + "c":  # a was used after b, so that b makes room for c
        lm.per_token_logps(layouts[name], token_budget=4096)
    assert [prefix for _, prefix in lm._packed._kept._states] == [layouts["a"].prefix, layouts["c"].prefix]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("by_tree", [True, False], ids=["by tree", "under the mask"])
def test_a_long_prompt_is_run_once(by_tree, attention, monkeypatch):
    if not by_tree:
        monkeypatch.setattr(tree_attention, "_attend", None)
    model = build_family("Llama")
    model.set_attn_implementation(attention)
    lm = CausalLM(model, "strong")
    lm.way()
    lengths = lengths_of(model)
    # Of each of 2 prompts 49 tokens, then its last and 3 of each of 6 completions.
    assert lm.count_tokens(Layout(LONG), token_budget=50) == 2 * (49 + 1 + 6 * 3)
    whole = lm.per_token_logps(Layout(LONG), token_budget=50)
    assert sorted(lengths) == [19, 19, 49, 49]
    lengths.clear()
    in_chunks = lm.per_token_logps(Layout(LONG), token_budget=12)  # and packs of three branches
    assert max(lengths) == 12
    assert_naive(model, LONG, whole)
    assert_naive(model, LONG, in_chunks)


class Elsewhere(Decoder):
    """A model as it would be in bfloat16 on a device that is not here: what the size of a pack depends on."""

    dtype = torch.bfloat16
    device = None

    def __init__(self, kind):
        model = build_family("Llama")
        super().__init__(model, model.config)
        self.device = torch.device(kind)


@pytest.mark.parametrize("prompt", [500, 1000, 2000, 4000, 8000])
@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_planned_tokens_are_close_to_unique_ones(prompt, kind):
    limits = Packed(Elsewhere(kind), prefix_cache_tokens=0).limits(8192)
    rows = [Row((first, *[1] * (prompt - 1)), (second,) * 200) for first in range(2) for second in range(8)]
    unique = 2 * prompt + 16 * 199
    packs = Layout(rows).packs(limits)
    stems = {pack.stem for pack in packs}
    assert sum(len(pack.ids) for pack in packs) + sum(map(len, stems)) <= 1.1 * unique
    assert all(len(pack.ids) * (len(pack.stem) + len(pack.ids)) <= limits.entries for pack in packs)


def test_an_accelerator_gets_larger_packs():
    cpu, gpu = (Packed(Elsewhere(kind), prefix_cache_tokens=0).limits(8192) for kind in ("cpu", "cuda"))
    assert gpu.most(0) == 4096
    assert gpu.good_tokens == 8192
    assert cpu.most(0) == 2048
    assert cpu.good_tokens == module._CPU_GOOD_TOKENS


@pytest.mark.compat
def test_places_that_are_counted_bound_a_pack():
    """GPT-2's eager attention cuts its causal mask by places in the sequence, of which it has so many as positions."""
    model = build_family("GPT-2")
    model.set_attn_implementation("eager")
    lm = CausalLM(model, "strong")
    rows = [row for seed in range(6) for row in random_rows(seed, num_prefix=40)]
    assert sum(len(row.completion_ids) for row in rows) > model.config.max_position_embeddings
    assert_naive(model, rows, lm.per_token_logps(Layout(rows), token_budget=4096))
    assert lm.way() == ("packed", "")
    with lm._frozen():
        packs = [job.pack for job in lm._packed.plan(Layout(rows), 4096)]
    assert len(packs) > 1  # transformers 5 has no such mask any more
    assert all(len(pack.stem) + len(pack.ids) <= model.config.max_position_embeddings for pack in packs)


def test_autocast_of_the_caller_does_not_reach_a_stem():
    model = build_family("Llama")
    lm = CausalLM(model, "strong")
    with torch.autocast("cpu", torch.bfloat16):
        results = lm.per_token_logps(Layout(LONG), token_budget=50)
    expected = [completion_logps(model, row.prompt_ids, row.completion_ids) for row in LONG]
    torch.testing.assert_close([x.double() for x in results], expected, rtol=0, atol=1e-4)


def test_prefix_store_refuses_what_is_too_large():
    """It does not drop what it has for something that it can't keep."""
    store = _PrefixStore(5)
    store.put((8, (1, 2, 3)), ["small"])
    store.put((8, (1, 2, 3, 4, 5, 6)), ["large"])
    assert store.get((8, (1, 2, 3))) == ["small"]
    assert store.get((8, (1, 2, 3, 4, 5, 6))) is None
    store.put((8, (7, 8, 9)), ["newer"])  # six tokens together
    assert store.get((8, (1, 2, 3))) is None
    assert store.get((8, (7, 8, 9))) == ["newer"]


def test_cost_of_a_prefix_that_is_not_kept_counts():
    """A prefix longer than the store is run in every call."""
    rows = [Row((*tuple(range(1, 60)), number), (7, 8, 9)) for number in range(2)]
    layout = constant_layout(rows)
    model = build_family("Llama")
    counts = [
        CausalLM(model, "strong", prefix_cache_tokens=size).count_tokens(layout, token_budget=4096)
        for size in (len(layout.constant), len(layout.constant) - 1)
    ]
    assert counts[1] - counts[0] == len(layout.constant) > 0


def test_load_check_leaves_no_keys():
    """Its keys were made under short windows, and they take memory."""
    lm = CausalLM(build_family("Mistral"), "strong", prefix_cache_tokens=8192)
    assert lm.way() == ("packed", "")
    assert not lm.keeps_prefixes
    assert lm._packed._held == {}


def test_one_stem_is_held_at_a_time(monkeypatch):
    """Keys of all long prompts together would not fit into memory."""
    lm = CausalLM(build_family("Llama"), "strong")
    lm.way()
    run, held = lm._packed.run, []

    def watch(*args):
        logps = run(*args)
        held.append(list(lm._packed._held))
        return logps

    monkeypatch.setattr(lm._packed, "run", watch)
    lm.per_token_logps(Layout(LONG), token_budget=50)
    stems = {ids for ids_held in held for ids in ids_held}
    assert len(stems) == 2
    assert all(len(ids_held) == 1 for ids_held in held)
