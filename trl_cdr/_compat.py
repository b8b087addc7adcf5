"""The one place that asks which TRL is installed, and what its objects are called there. Importing it is cheap."""

import inspect
import platform
from collections.abc import Collection
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from packaging.version import Version

from . import __version__
from .errors import ConfigError

_PACKAGES = ("trl", "transformers", "torch", "accelerate", "datasets", "tokenizers", "peft", "vllm")

# What OnlinePreferenceTrainer takes from GRPOTrainer, as TRL 1.0 to 1.16 have it: methods and their arguments, keys
# that a generated batch has, and keys that it may have.
_GRPO_METHODS = {
    "_generate_and_score_completions": ["self", "inputs"],
    "_calculate_rewards": ["self", "inputs", "prompts", "completions", "completion_ids_list"],
    "_log_completion_extra": ["self", "column", "values"],
    "compute_loss": ["self", "model", "inputs", "return_outputs", "num_items_in_batch"],
}
_GRPO_KEYS = {"prompt_ids", "prompt_mask", "completion_ids", "completion_mask"}
_GRPO_OTHER_KEYS = {"advantages", "num_items_in_batch", "old_per_token_logps", "sampling_per_token_logps", "tool_mask"}


def versions() -> dict[str, str | None]:
    """Versions of Python, of this package and of those that matter to it; None where one is not installed."""
    return {"python": platform.python_version(), "trl-cdr": __version__} | {name: _find(name) for name in _PACKAGES}


def is_online_dpo(args: Any) -> bool:
    """Whether training arguments are online DPO's, whose trainer hands a reward no `log_metric`."""
    return any(kind.__name__ == "OnlineDPOConfig" for kind in type(args).__mro__)


def reward_functions(trainer: Any) -> list[Any]:
    """A trainer's reward functions; none without a trainer."""
    functions = getattr(trainer, "reward_funcs", None)
    return list(functions) if isinstance(functions, (list, tuple)) else []


def trainer_behind(log_metric: Any) -> Any:
    """The trainer whose bound method GRPO and RLOO hand to a reward function, the one way to it; else None."""
    owner = getattr(log_metric, "__self__", None)
    return owner if hasattr(owner, "callback_handler") else None


def skips_missing_rewards(trainer: Any) -> bool:
    """
    Whether a completion for which a reward function returns None is left out by the trainer, so far as this reward
    goes. Elsewhere None counts as 0, which often wins against honest negative log-ratios: in online DPO, in GRPO and
    RLOO before TRL 1.6, in later ones beside a second reward function (they leave out only what every function left
    open, and add up the rest), and who knows in trainers that are not TRL's.

    Args:
        trainer: The trainer, or None where it is not known.
    """
    kinds = type(trainer).__mro__
    if any(kind.__name__ == "OnlinePreferenceTrainer" for kind in kinds):
        return True
    method = "_generate_and_score_completions"  # where rewards become advantages
    home = next((kind.__module__ for kind in kinds if method in vars(kind)), None)
    if home not in ("trl.trainer.grpo_trainer", "trl.trainer.rloo_trainer"):
        return False
    if Version(version("trl")).release < (1, 6):
        return False
    # Normalised before they are added, a missing reward is the mean of its group.
    is_neutral = getattr(trainer, "multi_objective_aggregation", None) == "normalize_then_sum"
    return len(reward_functions(trainer)) == 1 or is_neutral


def trust_remote_code(*configs: Any) -> bool:
    """Whether the policy may bring code of its own: TRL moved the field from ModelConfig to the trainers' configs."""
    return any(getattr(config, "trust_remote_code", False) for config in configs)


def end_training(trainer: Any) -> None:
    """Close trackers and the process group, after the last call that needs them. Nothing in transformers < 5.18."""
    end = getattr(trainer, "end", None)
    if end is not None:
        end()


def check_grpo(trainer: type) -> None:
    """
    Whether `GRPOTrainer` has the methods that `OnlinePreferenceTrainer` builds on.

    Args:
        trainer (`type`): `GRPOTrainer`.

    Raises:
        ConfigError: a method is missing or takes other arguments: this TRL is not one that it was tested with.
    """
    for name, expected in _GRPO_METHODS.items():
        method = getattr(trainer, name, None)
        found = None if method is None else list(inspect.signature(method).parameters)
        if found != expected:
            raise _untested(f"{trainer.__name__}.{name} takes {found}, not {expected}")


def check_generated(keys: Collection[str]) -> None:
    """
    Whether a batch that `GRPOTrainer` generated holds what `OnlinePreferenceTrainer` reads, and nothing that it would
    lose.

    Args:
        keys (`Collection[str]`): The batch's.

    Raises:
        ConfigError: a key is missing or unknown.
    """
    missing, unknown = sorted(_GRPO_KEYS - set(keys)), sorted(set(keys) - _GRPO_KEYS - _GRPO_OTHER_KEYS)
    if missing:
        raise _untested(f"a generated batch lacks {', '.join(missing)}")
    if unknown:
        raise _untested(f"a generated batch also holds {', '.join(unknown)}, which are images if the prompts have some")


def _untested(what: str) -> ConfigError:
    return ConfigError(
        f"OnlinePreferenceTrainer was tested with TRL 1.0 to 1.16 on text; in TRL {version('trl')} {what}. Install a "
        "version that it was tested with, or use GRPOTrainer."
    )


def register_pairwise_judge(judge: type) -> None:
    """
    Make a class a subclass of TRL's `BasePairwiseJudge` in the eyes of `isinstance`. Without effect where TRL has no
    judges.

    Args:
        judge (`type`): Has the method `judge` of TRL's protocol.
    """
    # TRL 1.1 removed judges (trl#5485), and looking for them there would load trl.experimental; drop with the floor.
    if Version(version("trl")).release >= (1, 1):
        return
    from trl.experimental.judges import BasePairwiseJudge

    BasePairwiseJudge.register(judge)


def _find(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
