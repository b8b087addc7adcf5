"""The naive way to a score: one row at a time, the model's own full logits, log_softmax, sums in float64."""

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
