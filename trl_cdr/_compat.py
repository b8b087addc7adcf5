"""What differs between supported versions of TRL and transformers. No other module asks which is installed."""

from typing import Any


def trust_remote_code(*configs: Any) -> bool:
    """Whether the policy may bring code of its own: TRL moved the field from ModelConfig to the trainers' configs."""
    return any(getattr(config, "trust_remote_code", False) for config in configs)


def end_training(trainer: Any) -> None:
    """Close trackers and the process group, after the last call that needs them. Nothing in transformers < 5.18."""
    end = getattr(trainer, "end", None)
    if end is not None:
        end()
