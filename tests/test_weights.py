"""What a module's weights are, and whether they are all there."""

import copy

import pytest
import torch

from trl_cdr import DensityRatioScorer, ModelError
from trl_cdr.scoring import weights
from trl_cdr.scoring.weights import fingerprint


def test_a_fingerprint_tells_a_single_number(strong):
    model = copy.deepcopy(strong).to(torch.bfloat16)
    before = fingerprint(model)
    assert fingerprint(model) == before
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] *= 1.01
    assert fingerprint(model) != before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_fingerprint_exchanged_rows(dtype):
    """The rows have the same sum in another order."""
    generator = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(24, 6, bias=False)
    layer.weight = torch.nn.Parameter(torch.randn(6, 24, generator=generator).to(dtype), requires_grad=False)
    before = fingerprint(layer)
    layer.weight.data = layer.weight.data[[0, 4, 2, 3, 1, 5]]
    assert fingerprint(layer) != before


def test_fingerprint_exchanged_blocks(monkeypatch):
    monkeypatch.setattr(weights, "_BLOCK", 4)
    layer = torch.nn.Linear(8, 6, bias=False)  # a row is a block
    before = fingerprint(layer)
    layer.weight.data = layer.weight.data[[1, 0, 2, 3, 4, 5]]
    assert fingerprint(layer) != before


def test_fingerprint_exchanged_tensors():
    layers = torch.nn.Sequential(torch.nn.Linear(3, 3, bias=False), torch.nn.Linear(3, 3, bias=False))
    before = fingerprint(layers)
    layers[0].weight.data, layers[1].weight.data = layers[1].weight.data, layers[0].weight.data
    assert fingerprint(layers) != before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_fingerprint_depends_on_values_only(dtype):
    """Tensors that are parts of others, transposed, empty or a single number, and the end of a word."""
    whole = torch.arange(-20, 21).to(dtype)
    parts = [whole[3:], whole[:35].view(5, 7).T, whole[:0], whole[7]]
    for part in parts:
        layer = torch.nn.Module()
        layer.weight = torch.nn.Parameter(part, requires_grad=False)
        before = fingerprint(layer)
        layer.weight.data = part.clone(memory_format=torch.contiguous_format)
        assert fingerprint(layer) == before
        if part.numel():
            layer.weight.data.view(-1)[-1] += 1
            assert fingerprint(layer) != before


def test_fingerprint_is_of_every_process():
    """A number on record: neither the hash seed of Python nor the process changes it."""
    layer = torch.nn.Linear(3, 2)
    layer.weight.data = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    layer.bias.data = torch.tensor([-1.0, 0.5])
    assert fingerprint(layer) == -3841007479558593257


def test_weights_that_other_processes_have(tokenizer, strong):
    """A module of which this process has a part: ZeRO-3 leaves it like this."""
    part = copy.deepcopy(strong)
    part.model.norm.weight.data = torch.empty(0)
    scorer = DensityRatioScorer(part, strong, strong_tokenizer=tokenizer, weak_tokenizer=tokenizer)
    with pytest.raises(ModelError, match="strong is spread over processes .*Pass a name or a path"):
        scorer.load()
