"""What `rounds` takes over from `annotate` and from TRL's configs, and what it does not."""

import pickle
from dataclasses import fields

import pytest
from tiny import TRAINING

from trl_cdr import ConfigError
from trl_cdr.annotation.annotate import AnnotateArguments
from trl_cdr.cli import _OFTEN_ROUNDS
from trl_cdr.rounds.rounds_arguments import (
    ELSEWHERE,
    PairsArguments,
    RoundsArguments,
    arguments_of_a_round,
    known_losses,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing. is deprecated:FutureWarning"
)  # see test_train


def names(kind):
    return {each.name for each in fields(kind) if each.init}


@pytest.mark.compat
def test_configs_are_trl_s_but_for_a_round():
    cpo, dpo = (RoundsArguments(trainer=name) for name in ("cpo", "dpo"))
    for one in (cpo, dpo):
        args = one.config_class(**TRAINING)
        assert (args.output_dir, args.num_train_epochs, args.push_to_hub) == ("./trl-cdr-rounds", 1.0, False)
        assert one.config_class.__name__ == f"Round{one.trainer_class.__name__.replace('Trainer', 'Config')}"
        assert pickle.loads(pickle.dumps(args)).learning_rate == 1e-6  # as a trainer saves it
        assert not names(one.config_class) & (names(PairsArguments) | names(RoundsArguments))
    args = cpo.config_class(**TRAINING)
    assert (args.loss_type, args.cpo_alpha, args.beta, args.simpo_gamma) == ("simpo", 0.0, 2.0, 1.0)
    assert set(_OFTEN_ROUNDS) <= names(cpo.config_class) | names(dpo.config_class)


@pytest.mark.compat
def test_losses_of_the_installed_version():
    assert known_losses(RoundsArguments().config_class(**TRAINING)) == ["sigmoid", "hinge", "ipo", "simpo", "alphapo"]
    found = known_losses(RoundsArguments(trainer="dpo").config_class(**TRAINING))
    assert {"sigmoid", "ipo", "discopop", "sft"} <= set(found)
    assert "simpo" not in found


def test_a_round_s_own_arguments():
    own = {"output_dir": "o", "policy": "p", "policy_revision": None, "seed": 3}
    found = arguments_of_a_round(PairsArguments("a", num_generations=5, split="test"), **own)
    assert found == AnnotateArguments("a", num_generations=5, split="test", **own)
    missing = names(AnnotateArguments) - names(PairsArguments) - {"output_dir", "seed"}  # which are the trainer's
    assert missing <= set(ELSEWHERE)


def test_arguments_are_checked():
    with pytest.raises(ConfigError, match="num_rounds is 2.5: it counts rounds"):
        RoundsArguments(num_rounds=2.5)
    with pytest.raises(ConfigError, match="max_completion_length is 0"):
        PairsArguments("a", max_completion_length=0)
