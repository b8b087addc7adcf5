"""The paper's recipe, semi-online: completions by the current policy, labelled by the pair, an epoch of SimPO or DPO on
them, and again.

`run_rounds` is `trl-cdr rounds`. `annotate` makes a round's pairs, `round_training` its policy; here is what comes
after what, and what of it is there already.

    options.json  summary.json
    round-1/pairs/      what `annotate` writes; and eval-pairs/, of prompts that are held out
    round-1/training/   TRL's: checkpoints and log
    round-1/policy/     the model
    round-2/...

A round is over when its `policy` is there, which takes its name as a whole; within a round, whole shards of pairs and
TRL's checkpoints are what a run that was killed goes on from.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from trl import ModelConfig, get_peft_config

from .. import _compat
from ..annotation.annotate import AnnotateArguments, make_job
from ..annotation.groups import check_group
from ..annotation.pair_options import check_router, known_options
from ..annotation.pipeline import Job, open_input, run
from ..annotation.reader import Source, every, read_rows
from ..annotation.score_folder import OPTIONS, SUMMARY, check_options, check_ours, fix_date, hold, write_json, writing
from ..config import CDRConfig
from ..config_checks import LOCAL_ARGUMENTS
from ..errors import ConfigError, InputError
from ..scoring.pair_loading import find_template
from ..scoring.scorer import DensityRatioScorer
from ..training.train import check_models, policy_init_kwargs, say
from .round_report import describe_round, show_rounds
from .round_training import (
    EVAL_PAIRS,
    PAIRS,
    POLICY,
    free_memory,
    load_policy_tokenizer,
    on_a_full_disk,
    read_log,
    train_round,
)
from .rounds_arguments import PairsArguments, RoundsArguments, arguments_of_a_round, known_losses

# Of a trainer's arguments: where to, how often it says something, with what and on whose machine. All others decide on
# the weights, and have to be the same when a run goes on.
_WITHOUT_EFFECT = (
    *("output_dir", "overwrite_output_dir", "do_", "log", "save_", "eval_", "per_device_eval_batch_size", "report_to"),
    *("run_name", "project", "trackio_", "disable_tqdm", "hub_", "dataset_num_proc", "ddp_", "skip_memory_metrics"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor", "restore_callback_states"),
    "average_tokens_across_devices",  # it follows the number of processes, which is compared
    *("dataloader_persistent_workers", "use_cpu", "no_cuda", "include_", "torch_empty_cache_steps", "local_rank"),
)
_CHOOSE_THE_BEST = ("save_", "eval_")  # with load_best_model_at_end they decide on the weights, too
# Of `ModelConfig`: what names the policy, whose weights are compared, and how it is run.
_RUNS = ("model_name_or_path", "model_revision", "attn_implementation", "trust_remote_code")


def run_rounds(
    arguments: RoundsArguments,
    *,
    pairs_args: PairsArguments,
    training_args: Any,
    model_args: ModelConfig,
    cdr_args: CDRConfig,
    data: Dataset | Mapping[str, Dataset] | None = None,
) -> dict[str, Any]:
    """
    Train a policy in rounds: each has the policy of the round before write `num_generations` completions to every
    prompt of its share, the pair label them, and TRL's `CPOTrainer` or `DPOTrainer` learn from the pairs for an epoch.

    A run that was killed, started again, ends with the pairs and the weights of one that was not. Round n has the seed
    `training_args.seed + n - 1`, for its completions and its training, and a learning-rate schedule of its own. The
    pair is loaded once, and stays beside the policy in training; with `cdr_offload` it sleeps meanwhile. Several
    processes (`accelerate launch`) share the prompts of a round, and train together when all of them are done.

    Args:
        arguments (`RoundsArguments`): Rounds, their prompts, trainer.
        pairs_args (`PairsArguments`): Prompts, completions and selection.
        training_args (`TrainingArguments`): An `arguments.config_class`; `output_dir` is the folder of all rounds.
        model_args (`ModelConfig`): The policy to begin with, its adapters and its quantisation in training.
        cdr_args (`CDRConfig`): The pair and its options.
        data (`Dataset`, *optional*): Prompts from memory, or splits by name, in place of `pairs_args.input`, which is
            then their name.

    Returns:
        `dict`: what `summary.json` holds: `rounds`, see `describe_round`, and `policy`, the folder of the last one.

    Raises:
        ConfigError: an argument is missing or does not fit; the folder is none of ours, in use, or holds rounds of
            other options or another input; a round has no pair to train on.
        InputError: the input can't be read, or has a bad row: all are looked at before anything is written.
        ModelError: pair or policy can't serve.
    """
    policy = _check_arguments(arguments, pairs_args, training_args, model_args, cdr_args)
    init_kwargs = policy_init_kwargs(training_args, model_args)
    check_models(cdr_args, policy, init_kwargs)
    template = find_template(cdr_args, "strong")
    load_policy_tokenizer(policy, init_kwargs, template)
    if cdr_args.cdr_string_prompts == "text":
        raise ConfigError(
            "cdr_string_prompts is 'text', and rounds train on conversations. Leave it out: a string is a user's turn."
        )
    cdr_args = fix_date(cdr_args, Path(training_args.output_dir))
    scorer = DensityRatioScorer.from_config(cdr_args, training_args)
    source, held_out = _open(arguments, pairs_args, scorer, data)
    state = PartialState()
    rounds = _Rounds(
        arguments,
        pairs_args,
        training_args,
        model_args,
        scorer=scorer,
        source=source,
        held_out=held_out,
        chat_template=template,
        known=known_options(scorer),
    )
    options = rounds.options(state.num_processes)
    _check_folder(rounds.folder, options)
    with hold(rounds.folder, f"-rounds-{state.process_index}"):
        if state.is_main_process:
            with writing(rounds.folder):
                write_json(rounds.folder / OPTIONS, options)
        state.wait_for_everyone()
        described = [rounds.run(number) for number in range(1, arguments.num_rounds + 1)]
        policy = rounds.policy(arguments.num_rounds + 1)
        summary = {"rounds": described, "policy": policy}
        if state.is_main_process:
            with writing(rounds.folder):
                write_json(rounds.folder / SUMMARY, summary)
            show_rounds(described, Path(policy))
    return summary


@dataclass(frozen=True)
class _Rounds:
    """What all rounds are made with: the arguments of `run_rounds`, and what came of them."""

    arguments: RoundsArguments
    pairs_args: PairsArguments
    training_args: Any
    model_args: ModelConfig
    scorer: DensityRatioScorer
    source: Source
    held_out: Source | None
    chat_template: str | None
    known: Mapping[str, Any]

    @property
    def folder(self) -> Path:
        return Path(self.training_args.output_dir)

    def policy(self, number: int) -> str:
        """The policy that a round finds."""
        return str(self.model_args.model_name_or_path if number == 1 else self.place(number - 1) / POLICY)

    def place(self, number: int) -> Path:
        """A round's folder."""
        return self.folder / f"round-{number}"

    def options(self, processes: int) -> dict[str, Any]:
        """What the rounds depend on."""
        training = self.training_args.to_dict()
        kwargs = training.get("model_init_kwargs") or {}
        training["model_init_kwargs"] = {name: kwargs[name] for name in kwargs if name not in LOCAL_ARGUMENTS}
        decides = _CHOOSE_THE_BEST if self.training_args.load_best_model_at_end else ()
        without_effect = tuple(name for name in _WITHOUT_EFFECT if name not in decides)
        found = {
            **{name: value for name, value in training.items() if not name.startswith(without_effect)},
            **{
                each.name: getattr(self.model_args, each.name) for each in fields(ModelConfig) if each.name not in _RUNS
            },
            **self._job(self._annotation(1, PAIRS)).options,
            "command": "rounds",
            "trainer": self.arguments.trainer,
            "round_prompts": self.arguments.round_prompts,
            # Shares depend on it; where every round has all prompts, there may be more rounds later.
            "num_rounds": self.arguments.num_rounds if self.arguments.round_prompts == "split" else None,
            "shard_size": self.pairs_args.shard_size,
            "processes": processes,
            "input": self.source.name,
            "input_sha256": self.source.fingerprint,
            "input_rows": self.source.num_rows,
            "eval_split": self.arguments.eval_split,
            "eval_split_sha256": self.held_out and self.held_out.fingerprint,
            "versions": _compat.versions(),
        }
        return dict(json.loads(json.dumps(found, default=str)))

    def run(self, number: int) -> dict[str, Any]:
        """Do of a round what is not there yet, and describe it."""
        place = self.place(number)
        if not (place / POLICY).is_dir():
            of = f"round {number} of {self.arguments.num_rounds}"
            say(f"{of}: completions by {self.policy(number)}, and their labels")
            share = self.arguments.share
            self._label(number, self.source if share == 1 else every(self.source, share, start=number - 1), PAIRS)
            if self.held_out is not None:
                self._label(number, self.held_out, EVAL_PAIRS)
            say(f"{of}: training")
            with on_a_full_disk(self.folder):
                train_round(
                    self.arguments,
                    place,
                    policy=self.policy(number),
                    seed=self._seed(number),
                    training_args=self.training_args,
                    model_args=self.model_args,
                    chat_template=self.chat_template,
                    chat_template_kwargs=self.scorer.config.cdr_chat_template_kwargs,  # type: ignore[arg-type]
                )
        held_out = None if self.held_out is None else _read(place / EVAL_PAIRS / SUMMARY)
        return describe_round(number, _read(place / PAIRS / SUMMARY), read_log(place), held_out=held_out)

    def _seed(self, number: int) -> int:
        return int(self.training_args.seed) + number - 1

    def _annotation(self, number: int, name: str) -> AnnotateArguments:
        """What pairs of a round are made with."""
        first = policy_init_kwargs(self.training_args, self.model_args)
        return arguments_of_a_round(
            self.pairs_args,
            output_dir=str(self.place(number) / name),
            policy=self.policy(number),
            policy_revision=first.get("revision") if number == 1 else None,
            seed=self._seed(number),
        )

    def _job(self, arguments: AnnotateArguments) -> Job:
        return replace(make_job(arguments, self.scorer, options=self.known), check=check_prompt)

    def _label(self, number: int, prompts: Source, name: str) -> None:
        """
        Make pairs of a round, with all processes.

        Raises:
            ConfigError: there are none.
        """
        arguments = self._annotation(number, name)
        processes = PartialState().num_processes
        arguments = replace(arguments, shard_size=even_shards(prompts.num_rows, processes, arguments.shard_size))
        run(arguments, prompts, self._job(arguments))
        free_memory()  # of the policy that wrote
        PartialState().wait_for_everyone()
        found = _read(Path(arguments.output_dir) / SUMMARY)
        is_needed = name == PAIRS or self.training_args.eval_strategy != "no"
        if is_needed and not found["pairs"]:
            skipped = ", ".join(f"{why}: {count}" for why, count in found["skipped"].items() if count)
            raise ConfigError(
                f"round {number} has no pair in {name}, of {found['rows']} prompts ({skipped}). Use a smaller "
                f"min_margin (it is {arguments.min_margin}), more num_generations, a higher temperature or a larger "
                "max_completion_length, and another output_dir."
            )


def even_shards(rows: int, processes: int, size: int) -> int:
    """
    Rows of a shard, so that all processes, which wait for each other, have as many shards of nearly one size.

    Args:
        rows (`int`): Of all.
        processes (`int`): Which share them.
        size (`int`): The most.
    """
    each = math.ceil(rows / (processes * size))
    return math.ceil(rows / (processes * each))


def check_prompt(found: Mapping[str, Any]) -> str | None:
    """
    What is wrong with a row of the input, or None.

    Args:
        found (`Mapping`): What it holds.
    """
    if found.get("completions") is not None:
        return "has completions, and here the policy of each round writes them. Leave them out, or use annotate."
    return check_group(found, can_write=True)


def _check_arguments(
    arguments: RoundsArguments,
    pairs_args: PairsArguments,
    training_args: Any,
    model_args: ModelConfig,
    cdr_args: CDRConfig,
) -> str:
    """What can be known to be wrong from the arguments alone -> the policy's name."""
    if not model_args.model_name_or_path:
        raise ConfigError("model_name_or_path is missing: the policy to train. Pass a name on the Hub or a path.")
    config_class: Any = arguments.config_class
    if not isinstance(training_args, config_class):
        raise ConfigError(
            f"training_args is a {type(training_args).__name__}, and trainer is {arguments.trainer!r}. Pass an "
            "arguments.config_class."
        )
    losses = known_losses(training_args)
    for loss in [training_args.loss_type] if isinstance(training_args.loss_type, str) else training_args.loss_type:
        if losses and loss not in losses:
            raise ConfigError(
                f"loss_type is {loss!r}, which trainer {arguments.trainer} does not know. Use one of: "
                f"{', '.join(losses)}."
            )
    if training_args.max_length is not None and training_args.max_length <= pairs_args.max_completion_length:
        raise ConfigError(
            f"max_length is {training_args.max_length} tokens of a prompt and its completion in training, and "
            f"max_completion_length is {pairs_args.max_completion_length}: completions would be cut off. Pass a larger "
            "max_length."
        )
    if training_args.max_length is None and arguments.trainer == "cpo":
        raise ConfigError("max_length is None, for which TRL's CPOTrainer takes 512. Pass a number of tokens.")
    if training_args.save_only_model:
        raise ConfigError(
            "save_only_model is set: a training that is stopped could not go on where it was. Leave it out; "
            "save_total_limit keeps few checkpoints."
        )
    if training_args.eval_strategy != "no" and arguments.eval_split is None:
        raise ConfigError(
            f"eval_strategy is {str(training_args.eval_strategy.value)!r}, and eval_split is missing: the split of "
            "input whose prompts are held out. Pass eval_split, or leave eval_strategy out."
        )
    if cdr_args.cdr_share_policy:
        raise ConfigError(
            "cdr_share_policy is set, and the pair labels when no policy is in training. Leave it out; cdr_offload "
            "lets the pair sleep while the policy trains."
        )
    try:
        get_peft_config(model_args)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"use_peft is set, and there can be no adapter: {error}") from error
    return str(model_args.model_name_or_path)


def _open(
    arguments: RoundsArguments,
    pairs_args: PairsArguments,
    scorer: DensityRatioScorer,
    data: Dataset | Mapping[str, Dataset] | None,
) -> tuple[Source, Source | None]:
    """
    The prompts to train on and those that are held out, all of them looked at.

    Raises:
        ConfigError: there is no such split, or both are the same.
        InputError: they can't be read, are too few, or have a bad row.
    """
    source = open_input(pairs_args, data)
    check_router(scorer, source)
    _check_rows(source, arguments.share, pairs_args)
    if arguments.eval_split is None:
        return source, None
    held_out = open_input(replace(pairs_args, split=arguments.eval_split), data)
    if held_out.fingerprint == source.fingerprint:  # a single file has no splits
        raise ConfigError(
            f"eval_split is {arguments.eval_split!r}, and split is {pairs_args.split!r}: of {source.name!r} they are "
            "the same rows. Give a folder with a file for each, and see that the two differ."
        )
    _check_rows(held_out, 1, pairs_args)
    return source, held_out


def _check_rows(source: Source, needed: int, pairs_args: PairsArguments) -> None:
    """
    Raises:
        InputError: there are fewer rows than are needed, or there is a bad one.
    """
    if source.num_rows < needed:
        raise InputError(
            f"input is {source.name!r}, which has {source.num_rows} rows, and each of {needed} rounds needs its share. "
            "Give more prompts, or pass round_prompts=all or a smaller num_rounds."
        )
    if pairs_args.on_bad_row == "raise":
        for _ in read_rows(source, check=check_prompt):
            pass


def _check_folder(folder: Path, options: Mapping[str, Any]) -> None:
    """Whether the folder is free, or holds rounds of the same options."""
    if folder.is_dir():
        check_ours(folder)
        if (folder / OPTIONS).exists():
            check_options(folder, options)


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_bytes()))
