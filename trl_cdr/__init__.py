"""Preference labels inside the TRL training step, from the log-density ratio of two open models.

    r(x, y) = log p_strong(y | c, x) - log p_weak(y | c, x)        (nats)

The data's way through the package:

    prompts, completions, completion_ids
        |
        v
    training.reward     CDRReward: TRL's reward-function contract        (thin)
        |               beside it: judge (TRL's judge protocol), callback (metrics), provenance (what labelled),
        |               monitor, gaming_watch and audit (does the policy game it?),
        |               checks (before the first step), environment (options from variables), train (a whole run),
        |               online_preference_trainer (SimPO and DPO on the best and worst of N; selection, losses)
        |
        v
    scoring.scorer      DensityRatioScorer.score -> list[Score]          (the one entrance)
        |-- conditioning.router     prompt -> domain
        |-- conditioning.criteria   prompt -> prompt behind the domain's criteria and exemplars
        |-- scoring.encoding    text or ids -> token ids; owns the prompt/completion boundary and the end of turn
        |-- scoring.packing     rows -> packs, in which no token is run twice
        |-- scoring.causal_lm   one frozen model: rows -> per-token log-probs
        |     |-- scoring.forward   packed, padded or row by row
        |     '-- scoring.logps     hidden states + head -> log-probs, in chunks; no [B, T, V] tensor
        '-- scoring.ratio       two models' log-probs -> log-ratio, reduced

Importing `trl_cdr` loads neither torch nor trl: the public names are fetched when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .conditioning.criteria import Criteria as Criteria
    from .conditioning.criteria import DomainCriteria as DomainCriteria
    from .conditioning.criteria import Exemplar as Exemplar
    from .config import CDRConfig as CDRConfig
    from .errors import CDRError as CDRError
    from .errors import ConfigError as ConfigError
    from .errors import InputError as InputError
    from .errors import ModelError as ModelError
    from .errors import UnscorableError as UnscorableError
    from .scoring.score import Score as Score
    from .scoring.scorer import DensityRatioScorer as DensityRatioScorer
    from .training.callback import CDRCallback as CDRCallback
    from .training.environment import cdr_reward as cdr_reward
    from .training.judge import CDRJudge as CDRJudge
    from .training.online_preference_config import OnlinePreferenceConfig as OnlinePreferenceConfig
    from .training.online_preference_trainer import OnlinePreferenceTrainer as OnlinePreferenceTrainer
    from .training.reward import CDRReward as CDRReward

__version__ = "0.1.0.dev0"

_HOMES = {
    "CDRCallback": "training.callback",
    "CDRConfig": "config",
    "CDRJudge": "training.judge",
    "CDRReward": "training.reward",
    "Criteria": "conditioning.criteria",
    "DomainCriteria": "conditioning.criteria",
    "Exemplar": "conditioning.criteria",
    "DensityRatioScorer": "scoring.scorer",
    "OnlinePreferenceConfig": "training.online_preference_config",
    "OnlinePreferenceTrainer": "training.online_preference_trainer",
    "Score": "scoring.score",
    "CDRError": "errors",
    "ConfigError": "errors",
    "InputError": "errors",
    "ModelError": "errors",
    "UnscorableError": "errors",
    "cdr_reward": "training.environment",
}

__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
