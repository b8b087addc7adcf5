"""Parsed arguments -> a run of one of TRL's trainers, or of ours, on CDR labels, as TRL's own scripts make one.

`cli` parses, `prompts` loads the data set, `reward` labels, the trainer trains. Nothing of the method is here.
"""

from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, get_args

from transformers import AutoTokenizer
from transformers.trainer_utils import get_last_checkpoint
from trl import ModelConfig, ScriptArguments, get_peft_config, get_quantization_config

from .._compat import end_training, trust_remote_code
from ..config import CDRConfig
from ..errors import ConfigError
from .callback import CDRCallback
from .prompts import load_prompts
from .reward import CDRReward

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
    Which trainer runs: one of TRL's, or `OnlinePreferenceTrainer`. Its config reads all other arguments, so that this
    one is read first.

    Raises:
        ConfigError: there is no such trainer.
    """

    trainer: TrainerName = field(
        default="grpo", metadata={"help": "The trainer. Its config's fields are arguments of this command."}
    )

    def __post_init__(self) -> None:
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

    With a [`CDRCallback`]: the reward's metrics are logged, and every checkpoint says what labelled.

    Args:
        arguments (`TrainArguments`): The trainer.
        script_args (`ScriptArguments`): The data set and its splits; the second is read when `eval_strategy` asks.
        training_args (`TrainingArguments`): An `arguments.config_class`. `resume_from_checkpoint` is a folder, or true
            for the last one in `output_dir`. What `model_init_kwargs` says goes before `model_args`.
        model_args (`ModelConfig`): The policy, its adapters and its quantisation.
        cdr_args (`CDRConfig`): The pair and its options.

    Raises:
        ConfigError: an argument is missing, or does not fit the trainer.
        InputError: the data set can't be read, or has no prompts.
        ModelError: the pair can't serve; raised before the first step.
    """
    if not model_args.model_name_or_path:
        raise ConfigError("model_name_or_path is missing: the policy to train. Pass a name on the Hub or a path.")
    is_evaluated = training_args.eval_strategy != "no"
    if is_evaluated and arguments.trainer == "online_dpo":
        raise ConfigError(
            f"eval_strategy is {str(training_args.eval_strategy.value)!r}, and TRL's OnlineDPOTrainer can't evaluate. "
            "Leave it out, or pass trainer=grpo, rloo or online_preference."
        )
    checkpoint = _find_checkpoint(training_args)
    reward = make_reward(arguments, training_args=training_args, cdr_args=cdr_args)
    splits = [script_args.dataset_train_split, *([script_args.dataset_test_split] if is_evaluated else [])]
    with training_args.main_process_first(desc="load the prompts"):
        train_dataset, *eval_dataset = load_prompts(script_args, splits=splits)

    training_args.model_init_kwargs = _model_init_kwargs(arguments, training_args, model_args)
    trainer = arguments.trainer_class(
        model=model_args.model_name_or_path,
        reward_funcs=reward,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset[0] if eval_dataset else None,
        processing_class=_load_tokenizer(arguments, training_args, model_args),
        peft_config=get_peft_config(model_args),
    )
    trainer.add_callback(CDRCallback(reward, trainer))
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.save_state()
    trainer.accelerator.print(
        f"{trainer.state.global_step} steps of {arguments.trainer}, saved to {trainer.args.output_dir}"
    )
    if training_args.push_to_hub:
        is_local = Path(script_args.dataset_name).exists()
        trainer.push_to_hub(dataset_name=None if is_local else script_args.dataset_name)
    end_training(trainer)


def make_reward(arguments: TrainArguments, *, training_args: Any, cdr_args: CDRConfig) -> CDRReward:
    """
    Build the reward as the trainer wants it: beside what `CDRReward.from_config` takes from its arguments,
    `cdr_add_special_tokens="auto"` is `"false"` for online DPO, which puts no BOS before string prompts.
    """
    if arguments.trainer == "online_dpo" and cdr_args.cdr_add_special_tokens == "auto":
        cdr_args = replace(cdr_args, cdr_add_special_tokens="false")
    return CDRReward.from_config(cdr_args, training_args)


def _find_checkpoint(training_args: Any) -> str | None:
    """The folder to resume from, or None; asked for and not there is an error before anything is loaded."""
    wanted = training_args.resume_from_checkpoint
    spelled = str(wanted).lower()  # the command line has strings only
    if wanted is None or spelled == "false":
        return None
    if spelled != "true":
        if not Path(wanted).is_dir():
            raise ConfigError(f"resume_from_checkpoint is {wanted!r}, and no such folder exists. Pass a checkpoint-N.")
        return str(wanted)
    output_dir = training_args.output_dir
    last = get_last_checkpoint(output_dir) if Path(output_dir).is_dir() else None
    if last is None:
        raise ConfigError(
            f"resume_from_checkpoint is true, and output_dir ({output_dir!r}) holds no checkpoint. Leave it out."
        )
    return str(last)


def _model_init_kwargs(arguments: TrainArguments, training_args: Any, model_args: ModelConfig) -> dict[str, Any]:
    """`from_pretrained`'s for the policy."""
    kwargs = {
        "revision": model_args.model_revision,
        "trust_remote_code": trust_remote_code(training_args, model_args),
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    }
    quantization = get_quantization_config(model_args)
    if quantization is not None:  # None is not the same as nothing
        kwargs["quantization_config"] = quantization
    if arguments.trainer == "online_dpo":  # it says "auto" also under accelerate launch, which accelerate refuses
        kwargs["device_map"] = None
    return kwargs | (training_args.model_init_kwargs or {})


def _load_tokenizer(arguments: TrainArguments, training_args: Any, model_args: ModelConfig) -> Any:
    """The policy's tokenizer for online DPO, which wants one; the other trainers load it themselves."""
    if arguments.trainer != "online_dpo":
        return None
    return AutoTokenizer.from_pretrained(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        trust_remote_code=trust_remote_code(training_args, model_args),
    )
