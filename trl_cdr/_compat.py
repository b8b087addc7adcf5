"""The one place that asks which TRL is installed, and what its objects are called there. Importing it is cheap."""

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from packaging.version import Version

from . import __version__

_PACKAGES = ("trl", "transformers", "torch", "accelerate", "datasets", "tokenizers", "peft", "vllm")


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


def trust_remote_code(*configs: Any) -> bool:
    """Whether the policy may bring code of its own: TRL moved the field from ModelConfig to the trainers' configs."""
    return any(getattr(config, "trust_remote_code", False) for config in configs)


def end_training(trainer: Any) -> None:
    """Close trackers and the process group, after the last call that needs them. Nothing in transformers < 5.18."""
    end = getattr(trainer, "end", None)
    if end is not None:
        end()


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
