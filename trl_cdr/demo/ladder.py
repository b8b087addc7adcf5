"""A ladder of the tiny world's models, and pairs that gold has labelled: what `trl-cdr rank-pairs` is shown on.

`models` trains the ladder; `examples/08_rank_pairs.py` ranks its pairs.
"""

import json
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from . import models, world
from .story import SEED, sample_pairs


def measure_gold(checkpoint: Path, *, per_prompt: int = 4) -> float:
    """
    What a model can do: the mean gold reward of what it writes to the held-out prompts.

    Args:
        checkpoint (`Path`): The model.
        per_prompt (`int`, *optional*, defaults to 4): Samples.
    """
    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    prompts = [world.conversation(task) for task in world.HELD_OUT]
    groups = models.sample(model, tokenizer, prompts=prompts, per_prompt=per_prompt, seed=SEED)
    golds = [
        world.gold(prompt, one.text, one.finished)
        for prompt, group in zip(prompts, groups, strict=True)
        for one in group
    ]
    return sum(golds) / len(golds)


def write_pairs(policy: Path, path: Path) -> int:
    """
    Write pairs of a right and a wrong completion, both the policy's and finished, as `trl-cdr evaluate` reads them.

    Args:
        policy (`Path`): Who writes the completions to the held-out prompts.
        path (`Path`): A JSONL file.

    Returns:
        `int`: how many there are.
    """
    pairs = [pair for pair in sample_pairs(policy, seed=SEED) if pair.right.finished and pair.wrong.finished]
    rows = [
        {
            "id": f"{pair.domain}/{place}",
            "prompt": pair.prompt,
            "chosen": [{"role": "assistant", "content": pair.right.text}],
            "rejected": [{"role": "assistant", "content": pair.wrong.text}],
            "subset": pair.domain,
            "domain": pair.domain,
            "on_policy": True,
        }
        for place, pair in enumerate(pairs)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return len(rows)
