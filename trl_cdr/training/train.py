"""Parsed arguments -> a run of one of TRL's trainers, or of ours, on CDR labels, as TRL's own scripts make one.

`cli` parses, `reward_functions` label, `prompts` loads the data set, the trainer trains, `summary` says what came of
it. Nothing of the method is here.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, get_args

from accelerate import PartialState
from transformers import AutoTokenizer
from trl import ModelConfig, ScriptArguments, get_peft_config, get_quantization_config

from .._compat import end_training, trust_remote_code
from ..config import CDRConfig
from ..errors import CDRError, ConfigError
from ..scoring.checkpoint import read_config, weights_mb
from ..scoring.loading import hub_kwargs
from ..scoring.pair_loading import load_tokenizer
from ..scoring.sources import find_sources
from ..scoring.together import load_together
from .callback import CDRCallback
from .checks import check_domains
from .prompts import load_prompts
from .reward import CDRReward
from .reward_functions import make_rewards
from .summary import print_summary

TrainerName = Literal["grpo", "rloo", "online_dpo", "online_preference"]
_HOMES = {
    "grpo": ("trl", "GRPO"),
    "rloo": ("trl", "RLOO"),
    "online_dpo": ("trl.experimental.online_dpo", "OnlineDPO"),
    "online_preference": ("trl_cdr", "OnlinePreference"),
}


@dataclass
class TrainArguments:
    """
    Which trainer runs, one of TRL's or `OnlinePreferenceTrainer`, and on which rewards. The trainer's config reads all
    other arguments, so that this one is read first.

    Raises:
        ConfigError: there is no such trainer, or the objectives are no list of mappings.
    """

    trainer: TrainerName = field(
        default="grpo", metadata={"help": "The trainer. Its config's fields are arguments of this command."}
    )

    cdr_objectives: list[dict[str, Any]] | str | None = field(
        default=None,
        metadata={
            "help": "Several rewards on the one pair: a list (or JSON) of mappings, each with a name and the options "
            "below, without cdr_, in which it differs, such as criteria and domain."
        },
    )
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Reward functions beside the pair: dotted paths, or names in trl.rewards such as "
            "think_format_reward. reward_weights weighs the pair's (each objective's) first, then these."
        },
    )

    def __post_init__(self) -> None:
        if isinstance(self.reward_funcs, str):  # YAML has one word where the command line has a list
            self.reward_funcs = [self.reward_funcs]
        if isinstance(self.cdr_objectives, str):
            try:
                self.cdr_objectives = json.loads(self.cdr_objectives)
            except json.JSONDecodeError as error:
                raise ConfigError(
                    f"cdr_objectives is {self.cdr_objectives!r}, which is no JSON ({error}). Write a list of objects."
                ) from None
        for name, kind, wanted in (("cdr_objectives", Mapping, "mappings"), ("reward_funcs", str, "names")):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, list) and all(isinstance(each, kind) for each in value)):
                raise ConfigError(f"{name} is {value!r}. Give a list of {wanted}.")
        if self.trainer not in get_args(TrainerName):
            raise ConfigError(f"trainer is {self.trainer!r}. Use one of: {', '.join(get_args(TrainerName))}.")

    @property
    def config_class(self) -> type:
        """The config's class, such as `GRPOConfig`."""
        return self._load("Config")

    @property
    def trainer_class(self) -> type:
        """The trainer's class, such as `GRPOTrainer`."""
        return self._load("Trainer")

    def _load(self, kind: str) -> type:
        module, stem = _HOMES[self.trainer]
        return getattr(import_module(module), stem + kind)  # type: ignore[no-any-return]


def train(
    arguments: TrainArguments,
    *,
    script_args: ScriptArguments,
    training_args: Any,
    model_args: ModelConfig,
    cdr_args: CDRConfig,
) -> None:
    """
    Train a policy on the log-ratio of the pair; save it, and push it where `push_to_hub` asks for it.

    With a [`CDRCallback`] for each objective: its metrics are logged, and every checkpoint says what labelled. What can
    be wrong is looked at in the order of what it costs: arguments, the configs and tokenizers of pair and policy, the
    data set, the pair's weights, the policy's.

    Args:
        arguments (`TrainArguments`): The trainer, and the rewards beside the pair's.
        script_args (`ScriptArguments`): The data set and its splits; the second is read when `eval_strategy` asks.
        training_args (`TrainingArguments`): An `arguments.config_class`. `resume_from_checkpoint` is a folder, or true
            for the last one in `output_dir`, if there is one. What `model_init_kwargs` says goes before `model_args`.
        model_args (`ModelConfig`): The policy, its adapters and its quantisation.
        cdr_args (`CDRConfig`): The pair and its options.

    Raises:
        ConfigError: an argument is missing, or does not fit the trainer.
        InputError: the data set can't be read, or has no prompts, or not the column that the router reads.
        ModelError: pair or policy can't serve; raised before the first step.
    """
    if not model_args.model_name_or_path:
        raise ConfigError("model_name_or_path is missing: the policy to train. Pass a name on the Hub or a path.")
    is_evaluated = training_args.eval_strategy != "no"
    if is_evaluated and arguments.trainer == "online_dpo":
        raise ConfigError(
            f"eval_strategy is {str(training_args.eval_strategy.value)!r}, and TRL's OnlineDPOTrainer can't evaluate. "
            "Leave it out, or pass trainer=grpo, rloo or online_preference."
        )
    if script_args.dataset_streaming and arguments.trainer == "online_dpo":
        raise ConfigError(
            "dataset_streaming is set, and TRL's OnlineDPOTrainer can't train on a stream. Leave it out, or pass "
            "trainer=grpo, rloo or online_preference."
        )
    if cdr_args.cdr_share_policy and not model_args.use_peft:
        raise ConfigError(
            "cdr_share_policy is set and use_peft is not: the pair stands on the policy's base, which has to stay as "
            "it is. Pass use_peft: true, or leave out cdr_share_policy."
        )
    checkpoint = find_checkpoint(training_args)
    rewards = make_rewards(
        cdr_args,
        training_args,
        objectives=arguments.cdr_objectives or (),  # type: ignore[arg-type]
        names=arguments.reward_funcs or (),
    )
    objectives = [reward for reward in rewards if isinstance(reward, CDRReward)]
    policy = str(model_args.model_name_or_path)
    training_args.model_init_kwargs = policy_init_kwargs(training_args, model_args)
    if arguments.trainer == "online_dpo":  # it says "auto" also under accelerate launch, which accelerate refuses
        training_args.model_init_kwargs = {"device_map": None} | training_args.model_init_kwargs
    check_models(cdr_args, policy, training_args.model_init_kwargs)
    splits = [script_args.dataset_train_split, *([script_args.dataset_test_split] if is_evaluated else [])]
    with training_args.main_process_first(desc="load the prompts"):
        datasets = load_prompts(script_args, splits=splits)
    places = [f"dataset_name {script_args.dataset_name!r}, split {split!r}," for split in splits]
    for reward in objectives:
        check_domains(reward.scorer.router, dict(zip(places, datasets, strict=True)))

    if not cdr_args.cdr_share_policy:  # else it stands on the policy's base, and CDRCallback loads it
        say(f"loading the pair: strong {_with_size(cdr_args.cdr_strong)}, weak {_with_size(cdr_args.cdr_weak)}")
        load_together(objectives[0].scorer)
    say(f"loading the policy: {_with_size(policy)}")
    trainer = _make_trainer(arguments, training_args, model_args, rewards, datasets)
    for reward in objectives:
        trainer.add_callback(CDRCallback(reward, trainer))
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.save_state()
    if training_args.push_to_hub:
        is_local = Path(script_args.dataset_name).expanduser().exists()
        trainer.push_to_hub(dataset_name=None if is_local else script_args.dataset_name)
    if trainer.accelerator.is_main_process:
        print_summary(trainer, kind=arguments.trainer)
    end_training(trainer)


def find_checkpoint(training_args: Any) -> str | None:
    """
    The folder to resume from. `None` where nothing asks for one, and where the last one is asked for and there is none:
    a job that is started again and again, until it gets through, has none at first. One that was not saved whole (its
    `trainer_state.json` comes last) does not count.

    Raises:
        ConfigError: `resume_from_checkpoint` is a path where no folder is.
    """
    wanted = training_args.resume_from_checkpoint
    spelled = str(wanted).lower()  # the command line has strings only
    if wanted is None or spelled == "false":
        return None
    if spelled != "true":
        if not Path(wanted).is_dir():
            raise ConfigError(f"resume_from_checkpoint is {wanted!r}, and no such folder exists. Pass a checkpoint-N.")
        return str(wanted)
    folder = Path(training_args.output_dir)
    states = filter(_is_whole, folder.glob("checkpoint-*/trainer_state.json"))
    names = [path.parent.name.removeprefix("checkpoint-") for path in states]
    last = max((int(name) for name in names if name.isdigit()), default=None)
    if last is None:
        say(f"no checkpoint in {folder}: starting anew")
        return None
    say(f"resuming from {folder / f'checkpoint-{last}'}")
    return str(folder / f"checkpoint-{last}")


def _is_whole(state: Path) -> bool:
    """Whether a checkpoint's `trainer_state.json` was written to its end."""
    try:
        json.loads(state.read_bytes())
    except (OSError, ValueError):
        return False
    return True


def check_models(cdr_args: CDRConfig, policy: str, policy_init_kwargs: Mapping[str, Any]) -> None:
    """
    Whether models and tokenizers can be found at all, before anything large is loaded.

    Args:
        cdr_args (`CDRConfig`): The pair.
        policy (`str`): Name on the Hub or path.
        policy_init_kwargs (`Mapping`): `from_pretrained`'s.

    Raises:
        ModelError: one of them can't be read.
    """
    init_kwargs: Any = cdr_args.cdr_model_init_kwargs
    for role, source in find_sources(cdr_args).items():
        read_config(source.name, f"cdr_{role}", revision=source.revision, init_kwargs=init_kwargs)
        name, revision = source.tokenizer
        load_tokenizer(cdr_args, name, f"the tokenizer of cdr_{role}", revision=revision)
    read_config(policy, "model_name_or_path", init_kwargs=policy_init_kwargs)


def say(text: str) -> None:
    """A line on the main process's stderr."""
    if PartialState().is_main_process:
        print(text, file=sys.stderr, flush=True)


def _with_size(name: str) -> str:
    size = weights_mb(name)
    return name if size is None else f"{name} ({size:,.1f} MB)"


def _make_trainer(
    arguments: TrainArguments, training_args: Any, model_args: ModelConfig, rewards: list[Any], datasets: list[Any]
) -> Any:
    """The trainer with its policy. `datasets`: to train on, and maybe to evaluate on."""
    try:
        return arguments.trainer_class(
            model=model_args.model_name_or_path,
            reward_funcs=[_for_trainer(reward, arguments) for reward in rewards],
            args=training_args,
            train_dataset=datasets[0],
            eval_dataset=datasets[1] if len(datasets) > 1 else None,
            processing_class=_load_tokenizer(arguments, str(model_args.model_name_or_path), training_args),
            peft_config=get_peft_config(model_args),
        )
    except CDRError:
        raise
    except (ImportError, NotImplementedError, OSError, ValueError) as error:  # as TRL and transformers refuse arguments
        raise ConfigError(f"trainer {arguments.trainer} can't be made: {' '.join(str(error).split())}") from error


def _for_trainer(reward: Any, arguments: TrainArguments) -> Any:
    """A reward that waits for servers is awaited, where the trainer awaits any: others may be, meanwhile."""
    is_awaited = isinstance(reward, CDRReward) and reward.config.served and arguments.trainer != "online_dpo"
    return reward.awaitable if is_awaited else reward


def policy_init_kwargs(training_args: Any, model_args: ModelConfig) -> dict[str, Any]:
    """
    `from_pretrained`'s for the policy; what the trainer's own `model_init_kwargs` say goes before `model_args`.

    Args:
        training_args (`TrainingArguments`): The trainer's.
        model_args (`ModelConfig`): Revision, type, attention and quantisation.
    """
    kwargs = {
        "revision": model_args.model_revision,
        "trust_remote_code": trust_remote_code(training_args, model_args),
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    }
    quantization = get_quantization_config(model_args)
    if quantization is not None:  # None is not the same as nothing
        kwargs["quantization_config"] = quantization
    return kwargs | (training_args.model_init_kwargs or {})


def _load_tokenizer(arguments: TrainArguments, policy: str, training_args: Any) -> Any:
    """The policy's tokenizer for online DPO, which wants one; the other trainers load it themselves."""
    if arguments.trainer != "online_dpo":
        return None
    return AutoTokenizer.from_pretrained(policy, **hub_kwargs(training_args.model_init_kwargs))
