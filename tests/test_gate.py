"""Which statistics a gate asks for, and the fields of a score that it fills."""

import math

import pytest
import torch

from trl_cdr.scoring.gate import examine, gate_statistics
from trl_cdr.scoring.logps import token_logps

LOGITS = torch.randn(6, 20, generator=torch.Generator().manual_seed(0)) * 2
OWN, LEAST = LOGITS.argmax(-1), LOGITS.argmin(-1)


def look(gate, targets, *, end_ids=(), finished=None):
    statistics = gate_statistics(gate, end_ids)(LOGITS, targets)
    assert torch.equal(statistics if statistics.ndim == 1 else statistics[:, 0], token_logps(LOGITS, targets))
    return examine(statistics, gate=gate, least_typicality=-1.5, finished=finished)


def test_none_keeps_log_probabilities_alone():
    assert gate_statistics("none", (1,)) is token_logps
    assert look("none", OWN) == {}


@pytest.mark.parametrize(("gate", "field"), [("typicality", "typicality"), ("surprise", "surprise")])
def test_what_the_model_expects_least_is_gated(gate, field):
    own, least = look(gate, OWN), look(gate, LEAST)
    assert (own["gated"], least["gated"]) == (False, True)
    assert math.isfinite(own[field])
    assert math.isfinite(least[field])
    assert {"typicality", "surprise"} & set(own) == {field}


def test_survival_needs_an_end_token_and_leaves_out_the_end():
    assert look("surprise", OWN)["survival"] is None
    end = int(OWN[-1])  # where the text ends the model would have ended it
    lived = {finished: look("surprise", OWN, end_ids=(end,), finished=finished) for finished in (True, False, None)}
    assert lived[True]["survival"] < lived[False]["survival"] == lived[None]["survival"]
    expected = -torch.log1p(-LOGITS.double().softmax(-1)[:, end])
    assert lived[True]["survival"] == pytest.approx(float(expected[:-1].sum()), abs=1e-5)
    assert lived[False]["survival"] == pytest.approx(float(expected.sum()), abs=1e-5)
