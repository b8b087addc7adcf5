"""TRL's `DPOConfig` for the training of a round."""

from dataclasses import dataclass

from trl import DPOConfig

from .rounds_arguments import OfARound


@dataclass
class RoundDPOConfig(OfARound, DPOConfig):  # type: ignore[misc]
    """`DPOConfig` with a round's defaults. The reference is TRL's: the policy as the round found it."""
