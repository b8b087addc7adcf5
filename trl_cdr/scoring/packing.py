"""Lay rows out so that no token is run twice. Pure: token ids in, packs out. Knows no model; `packed` runs them.

    rows              plan                                                positions

    P a b | x y       prefix   P           run once, kept between calls   0
    P a b | x z       tree     a b -- x        a prompt, once,            1 2   3
    P c   | w                   '---- x        for all its completions          3
                      tree     c   -- w                                   1     2

A pack is one sequence of whole trees. Each token sees the prefix, its own prompt and its own completion, and nothing
else; its position is the one that it has in its row. A completion's last token is predicted but predicts nothing, so it
is not run. A tree that is too large for one pack is cut at its fork: its prompt, all but the token that predicts, is
the stem, run once behind the prefix, and its completions follow in packs behind both.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import torch
from torch import Tensor

from .types import Row

# Shorter common prefixes and prompts are not worth a forward of their own.
MIN_PREFIX = 32


@dataclass(frozen=True, slots=True)
class PackLimits:
    """
    How large a pack may be, and how large it should be.

    Attributes:
        tokens (`int`): Tokens of one forward, at most.
        entries (`int`): Entries of its mask, tokens run times tokens seen, at most.
        good_tokens (`int`): Tokens up to which trees share a pack. More would only let attention look, in vain, at
            other trees.
        seen (`int`, *optional*): Tokens that a forward sees, at most, whatever their positions are.
    """

    tokens: int
    entries: int
    good_tokens: int
    seen: int | None = None

    def most(self, num_before: int) -> int:
        """Tokens of one pack behind so many others."""
        most = min(self.tokens, (math.isqrt(num_before**2 + 4 * self.entries) - num_before) // 2)
        return max(1, most if self.seen is None else min(most, self.seen - num_before))


@dataclass(frozen=True, slots=True)
class Tree:
    """
    One prompt with some of its completions.

    Attributes:
        prompt (`tuple[int, ...]`): The prompt's tokens after what is run apart; at least one.
        rows (`tuple[tuple[int, Row], ...]`): The rows that it serves, each with its index.
    """

    prompt: tuple[int, ...]
    rows: tuple[tuple[int, Row], ...]

    @property
    def num_tokens(self) -> int:
        """Tokens that are run."""
        return len(self.prompt) + sum(len(row.completion_inputs) for _, row in self.rows)


@dataclass(frozen=True, slots=True)
class Pack:
    """
    One sequence of whole trees.

    Attributes:
        ids (`Tensor` of shape (Q,)): Tokens.
        positions (`Tensor` of shape (Q,)): Each token's place in its row, prefix included.
        tree (`Tensor` of shape (Q,)): Which tree of the pack a token belongs to.
        branch (`Tensor` of shape (Q,)): Which completion of the pack it belongs to; -1 for a prompt's.
        predicting (`Tensor` of shape (N,)): Where the completion tokens are predicted, row by row.
        targets (`Tensor` of shape (N,)): The completion tokens.
        rows (`tuple[int, ...]`): The rows, in the order of `targets`.
        counts (`tuple[int, ...]`): Completion tokens of each of them.
        stem (`tuple[int, ...]`): Tokens between the prefix and the pack, of a long prompt, that are run apart. Packs
            that share a stem follow one another.
    """

    ids: Tensor
    positions: Tensor
    tree: Tensor
    branch: Tensor
    predicting: Tensor
    targets: Tensor
    rows: tuple[int, ...]
    counts: tuple[int, ...]
    stem: tuple[int, ...] = ()

    def segments(self) -> list[list[slice]]:
        """For each tree where its prompt stands, and then where each of its completions does that is run."""
        trees: dict[int, list[slice]] = {}
        start = 0
        for (tree, _), tokens in groupby(zip(self.tree.tolist(), self.branch.tolist(), strict=True)):
            stop = start + len(list(tokens))
            trees.setdefault(tree, []).append(slice(start, stop))
            start = stop
        return list(trees.values())


def visible(pack: Pack, *, num_prefix: int, window: int | None = None, device: torch.device | None = None) -> Tensor:
    """
    Which token may attend to which.

    Args:
        pack (`Pack`): Q tokens.
        num_prefix (`int`): P, tokens of prefix and stem, which stand before the pack's own.
        window (`int`, *optional*): A sliding window: a token sees itself and the `window - 1` positions before it.
        device (`torch.device`, *optional*): Where to compute.

    Returns:
        `Tensor` of shape (Q, P + Q), bool: row's token sees column's.
    """
    tree, branch, positions = (column.to(device) for column in (pack.tree, pack.branch, pack.positions))
    seen = (branch[None, :] == -1) | (branch[None, :] == branch[:, None])  # (Q, Q)
    seen &= tree[None, :] == tree[:, None]
    seen = torch.nn.functional.pad(seen.tril_(), (num_prefix, 0), value=True)  # (Q, P + Q)
    if window is not None:
        columns = torch.cat([torch.arange(num_prefix, device=device), positions])
        seen &= positions[:, None] - columns[None, :] < window
    return seen


class Layout:
    """
    A call's rows, and how they can be run. Strong and weak share one where they read the same rows.

    Args:
        rows (`Sequence[Row]`): The rows.
        constant (`tuple[int, ...]`, *optional*): Tokens that all prompts start with, of which other calls' prompts do
            too. Default: what the rows happen to share.
    """

    def __init__(self, rows: Sequence[Row], *, constant: tuple[int, ...] = ()) -> None:
        self.rows = tuple(rows)
        self.constant = constant
        self._packs: dict[PackLimits, list[Pack]] = {}

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest row; 0 where there is none."""
        return max((len(row.ids) for row in self.rows), default=0)

    @cached_property
    def prefix(self) -> tuple[int, ...]:
        """The tokens that all prompts start with, if they are worth a forward of their own, else nothing."""
        return self.constant or common_prefix(self.rows)

    @cached_property
    def num_unique(self) -> int:
        """Tokens to run if no token is run twice: the prefix, each prompt and each completion once."""
        prompts = {row.prompt_ids for row in self.rows}
        own = sum(len(prompt) - len(self.prefix) for prompt in prompts)
        return len(self.prefix) + own + sum(len(row.completion_inputs) for row in self.rows)

    def packs(self, limits: PackLimits) -> list[Pack]:
        """All rows after the prefix, see `plan_packs`."""
        if limits not in self._packs:
            self._packs[limits] = plan_packs(self.rows, limits, num_prefix=len(self.prefix))
        return self._packs[limits]

    def subset(self, indices: Sequence[int]) -> "Layout":
        """The layout of some of the rows."""
        return Layout([self.rows[index] for index in indices], constant=self.constant)


@dataclass(frozen=True, slots=True)
class Group:
    """Rows of a call that are laid out together; `indices` are their places in the call."""

    indices: tuple[int, ...]
    layout: Layout


def group_rows(rows: Sequence[Row], constants: Sequence[tuple[int, ...]]) -> list[Group]:
    """
    Group a call's rows by the tokens that stand before them in every call: those of their domain's conditioning.

    Args:
        rows (`Sequence[Row]`): The rows.
        constants (`Sequence[tuple[int, ...]]`): Each row's tokens of that kind, or nothing.

    Returns:
        `list[Group]`: every row in one of them. Rows without such tokens, or whose prompt does not start with them (an
        own system prompt stands first, or the left was cut off), are together.
    """
    members: dict[tuple[int, ...], list[int]] = {}
    for index, (row, constant) in enumerate(zip(rows, constants, strict=True)):
        is_behind = len(constant) < len(row.prompt_ids) and row.prompt_ids[: len(constant)] == constant
        members.setdefault(constant if is_behind else (), []).append(index)
    return [
        Group(tuple(indices), Layout([rows[index] for index in indices], constant=constant))
        for constant, indices in members.items()
    ]


def common_prefix(rows: Sequence[Row]) -> tuple[int, ...]:
    """
    The longest sequence of tokens that all prompts start with; nothing if it is shorter than `MIN_PREFIX`.

    Every prompt keeps its last token out of it, because that token predicts. A single row shares nothing.
    """
    if len(rows) < 2:
        return ()
    prompts = {row.prompt_ids for row in rows}
    low, high = min(prompts), max(prompts)  # what the two ends of the order share, all share
    shortest = min(len(prompt) for prompt in prompts) - 1
    length = next((index for index in range(shortest) if low[index] != high[index]), shortest)
    return low[:length] if length >= MIN_PREFIX else ()


def plan_packs(rows: Sequence[Row], limits: PackLimits, *, num_prefix: int) -> list[Pack]:
    """
    Lay rows out in packs: equal prompts once, whole trees first-fit in the order of falling size.

    Deterministic, and a function of the arguments alone.

    Args:
        rows (`Sequence[Row]`): Prompts that start with the same `num_prefix` tokens and are longer.
        limits (`PackLimits`): A tree that is larger is cut: a long prompt becomes the stem of its completions' packs, a
            short one is repeated before each part of them. A row that is larger is a pack of its own.
        num_prefix (`int`): Tokens that are run apart.

    Returns:
        `list[Pack]`: those with a stem first.
    """
    groups: dict[tuple[int, ...], list[tuple[int, Row]]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(row.prompt_ids, []).append((index, row))
    most = limits.most(num_prefix)
    trees: list[Tree] = []
    packs: list[Pack] = []
    for prompt_ids, members in groups.items():
        tree = Tree(prompt_ids[num_prefix:], tuple(members))
        stem = tree.prompt[:-1]
        if tree.num_tokens <= most:
            trees.append(tree)
        elif len(stem) < MIN_PREFIX:
            trees += _split(tree, most)
        else:
            before = num_prefix + len(stem)
            parts = _split(Tree(tree.prompt[-1:], tree.rows), limits.most(before))
            packs += [_lay_out([part], before, stem) for part in parts]
    trees.sort(key=lambda tree: (-tree.num_tokens, tree.rows[0][0]))
    bins = _first_fit([tree.num_tokens for tree in trees], min(limits.good_tokens, most))
    return packs + [_lay_out([trees[index] for index in members], num_prefix) for members in bins]


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


def _split(tree: Tree, max_tokens: int) -> list[Tree]:
    """A tree in parts of at most `max_tokens`, each with the prompt and some of the completions, the longest first."""
    if tree.num_tokens <= max_tokens:
        return [tree]
    rows = sorted(tree.rows, key=lambda member: (-len(member[1].completion_inputs), member[0]))
    parts = _first_fit([len(row.completion_inputs) for _, row in rows], max_tokens - len(tree.prompt))
    return [Tree(tree.prompt, tuple(rows[index] for index in part)) for part in parts]


def _first_fit(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Put each size into the first bin that has room for it; what is larger than any bin gets one of its own."""
    bins: list[list[int]] = []
    room: list[int] = []
    for index, size in enumerate(sizes):
        place = next((place for place, left in enumerate(room) if size <= left), len(bins))
        if place == len(bins):
            bins.append([])
            room.append(capacity)
        bins[place].append(index)
        room[place] -= size
    return bins


def _lay_out(trees: Sequence[Tree], num_before: int, stem: tuple[int, ...] = ()) -> Pack:
    """One pack of whole trees, behind `num_before` tokens, the stem's among them."""
    ids: list[int] = []
    positions: list[int] = []
    tree_of: list[int] = []
    branch: list[int] = []
    predicting: list[int] = []
    targets: list[int] = []
    rows: list[tuple[int, Row]] = []
    for number, tree in enumerate(trees):
        fork = num_before + len(tree.prompt)
        ids += tree.prompt
        positions += range(num_before, fork)
        branch += [-1] * len(tree.prompt)
        predicts_first = len(ids) - 1
        for member in tree.rows:
            inputs = member[1].completion_inputs
            predicting += [predicts_first, *range(len(ids), len(ids) + len(inputs))]
            targets += member[1].completion_ids
            ids += inputs
            positions += range(fork, fork + len(inputs))
            branch += [len(rows)] * len(inputs)
            rows.append(member)
        tree_of += [number] * (len(ids) - len(tree_of))
    return Pack(
        ids=torch.tensor(ids),
        positions=torch.tensor(positions),
        tree=torch.tensor(tree_of),
        branch=torch.tensor(branch),
        predicting=torch.tensor(predicting),
        targets=torch.tensor(targets),
        rows=tuple(index for index, _ in rows),
        counts=tuple(len(row.completion_ids) for _, row in rows),
        stem=stem,
    )
