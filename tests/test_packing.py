"""Every row once, in batches that fit, the longest first."""

from hypothesis import given
from hypothesis import strategies as st

from trl_cdr.scoring.packing import plan_batches


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 200))
def test_plan(lengths, budget):
    batches = plan_batches(lengths, budget)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= budget
    in_order = [lengths[index] for batch in batches for index in batch]
    assert in_order == sorted(lengths, reverse=True)
    assert plan_batches(lengths, budget) == batches


def test_batches_are_filled():
    assert plan_batches([4, 1, 4, 1, 1], 8) == [[0, 2], [1, 3, 4]]
