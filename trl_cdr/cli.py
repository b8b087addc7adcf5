"""The `trl-cdr` command. Parses; `demo`, `training`, `annotation` and `bench` do the work, imported when their command
runs.
"""

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from . import __version__
from .arguments import DATA_HELP, Group, check_output, explain_unknown, write_help
from .errors import CDRError, ConfigError

_COMMANDS = {
    "demo": "build a tiny strong/weak pair and train a policy on its labels, offline, in about two minutes",
    "train": "train a policy on the pair's labels: GRPO, RLOO, online DPO, SimPO; from YAML or arguments",
    "score": "score prompts and completions: a file, a folder or a data set",
    "show": "print the text that each model of a pair reads, with token counts and the score: when a score looks wrong",
    "annotate": "make a preference data set: completions to prompts, scored, the chosen and the rejected of them",
    "evaluate": "count how often a pair prefers the better completion, on preference sets, beside other judges",
    "rank-pairs": "run each of several models once, and rank every pair of them",
    "probe": "attack a pair's reward before training on it: what is worth more than an honest completion?",
    "audit": "look into a run's log for a policy that games the reward",
    "rounds": "train a policy in rounds: it writes, the pair labels, TRL's CPO (SimPO) or DPO trains, and again",
    "bench": "measure what scoring costs, beside the naive way",
    "doctor": "print versions, how each model of a pair will run and what it takes: what a bug report should hold",
}
# Of a trainer's config, of ModelConfig and of ScriptArguments: what `train --help` shows, in this order, and the words
# for it where theirs say less or other than what holds here.
_OFTEN = {
    "output_dir": "Folder of the model, the checkpoints and the log.",
    **dict.fromkeys(("learning_rate", "max_steps", "num_train_epochs", "per_device_train_batch_size"), ""),
    **dict.fromkeys(("gradient_accumulation_steps", "num_generations", "max_completion_length", "max_new_tokens"), ""),
    **dict.fromkeys(("temperature", "beta", "preference_loss", "preference_beta", "gamma_beta_ratio", "sft_coef"), ""),
    **dict.fromkeys(("pair_strategy", "use_vllm", "bf16", "logging_steps", "log_completions", "eval_strategy"), ""),
    "reward_weights": "One number for each reward, in the order above: the pair's first.",
    **dict.fromkeys(("save_steps", "save_total_limit"), ""),
    "resume_from_checkpoint": "A checkpoint's folder, or true: the last one in output_dir, if there is one.",
    **dict.fromkeys(("report_to", "push_to_hub", "seed"), ""),
    "model_name_or_path": "The policy: a name on the Hub or a path.",
    **dict.fromkeys(("model_revision", "dtype", "attn_implementation"), ""),
    **dict.fromkeys(("use_peft", "lora_r", "lora_target_modules", "load_in_4bit"), ""),
    "dataset_name": "The prompts: a name on the Hub, a folder, or a .jsonl, .json, .csv or .parquet file.",
    "dataset_config": "Which of the data set's configurations.",
    "dataset_train_split": "Which split trains.",
    "dataset_test_split": "Which split eval_strategy evaluates.",
    "dataset_streaming": "",
}
# The same of the trainers of `rounds`.
_OFTEN_ROUNDS = {
    "output_dir": "",
    **dict.fromkeys(("learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size"), ""),
    "gradient_accumulation_steps": "",
    "loss_type": "The loss, by TRL's name for it.",
    **dict.fromkeys(("beta", "simpo_gamma", "cpo_alpha", "max_length", "bf16", "logging_steps"), ""),
    "save_steps": "How often a checkpoint is saved: what a killed training goes on from.",
    **dict.fromkeys(("save_total_limit", "report_to"), ""),
    "seed": "Of the first round's completions and training; each later round has the next.",
}
_AUDIT_STATUS = (
    "exit status: 0 no alarm, 1 an alarm, 2 nothing that can be judged (no log, no metrics, a run too short)"
)
_EVALUATE_EXAMPLES = (
    "trl-cdr evaluate --cdr_strong STRONG --cdr_weak WEAK --data pairs.jsonl more.parquet",
    "trl-cdr evaluate --cdr_strong STRONG --cdr_weak WEAK --data allenai/reward-bench",
    "trl-cdr evaluate --selftest        # the rules of RewardBench on values made up for them",
)
_SHOW_EXAMPLES = (
    'trl-cdr show --cdr_strong STRONG --cdr_weak WEAK --prompt "What is 2 + 2?" --completion "4"',
    """trl-cdr show --config run.yaml --completion "4" --prompt '[{"role": "user", "content": "What is 2 + 2?"}]'""",
)
_TRAIN_EXAMPLES = (
    "trl-cdr train --config run.yaml --max_steps 200",
    "accelerate launch -m trl_cdr train --config run.yaml        # one process for each GPU",
    "trl-cdr train --trainer online_preference --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \\\n"
    "      --dataset_name trl-lib/ultrafeedback-prompt \\\n"
    "      --cdr_strong Qwen/Qwen2.5-1.5B-Instruct --cdr_weak Qwen/Qwen2.5-1.5B",
)
_ROUNDS_EXAMPLES = (
    "trl-cdr rounds --config run.yaml                             # again, and it goes on where it was",
    "accelerate launch -m trl_cdr rounds --config run.yaml        # one process for each GPU",
    "trl-cdr rounds --input prompts.jsonl --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \\\n"
    "      --cdr_strong Qwen/Qwen2.5-1.5B-Instruct --cdr_weak Qwen/Qwen2.5-1.5B --cdr_offload cpu",
)


def main(argv: Sequence[str] | None = None) -> None:
    """
    Run a command line (default: the process's own).

    Raises:
        SystemExit: with status 2 where arguments or input are wrong; the message on stderr says what to change. With
            status 1 if `probe` finds more than `--max_win` allows, `audit` finds an alarm, or a model does not run as
            `doctor --require` asks.
    """
    parser = argparse.ArgumentParser(
        prog="trl-cdr",
        description="Preference labels from the log-density ratio of two open models.",
        epilog="trl-cdr COMMAND --help lists a command's arguments.",
    )
    parser.add_argument("--version", action="version", version=f"trl-cdr {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in _COMMANDS.items():
        commands.add_parser(name, help=summary, add_help=False)
    command, rest = parser.parse_known_args(argv)
    if not {"", os.getcwd()} & set(sys.path):  # functions that options name by dotted path, as under python -m
        sys.path.append(os.getcwd())
    try:
        runs = [_demo, _train, _score, _show, _annotate, _evaluate, _rank_pairs]
        runs += [_probe, _audit, _rounds, _bench, _doctor]
        {run.__name__.removeprefix("_").replace("_", "-"): run for run in runs}[command.command](rest)
    except CDRError as error:
        print(f"trl-cdr {command.command}: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _demo(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="trl-cdr demo", description=_describe("demo"))
    parser.add_argument("--output_dir", default="./trl-cdr-demo", help="folder for the figures and JSON")
    parser.add_argument("--no_cache", action="store_true", help="build the models anew")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--customize", action="store_true", help="show what criteria and exemplars do, in its place")
    which.add_argument("--real", action="store_true", help="show a real model's labels, in its place")
    parser.add_argument("--model", help="with --real: an instruct model, name or path, in place of SmolLM2-135M")
    parser.add_argument("--data", help=f"with --real: {DATA_HELP}")
    args = parser.parse_args(argv)
    if not args.real and (args.model or args.data):
        parser.error("--model and --data go with --real")
    check_output(args.output_dir)

    if args.real:
        from .demo.real import run_demo as run_real_demo

        run_real_demo(args.output_dir, model=args.model, data=args.data, cache=not args.no_cache)
        return

    if args.customize:
        from .demo.customize import run_customize as run
    else:
        from .demo.story import run_demo as run

    run(args.output_dir, cache=not args.no_cache)


def _train(argv: list[str]) -> None:
    from trl import ModelConfig, ScriptArguments

    from .config import CDRConfig
    from .training.train import TrainArguments, train

    # --trainer, on the command line or in YAML, says which config reads the rest.
    argv, _ = _read_config(argv)
    [first], _ = _build("train", (TrainArguments,), argv)
    groups = (
        Group("the trainer and its rewards", TrainArguments),
        Group("the pair and its reward", CDRConfig),
        Group(f"trainer {first.trainer} ({first.config_class.__name__})", first.config_class, _OFTEN),
        Group("the policy (ModelConfig)", ModelConfig, _OFTEN),
        Group("the data set (ScriptArguments)", ScriptArguments, _OFTEN),
    )

    arguments, cdr_args, training_args, model_args, script_args = _parse(
        "train", groups, argv, examples=_TRAIN_EXAMPLES, elsewhere=lambda name: _whose(name, first)
    )
    check_output(training_args.output_dir)
    train(arguments, script_args=script_args, training_args=training_args, model_args=model_args, cdr_args=cdr_args)


def _score(argv: list[str]) -> None:
    from .annotation.score_file import ScoreArguments, score_file

    score_file(*_parse_with_pair("score", "what to score", ScoreArguments, argv))


def _show(argv: list[str]) -> None:
    from .config import CDRConfig
    from .scoring.scorer import DensityRatioScorer
    from .scoring.show import ShowArguments, parse_prompt

    groups = (Group("the row", ShowArguments), Group("the pair and its reward", CDRConfig))
    arguments, config = _parse("show", groups, argv, examples=_SHOW_EXAMPLES)
    DensityRatioScorer.from_config(config).show(
        parse_prompt(arguments.prompt),
        arguments.completion,
        domain=arguments.domain,
        finished=not arguments.cut_off,
        is_generated=arguments.generated,
    )


def _annotate(argv: list[str]) -> None:
    from .annotation.annotate import AnnotateArguments, annotate

    annotate(*_parse_with_pair("annotate", "what to annotate", AnnotateArguments, argv))


def _evaluate(argv: list[str]) -> None:
    from .annotation.evaluate_files import EvaluateArguments, evaluate_files, print_selftest
    from .config import CDRConfig

    if argv == ["--selftest"]:
        raise SystemExit(0 if print_selftest() else 1)
    groups = (Group("what it is evaluated on", EvaluateArguments), Group("the pair", CDRConfig))
    arguments, config = _parse("evaluate", groups, argv, examples=_EVALUATE_EXAMPLES)
    check_output(arguments.output_dir)
    evaluate_files(arguments, config)


def _rank_pairs(argv: list[str]) -> None:
    from .annotation.rank_pairs import RankArguments, RankOptions, rank_files

    groups = (Group("what is ranked", RankArguments), Group("how all models are read", RankOptions))
    arguments, options = _parse("rank-pairs", groups, argv)
    check_output(arguments.output_dir)
    rank_files(arguments, options)


def _probe(argv: list[str]) -> None:
    from .annotation.probe_file import ProbeArguments, probe_file

    failure = probe_file(*_parse_with_pair("probe", "what it is attacked with", ProbeArguments, argv))
    if failure is not None:
        print(f"trl-cdr probe: {failure}", file=sys.stderr)
        raise SystemExit(1)


def _audit(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="trl-cdr audit", description=_describe("audit"), epilog=_AUDIT_STATUS)
    parser.add_argument("run", metavar="OUT_DIR", help="the run's output_dir, or one of its checkpoints")
    args = parser.parse_args(argv)
    from .training.audit import audit, print_audit

    found = audit(args.run)
    print_audit(found)
    if found.is_alarming:
        raise SystemExit(1)


def _rounds(argv: list[str]) -> None:
    from trl import ModelConfig

    from .config import CDRConfig
    from .rounds.rounds import run_rounds
    from .rounds.rounds_arguments import ELSEWHERE, PairsArguments, RoundsArguments

    # --trainer, on the command line or in YAML, says which config reads the rest.
    argv, _ = _read_config(argv)
    [first], _ = _build("rounds", (RoundsArguments,), argv)
    groups = (
        Group("the rounds", RoundsArguments),
        Group("the prompts, their completions, and pairs of these", PairsArguments),
        Group("the pair", CDRConfig),
        Group(f"trainer {first.trainer} (TRL's)", first.config_class, _OFTEN_ROUNDS),
        Group("the policy (ModelConfig)", ModelConfig, _OFTEN),
    )

    def elsewhere(name: str) -> str | None:
        return ELSEWHERE.get(name) or _whose(name, first)

    arguments, pairs_args, cdr_args, training_args, model_args = _parse(
        "rounds", groups, argv, examples=_ROUNDS_EXAMPLES, elsewhere=elsewhere
    )
    check_output(training_args.output_dir)
    run_rounds(arguments, pairs_args=pairs_args, training_args=training_args, model_args=model_args, cdr_args=cdr_args)


def _bench(argv: list[str]) -> None:
    from .cli_bench import bench

    bench(argv, description=_describe("bench"))


def _doctor(argv: list[str]) -> None:
    from .config import CDRConfig
    from .doctor import DoctorArguments, examine, missed_requirement, print_examination

    groups = (
        Group("what to look at", DoctorArguments),
        Group("a pair to load and check (without one, versions alone)", CDRConfig),
    )
    arguments, config = _parse("doctor", groups, argv) if argv else (DoctorArguments(), None)
    found = examine(config, arguments)
    print_examination(found)
    missed = missed_requirement(found, arguments)
    if missed is not None:
        print(f"trl-cdr doctor: {missed}", file=sys.stderr)
        raise SystemExit(1)


def _parse_with_pair(command: str, title: str, kind: type, argv: list[str]) -> tuple[Any, Any]:
    """A command's own arguments, with a folder that can be written, and the pair's."""
    from .config import CDRConfig

    arguments, config = _parse(command, (Group(title, kind), Group("the pair and its reward", CDRConfig)), argv)
    check_output(arguments.output_dir)
    return arguments, config


def _parse(
    command: str,
    groups: Sequence[Group],
    argv: list[str],
    *,
    examples: Sequence[str] = (),
    elsewhere: Callable[[str], str | None] | None = None,
) -> tuple[Any, ...]:
    """Dataclasses from the command line and `--config`; unlike TRL's own scripts, what is unknown is an error."""
    asked = {word.replace("-", "_") for word in argv} & {"_h", "__help", "__help_all"}
    if asked:
        print(write_help(command, _describe(command), groups, examples=examples, everything="__help_all" in asked))
        raise SystemExit(0)
    argv, config = _read_config(argv)
    kinds = tuple(group.kind for group in groups)
    known: set[str] = set().union(*map(_names, kinds))
    words = [word[2:].split("=")[0].replace("-", "_") for word in argv if word.startswith("--") and word != "--config"]
    # As the parser has it: on the command line --no_NAME, of what is true by default.
    switches = {f"no_{field.name}" for kind in kinds for field in fields(kind) if field.default is True}
    names = [*config, *(word for word in words if word not in switches)]
    unknown = explain_unknown(names, known, elsewhere=elsewhere)
    if unknown is not None:  # before the dataclasses have their say: what they miss may just be misspelled
        raise ConfigError(f"unknown arguments: {unknown}. trl-cdr {command} --help lists those that are known.")
    parsed, left = _build(command, kinds, argv)
    if left:
        raise ConfigError(f"unknown arguments: {' '.join(left)}, which follow no name. Write --NAME VALUE.")
    return parsed


def _whose(name: str, chosen: Any) -> str | None:
    """Of which of a command's other trainers an argument is; `chosen` is the dataclass with the one that was chosen."""
    trainers = get_args(get_type_hints(type(chosen))["trainer"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # trl.experimental's, of a trainer that nobody asked for
        owners = [other for other in trainers if name in _names(type(chosen)(trainer=other).config_class)]
    return f"of trainer {', '.join(owners)}, not of {chosen.trainer}" if owners else None


def _names(kind: type) -> set[str]:
    return {field.name for field in fields(kind) if field.init}


def _build(command: str, kinds: tuple[type, ...], argv: list[str]) -> tuple[tuple[Any, ...], list[str]]:
    """Dataclasses, and the words that no field of theirs claims."""
    from trl import TrlParser

    parser = TrlParser(
        kinds,
        prog=f"trl-cdr {command}",
        usage=f"trl-cdr {command} [--config FILE] [--ARGUMENT VALUE ...]  (--help: all of them)",
        add_help=False,
        allow_abbrev=False,
    )
    try:
        *parsed, left = parser.parse_args_and_config(argv, return_remaining_strings=True)
    except CDRError:
        raise
    except (TypeError, ValueError) as error:  # how TRL's and transformers' configs refuse a value
        raise ConfigError(str(error)) from error
    return tuple(parsed), left


def _read_config(argv: list[str]) -> tuple[list[str], dict[str, Any]]:
    """The arguments with `--config FILE` as two words, as TRL's parser wants them, and what the file holds for it."""
    import yaml

    argv = [part for word in argv for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    if "--config" not in argv:
        return argv, {}
    name = next(iter(argv[argv.index("--config") + 1 :]), None)
    if name is None:
        raise ConfigError("--config names no file. Give the path of a YAML file.")
    try:
        content = yaml.safe_load(Path(name).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--config: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        what = "is empty" if content is None else "holds no names with values"
        raise ConfigError(f"--config is {name!r}, which {what}. Write lines such as cdr_strong: NAME.")
    environment = content.pop("env", {})
    if not isinstance(environment, dict):
        raise ConfigError(f"--config is {name!r}, whose env is {environment!r}. Give it names with values.")
    return argv, content


def _describe(command: str) -> str:
    summary = _COMMANDS[command]
    return f"{summary[0].upper()}{summary[1:]}."
