"""The naive way to a score: one row at a time, the model's own full logits, log_softmax, sums in float64."""

import math
from itertools import accumulate

import torch


def completion_logps(model, prompt_ids, completion_ids) -> torch.Tensor:
    """Log-probability of each completion token (T,), float64 nats."""
    ids = torch.tensor([[*prompt_ids, *completion_ids]], device=model.device)
    with torch.no_grad():
        logps = model(input_ids=ids).logits[0].double().log_softmax(-1)  # (T, V)
    return torch.stack([logps[len(prompt_ids) + i - 1, token] for i, token in enumerate(completion_ids)]).cpu()


def assert_naive(model, rows, results, atol=1e-4):
    """Each row's log-probabilities are the oracle's."""
    for row, logps in zip(rows, results, strict=True):
        expected = completion_logps(model, row.prompt_ids, row.completion_ids)
        torch.testing.assert_close(logps.double(), expected, rtol=0, atol=atol)


def typicality(model, prompt_ids, completion_ids) -> float:
    """Surplus of the log-probabilities over their means, per standard deviation, float64."""
    ids = torch.tensor([[*prompt_ids, *completion_ids]], device=model.device)
    with torch.no_grad():
        logps = model(input_ids=ids).logits[0].double().log_softmax(-1)  # (T, V)
    surplus = spread = 0.0
    for place, token in enumerate(completion_ids, start=len(prompt_ids) - 1):
        mean = float((logps[place].exp() * logps[place]).sum())
        surplus += float(logps[place, token]) - mean
        spread += float((logps[place].exp() * (logps[place] - mean).square()).sum().sqrt())
    return surplus / spread


def next_logps(model, ids) -> torch.Tensor:
    """What the model says of each next token: (B, T) ids -> (B, T, V), float64 nats."""
    with torch.no_grad():
        return model(input_ids=ids).logits.double().log_softmax(-1)


def surprise_terms(logps, targets, end_ids) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of (N, V) log-probabilities in float64: each target's, twice its log-ratio at temperature 2, -log(1 - p_end)."""
    own = logps[torch.arange(len(targets)), targets]
    hot = (logps / 2).log_softmax(-1)[torch.arange(len(targets)), targets]
    others = [id for id in range(logps.shape[1]) if id not in end_ids]
    return own, 2 * (hot - own), -logps[:, others].logsumexp(-1).clamp(min=-24 * math.log(2))


def worst_window(terms) -> float:
    """The largest sum of any window, the empty one included."""
    spans = [(start, stop) for start in range(len(terms)) for stop in range(start + 1, len(terms) + 1)]
    return max([0.0, *(sum(terms[start:stop]) for start, stop in spans)])


def surprise(model, prompt_ids, completion_ids, end_ids, *, finished) -> tuple[float, float]:
    """C and S of one row."""
    ids = torch.tensor([[*prompt_ids, *completion_ids]], device=model.device)
    logps = next_logps(model, ids)[0, len(prompt_ids) - 1 : -1]
    _, terms, ends = surprise_terms(logps, torch.tensor(completion_ids), end_ids)
    return worst_window(terms.tolist()), float(ends[: len(ends) - bool(finished)].sum())


def split_text(tokenizer, rendered: str, completion: str, end: str) -> tuple[list[int], list[int]]:
    """
    Prompt and completion ids of a text: a token is the prompt's if it ends before the completion starts.

    For byte-level tokenizers only, which spell each byte as one character.
    """
    ids = tokenizer(rendered + completion + end, add_special_tokens=False).input_ids
    ends = accumulate(len(token) for token in tokenizer.convert_ids_to_tokens(ids))
    split = sum(end <= len(rendered.encode()) for end in ends)
    return ids[:split], ids[split:]


def render(tokenizer, prompt, **kwargs) -> str:
    if isinstance(prompt, str):
        return prompt
    if prompt[-1]["role"] == "assistant":
        return tokenizer.apply_chat_template(prompt, tokenize=False, continue_final_message=True, **kwargs)
    return tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True, **kwargs)
