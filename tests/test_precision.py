"""What full precision is, and how far scores may be from it, by hand."""

import json
from itertools import combinations

import pytest
import torch

from trl_cdr import CDRConfig, ConfigError, InputError, Score
from trl_cdr.annotation.precision import compare, full_precision, measure_precision
from trl_cdr.annotation.precision_rows import ROWS


def score(strong, weak=0.0, per_token=None, **fields):
    kept = None if per_token is None else torch.tensor(per_token)
    return Score(strong - weak, strong_logps=strong, weak_logps=weak, n_tokens=2, per_token=kept, **fields)


def test_by_hand():
    prompts = ["a", "a", "a", "b", "b"]
    full = [score(4.0, per_token=[1.0, 3.0]), score(3.0, per_token=[1.0, 2.0]), score(0.0), score(1.0), score(1.0)]
    found = [score(3.0, per_token=[2.0, 1.0]), score(3.5, per_token=[1.0, 2.5]), score(0.0), score(1.0), score(2.0)]
    result = compare(prompts, full, found)
    assert (result["rows"], result["unscorable"]) == (5, 0)
    assert result["preferences"] == 3  # b's two are a tie
    assert (result["turned"], result["turned_margin"]) == (1, 1.0)
    assert result["strong"] == {"mean": pytest.approx((0.5 + 0.25 + 0.5) / 5), "max": 0.5}
    assert result["weak"] == {"mean": 0.0, "max": 0.0}
    assert result["log_ratio"]["max"] == 2.0  # token by token, where signs do not cancel
    assert result["log_ratio"]["mean"] == pytest.approx((1 + 2 + 0 + 0.5 + 0 + 0 + 0.5) / 7)


def test_rows_that_can_not_be_scored_are_counted():
    none = Score(None, error="no")
    result = compare(["a", "a", "a"], [score(1.0), score(2.0), none], [score(1.0), score(2.0), none])
    assert (result["unscorable"], result["preferences"], result["turned"]) == (1, 1, 0)
    with pytest.raises(InputError, match="no two completions of the input have one prompt"):
        compare(["a", "b"], [score(1.0), score(2.0)], [score(1.0), score(2.0)])


def test_what_full_precision_is(checkpoints):
    kwargs = {"quantization_config": {"load_in_8bit": True}, "attn_implementation": "eager"}
    reference = full_precision(CDRConfig.from_options(**checkpoints, model_init_kwargs=kwargs, dtype="bfloat16"))
    assert reference.cdr_model_init_kwargs == {"attn_implementation": "eager"}
    assert reference.cdr_dtype == "bfloat16"
    assert full_precision(CDRConfig.from_options(**checkpoints, dtype="bfloat16")).cdr_dtype == "float32"
    with pytest.raises(ConfigError, match="the pair has it: float32"):
        full_precision(CDRConfig.from_options(**checkpoints, device="cpu"))


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("value", ["bfloat16", torch.bfloat16])
def test_a_type_among_the_kwargs_is_none_of_full_precision_s(name, value, checkpoints):
    kwargs = {name: value, "attn_implementation": "eager"}
    reference = full_precision(CDRConfig.from_options(**checkpoints, model_init_kwargs=kwargs))
    assert reference.cdr_model_init_kwargs == {"attn_implementation": "eager"}
    assert reference.cdr_dtype == "float32"
    with pytest.raises(ConfigError, match="the pair has it: float32"):
        full_precision(CDRConfig.from_options(**checkpoints, dtype="bfloat16", model_init_kwargs={name: "float32"}))


@pytest.mark.parametrize("name", ["load_in_8bit", "load_in_4bit"])
def test_bits_among_the_kwargs_quantise(name, checkpoints):
    reference = full_precision(CDRConfig.from_options(**checkpoints, model_init_kwargs={name: True}))
    assert reference.cdr_model_init_kwargs is None


def test_the_built_in_rows_make_a_hundred_preferences():
    assert sum(len(list(combinations(set(completions), 2))) for completions in ROWS.values()) == 100


def test_bfloat16_beside_float32(checkpoints, tmp_path):
    result = measure_precision(CDRConfig.from_options(**checkpoints, dtype="bfloat16"))
    assert result["reference"] == "the pair in float32"
    assert result["rows"] == 50
    assert result["unscorable"] < 20  # a tiny model has 256 positions
    assert 0 < result["log_ratio"]["mean"] < result["log_ratio"]["max"] < 1
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"prompt": "hello", "completion": text}) for text in ("a", "b", "c")))
    assert measure_precision(CDRConfig.from_options(**checkpoints, dtype="bfloat16"), str(rows))["preferences"] == 3


@pytest.mark.filterwarnings("default")  # torchao's own
def test_a_pair_in_8_bits_of_torchao(checkpoints):
    pytest.importorskip("torchao")
    quantization = {"default": {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {}}}
    kwargs = json.dumps({"quantization_config": {"quant_method": "torchao", "quant_type": quantization}})
    result = measure_precision(CDRConfig.from_options(**checkpoints, model_init_kwargs=kwargs))
    assert result["reference"] == "the pair, not quantised"
    assert 0 < result["log_ratio"]["mean"] < 0.5
