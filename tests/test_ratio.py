"""The reward's arithmetic, by hand."""

import pytest
import torch

from trl_cdr.scoring.ratio import log_ratio, sum_logps


def test_by_hand():
    strong, weak = torch.tensor([-1.0, -2.0]), torch.tensor([-3.0, -1.0, -2.0])
    assert log_ratio(strong, weak, "sum") == 3.0
    assert log_ratio(strong, weak, "mean") == pytest.approx(-1.5 + 2.0)
    assert log_ratio(weak, strong, "sum") == -3.0


def test_sums_are_float64():
    """A float32 sum would lose a good part of the small steps."""
    logps = torch.full((100_001,), -0.1)
    logps[0] = -1e6
    assert sum_logps(logps) == pytest.approx(-1e6 - 0.1 * 100_000, abs=1e-2)
