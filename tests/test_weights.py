"""What a module's weights are, and whether they are all there."""

import copy

import pytest
import torch

from trl_cdr import DensityRatioScorer, ModelError
from trl_cdr.scoring.weights import fingerprint


def test_a_fingerprint_tells_a_single_number(strong):
    model = copy.deepcopy(strong).to(torch.bfloat16)
    before = fingerprint(model)
    assert fingerprint(model) == before
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] *= 1.01
    assert fingerprint(model) != before


def test_weights_that_other_processes_have(tokenizer, strong):
    """A module of which this process has a part: ZeRO-3 leaves it like this."""
    part = copy.deepcopy(strong)
    part.model.norm.weight.data = torch.empty(0)
    scorer = DensityRatioScorer(part, strong, strong_tokenizer=tokenizer, weak_tokenizer=tokenizer)
    with pytest.raises(ModelError, match="strong is spread over processes .*Pass a name or a path"):
        scorer.load()
