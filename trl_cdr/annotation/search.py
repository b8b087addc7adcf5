"""Texts that are worth much and answer nothing, found on the pair itself: token by token, whatever is worth most.

`probe` counts how often they win, `attacks` has those that need no model.
"""

import math
import random
from collections.abc import Sequence

import torch
from torch import Tensor

from ..scoring.encoding import fit
from ..scoring.packing import group_rows
from ..scoring.pair import Member, Pair
from ..scoring.rewards import rewards_from_scores
from ..scoring.scorer import DensityRatioScorer
from ..scoring.types import Completion, Prompt, Row
from .bouts import score_completions
from .writers import end_id, prompt_ids

_OF_EACH_KIND = 4
CANDIDATES = 3 * _OF_EACH_KIND
"""Tokens that are tried at each step: strong's likeliest, those that strong gives most more than weak, any."""


def search_tokens(
    scorer: DensityRatioScorer,
    prompts: Sequence[Prompt],
    *,
    domains: Sequence[str | None],
    budget: int,
    seed: int,
) -> list[Completion]:
    """
    Write to each prompt, from nothing, the token that makes the reward of what is written highest; and another.

    At each step `CANDIDATES` tokens are tried: the strong model's likeliest, those whose log-probability it has raised
    most over the weak model's (where the two share a vocabulary), and some at random. Each is scored as the last of a
    finished completion, behind the scorer's own gate.

    Args:
        scorer (`DensityRatioScorer`): Its reward is what is looked for.
        prompts (`Sequence[Prompt]`): All can be encoded.
        domains (`Sequence[str | None]`): Of the prompts.
        budget (`int`): Completions that may be scored for each prompt; at least `CANDIDATES`.
        seed (`int`): Of the tokens at random.

    Returns:
        `list[Completion]`: for each prompt the best that was met, of any length.
    """
    with scorer.use() as pair:
        rng = random.Random(seed)
        allowed = _allowed_ids(pair)
        written: list[tuple[int, ...]] = [()] * len(prompts)
        best: list[tuple[float, Completion]] = [(-math.inf, Completion("", None))] * len(prompts)
        for _ in range(budget // CANDIDATES):
            proposals = _propose(pair, prompts, written, allowed, rng, token_budget=scorer.config.cdr_token_budget)
            tried = [(place, (*written[place], id)) for place, ids in enumerate(proposals) for id in ids]
            completions = [_finish(pair, prompts[place], ids) for place, ids in tried]
            rewards = _rewards(scorer, [(prompts[place], domains[place]) for place, _ in tried], completions)
            leaders: dict[int, tuple[float, tuple[int, ...]]] = {}
            for (place, ids), completion, reward in zip(tried, completions, rewards, strict=True):
                if place not in leaders or reward > leaders[place][0]:
                    leaders[place] = (reward, ids)
                if reward > best[place][0]:
                    best[place] = (reward, completion)
            for place, (_, ids) in leaders.items():
                written[place] = ids
    return [completion for _, completion in best]


def _rewards(
    scorer: DensityRatioScorer, rows: Sequence[tuple[Prompt, str | None]], completions: Sequence[Completion]
) -> list[float]:
    scores = score_completions(scorer, [prompt for prompt, _ in rows], completions, [domain for _, domain in rows])
    rewards = rewards_from_scores(scores, on_unscorable="none", reduction=scorer.config.cdr_reduction)
    return [-math.inf if reward is None else reward for reward in rewards]


def _finish(pair: Pair, prompt: Prompt, ids: tuple[int, ...]) -> Completion:
    """What was written, and the end of the turn: as ids where both models read the same ones, else as text."""
    text = str(pair.strong.encoder.tokenizer.decode(ids, skip_special_tokens=True))
    end = end_id(pair.strong, prompt)
    finished = None if end is None or end_id(pair.weak, prompt) is None else True
    if not pair.shares_vocabulary:
        return Completion(text, finished)
    return Completion(text, finished, ids if finished is None else (*ids, end))  # type: ignore[arg-type]


def _propose(
    pair: Pair,
    prompts: Sequence[Prompt],
    written: Sequence[tuple[int, ...]],
    allowed: Tensor,
    rng: random.Random,
    *,
    token_budget: int,
) -> list[list[int]]:
    """For each prompt the tokens to try next, without doubles."""
    strong = _next_logps(pair.strong, prompts, written, token_budget=token_budget)
    weak: Sequence[Tensor | None] = [None] * len(prompts)
    if pair.shares_vocabulary:
        weak = _next_logps(pair.weak, prompts, written, token_budget=token_budget)
    proposals = []
    for likely, other in zip(strong, weak, strict=True):
        ids = allowed[likely[allowed].topk(min(_OF_EACH_KIND, len(allowed))).indices].tolist()
        if other is not None:
            raised = (likely[allowed] - other[allowed]).nan_to_num(nan=-math.inf)
            ids += allowed[raised.topk(min(_OF_EACH_KIND, len(allowed))).indices].tolist()
        ids += [int(allowed[rng.randrange(len(allowed))]) for _ in range(CANDIDATES - len(ids))]
        proposals.append(list(dict.fromkeys(ids)))
    return proposals


def _next_logps(
    member: Member, prompts: Sequence[Prompt], written: Sequence[tuple[int, ...]], *, token_budget: int
) -> list[Tensor]:
    """For each prompt, what is written standing behind it, the log-probability of every next token: (V,), nats."""
    rows = [
        fit(Row((*prompt_ids(member, prompt), *ids), (0,)), member.max_length)
        for prompt, ids in zip(prompts, written, strict=True)
    ]
    found = member.per_token_logps(group_rows(rows, [()] * len(rows)), token_budget=token_budget, reduce=_all_logps)
    return [logps[0] for logps in found]


def _all_logps(logits: Tensor, targets: Tensor) -> Tensor:  # noqa: ARG001 - all of them, whatever came next
    return logits.float().log_softmax(dim=-1)


def _allowed_ids(pair: Pair) -> Tensor:
    """Tokens that a text is made of: special ones end or open turns, and are no text."""
    tokenizer = pair.strong.encoder.tokenizer
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    size = min(len(tokenizer), pair.strong.lm.num_embeddings)
    if pair.shares_vocabulary:
        size = min(size, pair.weak.lm.num_embeddings)
    return torch.tensor([id for id in range(size) if id not in special])
