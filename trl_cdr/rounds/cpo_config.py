"""TRL's `CPOConfig` with SimPO as its default. A module of its own: importing it imports `trl.experimental`."""

from dataclasses import dataclass, field

from trl.experimental.cpo import CPOConfig

from .rounds_arguments import OfARound


@dataclass
class RoundCPOConfig(OfARound, CPOConfig):  # type: ignore[misc]
    """
    `CPOConfig` for the training of a round.

    Differs: TRL's `beta` of 0.1 and `simpo_gamma` of 0.5 ask for a margin of 5 nats a token, which is no SimPO; these
    are `OnlinePreferenceConfig`'s, from where SimPO's authors start.
    """

    loss_type: str = field(default="simpo", metadata=CPOConfig.__dataclass_fields__["loss_type"].metadata)
    cpo_alpha: float = field(default=0.0, metadata={"help": "Weight of the likelihood of the chosen, beside the loss."})
    beta: float = field(default=2.0, metadata={"help": "Scale of the loss: simpo's own is 2.0 to 2.5."})
    simpo_gamma: float = field(
        default=1.0, metadata={"help": "SimPO's margin, absolute (beta times gamma_beta_ratio)."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "CPOTrainer wants it false, and has a warning for whoever does not say so."}
    )
