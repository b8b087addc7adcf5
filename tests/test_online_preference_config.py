"""What OnlinePreferenceConfig fills in, and what it refuses."""

import dataclasses

import pytest
import yaml
from trl import GRPOConfig, ModelConfig, ScriptArguments, TrlParser

from trl_cdr import CDRConfig, ConfigError, OnlinePreferenceConfig
from trl_cdr.training.online_preference_config import _GRPO_LOSS

pytestmark = [
    pytest.mark.compat,
    # TRL's configs set gradient_checkpointing, which transformers 5 renamed; drop when TRL follows
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is deprecated:FutureWarning"),
]


def config(**options):
    return OnlinePreferenceConfig("out", use_cpu=True, bf16=False, report_to="none", **options)


@pytest.mark.parametrize(
    ("given", "preference_beta", "gamma", "beta"),
    [
        ({}, 2.0, 1.0, 0.0),
        ({"preference_beta": 2.5}, 2.5, 1.25, 0.0),
        ({"preference_beta": 2.5, "gamma_beta_ratio": 0.3}, 2.5, 0.75, 0.0),
        ({"gamma": 0}, 2.0, 0, 0.0),
        ({"gamma": 0.5, "gamma_beta_ratio": 0.25}, 2.0, 0.5, 0.0),
        ({"preference_loss": "dpo"}, 0.1, None, 0.1),
        ({"preference_loss": "ipo", "preference_beta": 1}, 1, None, 1),
    ],
)
def test_what_is_filled_in(given, preference_beta, gamma, beta):
    made = config(**given)
    assert (made.preference_beta, made.gamma, made.beta) == (preference_beta, gamma, beta)
    again = dataclasses.replace(made, seed=1, generation_batch_size=None)  # what it filled in is what it takes
    assert (again.preference_beta, again.gamma, again.beta) == (preference_beta, gamma, beta)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"preference_loss": "orpo"}, "preference_loss is 'orpo'. Use one of: simpo, dpo, ipo"),
        ({"pair_strategy": "worst"}, "pair_strategy is 'worst'. Use one of: best_worst, best_random"),
        ({"preference_beta": 0}, "preference_beta is 0. Use a number above 0"),
        ({"preference_beta": -1.0, "preference_loss": "dpo"}, "preference_beta is -1.0"),
        ({"preference_beta": "2"}, "preference_beta is '2'"),
        ({"gamma": -0.5}, "gamma is -0.5. Use a number of 0 or more"),
        ({"gamma_beta_ratio": float("nan")}, "gamma_beta_ratio is nan"),
        ({"gamma": 1.0, "gamma_beta_ratio": 0.3}, "gamma is 1.0, and gamma_beta_ratio 0.3 makes it 0.6"),
        ({"gamma": 1.0, "preference_loss": "dpo"}, "gamma is 1.0, and dpo has no margin"),
        ({"label_smoothing": 0.5}, "label_smoothing is 0.5. Use a number from 0 to below 0.5"),
        ({"label_smoothing": 0.1, "preference_loss": "ipo"}, "label_smoothing is 0.1, and ipo has none"),
        ({"sft_coef": -1}, "sft_coef is -1"),
        ({"min_margin": -1}, "min_margin is -1"),
        ({"beta": 0.1}, "beta is 0.1: it belongs to GRPO's loss. Leave it out; pass preference_beta"),
        ({"beta": 0.0, "preference_loss": "dpo"}, "beta is 0.0"),
        ({"num_iterations": 2}, "num_iterations is 2: it belongs to GRPO's loss, which this trainer does not compute"),
        ({"loss_type": "grpo"}, "loss_type is 'grpo'"),
        ({"vllm_importance_sampling_correction": True}, "vllm_importance_sampling_correction is True"),
        ({"num_generations": 1}, "num_generations is 1: a pair needs two completions. Use 2 or more"),
        ({"num_generations_eval": 0}, "num_generations_eval is 0: it counts completions. Use 1 or more"),
        ({"scale_rewards": "batch"}, "scale_rewards is 'batch': it belongs to GRPO's loss"),
        ({"scale_rewards": False}, "scale_rewards is False: it belongs to GRPO's loss"),
        (
            {"num_generations": 4, "per_device_train_batch_size": 6, "gradient_accumulation_steps": 2},
            "per_device_train_batch_size is 6, and a group has 4 completions: it counts completions, and no group may "
            "be split. Pass 4 or 8, or another multiple of 4",
        ),
        ({"num_generations": 8, "per_device_train_batch_size": 6}, "Pass 8, or another multiple of 8"),
        (
            {"steps_per_generation": 4, "gradient_accumulation_steps": 2},
            "steps_per_generation is 4 and gradient_accumulation_steps 2: some updates would learn from completions of "
            "a policy before the last update",
        ),
        ({"steps_per_generation": 2, "gradient_accumulation_steps": 3}, "Leave it out, or pass a divisor of 3"),
        ({"generation_batch_size": 16}, "steps_per_generation is 2 and gradient_accumulation_steps 1"),
        (
            {"num_generations_eval": 3, "eval_strategy": "steps", "eval_steps": 1},
            "per_device_eval_batch_size is 8, and a group has 3 completions",
        ),
    ],
)
def test_what_is_refused(given, message):
    with pytest.raises(ConfigError) as error:
        config(**given)
    assert message in str(error.value)


@pytest.mark.parametrize("value", [True, "group"])
def test_grpos_default_scale_is_taken(value):
    assert config(scale_rewards=value).scale_rewards == "group"


def test_generations_that_are_used_up_by_one_update_are_taken():
    made = config(steps_per_generation=2, gradient_accumulation_steps=4)
    assert made.steps_per_generation == 2
    assert config(gradient_accumulation_steps=3).steps_per_generation == 3


BEST = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (None, None)),
        (BEST, ("eval_reward", True)),
        ({**BEST, "load_best_model_at_end": False, "save_strategy": "best"}, ("eval_reward", True)),
        ({**BEST, "metric_for_best_model": "loss"}, ("loss", False)),
        ({**BEST, "metric_for_best_model": "eval_pairs/used"}, ("eval_pairs/used", True)),
        ({**BEST, "greater_is_better": False}, ("loss", False)),
        ({**BEST, "lr_scheduler_type": "reduce_lr_on_plateau"}, ("loss", False)),
    ],
)
def test_what_the_best_checkpoint_is_best_at(given, expected):
    made = config(**given)
    assert (made.metric_for_best_model, made.greater_is_better) == expected


def test_every_field_of_grpos_loss_that_this_trl_has_is_known():
    """A field that is neither refused nor read by what is inherited would be silently without effect."""
    names = {field.name for field in dataclasses.fields(GRPOConfig)} - {"adam_epsilon", "router_aux_loss_coef"}
    words = ("epsilon", "vespo", "sapo", "entropy", "importance_sampling", "aux_loss", "off_policy")
    assert {name for name in names if any(word in name for word in words)} <= _GRPO_LOSS


def test_yaml_and_command_line(tmp_path):
    path = tmp_path / "run.yaml"
    given = {"preference_loss": "dpo", "preference_beta": 0.5, "output_dir": "out", "use_cpu": True, "bf16": False}
    path.write_text(yaml.safe_dump(given | {"cdr_strong": "a", "cdr_weak": "b"}))
    parser = TrlParser((ScriptArguments, OnlinePreferenceConfig, ModelConfig, CDRConfig))
    arguments = ["--config", str(path), "--pair_strategy", "best_random", "--min_margin", "0.5"]
    _, parsed, _, _ = parser.parse_args_and_config(arguments)
    assert (parsed.preference_loss, parsed.preference_beta, parsed.beta) == ("dpo", 0.5, 0.5)
    assert (parsed.pair_strategy, parsed.min_margin) == ("best_random", 0.5)
