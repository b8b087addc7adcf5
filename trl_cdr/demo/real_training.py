"""Online training of the real policy, judged by gold meanwhile and on held-out topics at the end.

The policy is the model itself in bfloat16 with a LoRA adapter; `real` says which rewards and loops are compared.
"""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback

from ..training.online_preference_config import OnlinePreferenceConfig
from ..training.online_preference_trainer import OnlinePreferenceTrainer
from . import real_world
from .models import progress
from .real_models import end_ids, load_policy, load_tokenizer, make_lora, sample
from .story import TINY_RUN, Reward, quiet_trl

_OPTIONS: dict[str, dict[str, Any]] = {
    "online_dpo": {"max_steps": 30, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "beta": 0.1},
    "online_preference": {
        "max_steps": 20,
        "per_device_train_batch_size": 32,
        "num_generations": 4,
        "learning_rate": 1e-3,
    },
}
LOOPS = tuple(_OPTIONS)
"""TRL's online DPO on 8 prompts x 2 completions a step, and ours (SimPO) on 8 x 4."""


class Watched:
    """
    A reward function that keeps what gold says of every completion, step by step, and hands the reward on.

    Args:
        reward (`Reward` or `None`): The reward; `None` is gold itself.
        end_ids (`list[int]`): Where the policy ends: a completion without one of them was cut off.
        advance (`Callable`): Called after each call.
    """

    def __init__(self, reward: Reward | None, *, end_ids: list[int], advance: Callable[[], None]) -> None:
        self.__name__ = "watched"
        self.curve: dict[str, list[float]] = {name: [] for name in ("gold", "tokens", "repeats", "finished", "reward")}
        self._reward = reward
        self._ends = frozenset(end_ids)
        self._advance = advance

    def __call__(
        self, prompts: list[Any], completions: list[Any], completion_ids: list[list[int]], **kwargs: Any
    ) -> list[float | None]:
        texts = [completion[-1]["content"] for completion in completions]
        # Up to the end token: online DPO's ids are padded.
        lengths = [next((n for n, one in enumerate(ids, 1) if one in self._ends), len(ids)) for ids in completion_ids]
        ended = [bool(self._ends.intersection(ids)) for ids in completion_ids]
        golds = [real_world.gold_of_prompt(*row) for row in zip(prompts, texts, ended, strict=True)]
        rewards: list[float | None] = [*golds]
        if self._reward is not None:
            columns = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids}
            rewards = [*self._reward(**columns, **kwargs)]
        seen: dict[str, list[float]] = {
            "gold": golds,
            "tokens": [*lengths],
            "repeats": [real_world.repeats(text) for text in texts],
            "finished": [*ended],
            "reward": [reward for reward in rewards if reward is not None],
        }
        for name, values in seen.items():
            self.curve[name].append(sum(values) / max(1, len(values)))
        self._advance()
        return rewards


def train_policy(
    model: str | Path, reward: Reward | None, *, loop: str, seed: int, name: str, **options: Any
) -> dict[str, Any]:
    """
    Train a LoRA adapter of the model on a reward.

    Args:
        model (`str` or `Path`): The policy.
        reward (`Reward` or `None`): A reward function; `None` is gold itself.
        loop (`str`): One of `LOOPS`.
        seed (`int`): The trainer's.
        name (`str`): What the progress bar says.
        **options: Others of the trainer's arguments, in place of the workload's.

    Returns:
        `dict`: `curve` (a list by step of what `Watched` keeps, of the completions that are trained on) and
        `held_out`, see `evaluate`.
    """
    tokenizer = load_tokenizer(model)
    with quiet_trl(), tempfile.TemporaryDirectory() as scratch, progress() as bars:
        from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer  # warns: not at the top

        trainer, config = {
            "online_dpo": (OnlineDPOTrainer, OnlineDPOConfig),
            "online_preference": (OnlinePreferenceTrainer, OnlinePreferenceConfig),
        }[loop]
        length = "max_new_tokens" if loop == "online_dpo" else "max_completion_length"
        options = {**_OPTIONS[loop], **options}
        bar = bars.add_task(name, total=options["max_steps"])
        policy = load_policy(model)
        # The head gets a view: torch would multiply it sequence by sequence, each with a copy of the frozen weights.
        policy.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
        watched = Watched(reward, end_ids=end_ids(policy, tokenizer), advance=lambda: bars.advance(bar))
        run = trainer(
            model=policy,
            reward_funcs=watched,
            args=config(
                output_dir=scratch,
                seed=seed,
                temperature=1.0,
                **TINY_RUN,
                **{length: real_world.MAX_NEW_TOKENS},
                **options,
            ),
            train_dataset=Dataset.from_list([{"prompt": task.prompt} for task in real_world.TRAIN]),
            processing_class=tokenizer,
            peft_config=make_lora(),
        )
        run.remove_callback(PrinterCallback)
        run.train()
    return {"curve": watched.curve, "held_out": evaluate(run.model, tokenizer, seed=seed)}


def evaluate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> dict[str, dict[str, float]]:
    """Means over one completion to each held-out task, of `seen` and `unseen` kinds."""
    found = {}
    for name, tasks in {"seen": real_world.HELD_OUT, "unseen": real_world.HELD_OUT_UNSEEN}.items():
        groups = sample(
            model, tokenizer, [task.prompt for task in tasks], per_prompt=1, seed=seed, label=f"judging, {name}"
        )
        rows = [(task, group[0]) for task, group in zip(tasks, groups, strict=True)]
        found[name] = {
            "gold": sum(real_world.gold(task, one.text, one.finished) for task, one in rows) / len(rows),
            "words": sum(len(one.text.split()) for _, one in rows) / len(rows),
            "repeats": sum(real_world.repeats(one.text) for _, one in rows) / len(rows),
            "finished": sum(one.finished for _, one in rows) / len(rows),
        }
    return found


def evaluate_start(model: str | Path, *, seeds: Sequence[int]) -> dict[str, Any]:
    """The policy before training: `held_out`, a list by seed of `evaluate`."""
    policy, tokenizer = load_policy(model), load_tokenizer(model)
    return {"held_out": [evaluate(policy, tokenizer, seed=seed) for seed in seeds]}
