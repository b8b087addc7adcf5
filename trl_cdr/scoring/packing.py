"""Lay rows out in batches. Pure: lengths in, indices out. Knows no model; `causal_lm` runs what this plans."""

from collections.abc import Sequence


def plan_batches(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """
    Group rows of similar length, so that little is padded, with at most `token_budget` padded tokens a batch.

    Deterministic; the longest rows come first, so that memory runs out at once or not at all. A row that is longer
    than the budget is a batch of its own.

    Args:
        lengths (`Sequence[int]`): Tokens of each row.
        token_budget (`int`): Rows of a batch times its longest row, at most.

    Returns:
        `list[list[int]]`: Row indices of each batch; every row appears once.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= token_budget:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
