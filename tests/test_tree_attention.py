"""Attention by trees: what a mask would give, to rounding, without a look at what it hides."""

import random

import pytest
import torch
from families import V
from hypothesis import given
from hypothesis import strategies as st
from tiny import llama
from torch.nn.functional import scaled_dot_product_attention

from trl_cdr.scoring import tree_attention
from trl_cdr.scoring.causal_lm import CausalLM
from trl_cdr.scoring.forward import Decoder
from trl_cdr.scoring.packed import Packed
from trl_cdr.scoring.packing import Layout, PackLimits, plan_packs, visible
from trl_cdr.scoring.tree_attention import TreeAttention
from trl_cdr.scoring.types import Row

HEADS, SIZE = 2, 8


def draw_case(seed, num_prefix):
    """A pack of some trees, its mask, and float64 queries, keys and values."""
    rng = random.Random(seed)
    prompts = [(0,) * num_prefix + (index, *[1] * rng.randrange(4)) for index in range(3)]
    rows = [Row(rng.choice(prompts), (2,) * rng.randint(1, 6)) for _ in range(rng.randint(1, 7))]
    (pack,) = plan_packs(rows, PackLimits(tokens=10**6, entries=10**12, good_tokens=10**6), num_prefix=num_prefix)
    seen = visible(pack, num_prefix=num_prefix)
    mask = torch.zeros(seen.shape).masked_fill_(~seen, torch.finfo(torch.float32).min)[None, None]
    generator = torch.Generator().manual_seed(seed)
    lengths = (mask.shape[2], mask.shape[3], mask.shape[3])
    states = [torch.randn(1, HEADS, n, SIZE, generator=generator, dtype=torch.float64) for n in lengths]
    return pack, mask, states


def rounding(query, key, value, scale):
    """
    What float32 may be off by, whatever the order of its sums: a score is a product of SIZE terms, an output moves by
    twice the largest error of a score times the largest value, and is itself a sum.
    """
    eps = torch.finfo(torch.float32).eps
    factor = SIZE**-0.5 if scale is None else scale
    scores = factor * query.abs() @ key.abs().transpose(2, 3)
    return float((2 * (SIZE + 4) * scores.max() + key.shape[2] + 4) * eps * value.abs().max())


@given(st.integers(0, 10**6), st.sampled_from([0, 1, 5, 40]), st.sampled_from([None, 0.7]), st.sampled_from([1, 30]))
def test_it_is_attention_under_the_mask(seed, num_prefix, scale, sharpness):
    pack, mask, (query, key, value) = draw_case(seed, num_prefix)
    query = query * sharpness
    expected = scaled_dot_product_attention(query, key, value, attn_mask=mask.double(), scale=scale)
    with TreeAttention(pack, mask):
        output = scaled_dot_product_attention(
            query.float(), key.float(), value.float(), attn_mask=mask, dropout_p=0.0, scale=scale, is_causal=False
        )
        as_names = scaled_dot_product_attention(
            query=query.float(), key=key.float(), value=value.float(), attn_mask=mask, scale=scale
        )
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=rounding(query, key, value, scale))
    assert torch.equal(as_names, output)


def test_what_the_mask_hides_is_not_read():
    pack, mask, states = draw_case(4, 5)
    query, key, value = (x.float() for x in states)
    first_tree, *_ = trees = pack.segments()
    assert len(trees) > 1
    assert len(first_tree) > 2
    for branch in first_tree[1:]:
        broken = value.clone()
        broken[:, :, 5 + branch.start : 5 + branch.stop] = torch.nan
        with TreeAttention(pack, mask):
            output = scaled_dot_product_attention(query, key, broken, attn_mask=mask)
        reached = output.isnan().any(dim=3)[0, 0]
        assert reached[branch].all()
        assert reached.sum() == branch.stop - branch.start


@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, v, mask: (q, k, v, mask.clone()),  # another mask: a sliding window's, a bias
        lambda q, k, v, mask: (q, k, v, mask[..., :-1, :]),
        lambda q, k, v, mask: (q, k, v, None),
        lambda q, k, v, mask: (torch.cat([q, q]), k, v, mask),  # another batch
        lambda q, k, v, mask: (q, k, torch.cat([v, v], dim=3), mask),  # values of another size
    ],
)
def test_other_calls_are_left_alone(change):
    pack, mask, states = draw_case(3, 5)
    query, key, value, other = change(*(x.float() for x in states), mask)
    rows = slice(0, None if other is None else other.shape[2])
    expected = scaled_dot_product_attention(query[:, :, rows], key, value, attn_mask=other)
    with TreeAttention(pack, mask):
        assert torch.equal(scaled_dot_product_attention(query[:, :, rows], key, value, attn_mask=other), expected)


def test_queries_that_are_no_tokens_of_the_pack_are_left_alone():
    """Of a single token transformers 5 makes the heads of a group queries of one head."""
    (pack,) = plan_packs([Row((0, 0, 0, 1), (2,))], PackLimits(100, 10**6, 100), num_prefix=3)
    mask = torch.zeros(1, 1, 1, 4)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, HEADS, n, SIZE, generator=generator) for n in (2, 4, 4))
    expected = scaled_dot_product_attention(query, key, value, attn_mask=mask)
    with TreeAttention(pack, mask):
        assert torch.equal(scaled_dot_product_attention(query, key, value, attn_mask=mask), expected)


@pytest.mark.compat
@pytest.mark.parametrize("num_prefix", [0, 40])
def test_the_engine_attends_by_trees_where_it_can(num_prefix, monkeypatch):
    # A completion whose tokens have no numbers would reach the other through a weight of 0.
    model = llama(V)
    with torch.no_grad():
        model.get_input_embeddings().weight[7] = torch.nan
    rows = [Row((1,) * num_prefix + (2, 3), completion) for completion in ((7, 7, 4), (5, 6, 4))]
    layout = Layout(rows)
    packed = Packed(Decoder(model, model.config), prefix_cache_tokens=0)

    def run():
        (job,) = packed.plan(layout, 1000)
        with torch.inference_mode():
            logps = packed.run(layout, job).split([len(rows[index].completion_ids) for index in job.rows])
        packed.forget()
        return logps

    assert [bool(logps.isfinite().all()) for logps in run()] == [False, True]
    monkeypatch.setattr(tree_attention, "_attend", None)  # a torch that has no such kernel
    assert [bool(logps.isfinite().all()) for logps in run()] == [False, False]


def test_the_engine_gives_the_same_scores_either_way(monkeypatch):
    rng = random.Random(0)
    prompts = [(1,) * 40 + (index, 3) for index in range(4)]
    rows = [Row(rng.choice(prompts), tuple(rng.choices(range(4, 40), k=rng.randint(1, 30)))) for _ in range(20)]
    lm = CausalLM(llama(V), "strong")
    by_tree = lm.per_token_logps(Layout(rows), token_budget=1000)
    monkeypatch.setattr(tree_attention, "_attend", None)
    torch.testing.assert_close(by_tree, lm.per_token_logps(Layout(rows), token_budget=1000), rtol=0, atol=1e-5)


def test_it_suits_float32_on_a_cpu_only():
    assert TreeAttention.suits(torch.device("cpu"), torch.float32)
    assert not TreeAttention.suits(torch.device("cpu"), torch.bfloat16)
    assert not TreeAttention.suits(torch.device("cuda"), torch.float32)
