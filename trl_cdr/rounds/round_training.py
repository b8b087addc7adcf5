"""The pairs of a round -> its policy, by TRL's own trainer. Knows neither the pair of models nor the other rounds.

round-2/training/    TRL's: checkpoints, the log; with LoRA the adapter
round-2/policy/      the model and its tokenizer: there as a whole, or not at all
"""

import copy
import errno
import gc
import glob
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils.memory import clear_device_cache
from datasets import Dataset, load_dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase, set_seed
from trl import ModelConfig, get_peft_config

from ..annotation.score_folder import writing
from ..errors import CDRError, ConfigError
from ..scoring.adapters import merge
from ..scoring.encoding import own_chat_template
from ..scoring.loading import hub_kwargs, load_model
from ..training.train import find_checkpoint, policy_init_kwargs, say
from .rounds_arguments import RoundsArguments

POLICY, TRAINING, PAIRS, EVAL_PAIRS = "policy", "training", "pairs", "eval-pairs"
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)
_ENDS = 2  # tokens that TRL may add to what the template renders: one before, one behind
_DISK = ("I/O error", "inline_container", "iostream")  # safetensors, torch, torch again
_CACHE = ".cache"  # of the pairs as arrays, and of their tokens


def train_round(
    arguments: RoundsArguments,
    folder: Path,
    *,
    policy: str,
    seed: int,
    training_args: Any,
    model_args: ModelConfig,
    chat_template: str | None,
    chat_template_kwargs: Mapping[str, Any] | None,
) -> None:
    """
    Train a policy on a round's pairs and save it as a whole. What was killed goes on from its last checkpoint.

    With LoRA a round trains an adapter of its own on the policy that it found, and what is saved is the policy with the
    adapter merged into it, so that the next round, its completions and whoever serves the model need no adapters, and
    DPO's reference (TRL's: the model without the adapter) is the policy that the round found. The adapter stays in
    `training`. Quantised weights are for the training alone: the adapter is merged into the weights as they were.

    Args:
        arguments (`RoundsArguments`): Which trainer.
        folder (`Path`): The round's, with its pairs.
        policy (`str`): The model that the round found: a name, or the round before's.
        seed (`int`): Of the data's order, and of an adapter's first weights.
        training_args (`TrainingArguments`): An `arguments.config_class`; it stays as it is.
        model_args (`ModelConfig`): Adapters, type and quantisation.
        chat_template (`str` or `None`): For a policy that has none.
        chat_template_kwargs (`Mapping` or `None`): Its variables.

    Raises:
        ConfigError: the trainer refuses what it is given.
    """
    state = PartialState()
    args = copy.copy(training_args)
    args.output_dir, args.seed = str(folder / TRAINING), seed
    args.model_init_kwargs = policy_init_kwargs(training_args, model_args)
    if policy != model_args.model_name_or_path:  # where the first one lay is not where its successors do
        args.model_init_kwargs = {
            name: value for name, value in args.model_init_kwargs.items() if name not in ("revision", "subfolder")
        }
    args.resume_from_checkpoint = any((folder / TRAINING).glob("checkpoint-*")) or None
    if arguments.trainer == "cpo":  # it says "auto" also under accelerate launch, which accelerate refuses
        args.model_init_kwargs = {"device_map": None} | args.model_init_kwargs
    kwargs = dict(args.model_init_kwargs)
    tokenizer = load_policy_tokenizer(policy, kwargs, chat_template)
    with args.main_process_first(desc="load the pairs"):
        names = [PAIRS, *([] if args.eval_strategy == "no" else [EVAL_PAIRS])]
        pairs = [
            leave_out_long(load_pairs(folder, name, chat_template_kwargs), tokenizer, args.max_length) for name in names
        ]
    set_seed(seed)  # TRL 1.0 draws an adapter's first weights before it sets one; drop with the floor
    try:
        trainer = arguments.trainer_class(
            model=policy,
            args=args,
            train_dataset=pairs[0],
            eval_dataset=pairs[1] if len(pairs) > 1 else None,
            processing_class=tokenizer,
            peft_config=get_peft_config(model_args),
        )
    except CDRError:
        raise
    except (ImportError, OSError, TypeError, ValueError) as error:  # how TRL and transformers refuse arguments
        raise ConfigError(f"trainer {arguments.trainer} can't be made: {' '.join(str(error).split())}") from error
    trainer.train(resume_from_checkpoint=find_checkpoint(args))
    trainer.save_state()
    partial = folder / f".{POLICY}.partial"
    if state.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    state.wait_for_everyone()
    trainer.save_model(args.output_dir if model_args.use_peft else str(partial))
    del trainer
    free_memory()
    if state.is_main_process:
        if model_args.use_peft:
            _save_merged(policy, folder / TRAINING, partial, kwargs)
            tokenizer.save_pretrained(partial)
        check_saved(partial)
        partial.replace(folder / POLICY)
        shutil.rmtree(folder / TRAINING / _CACHE, ignore_errors=True)
    state.wait_for_everyone()


@contextmanager
def on_a_full_disk(folder: Path) -> Iterator[None]:
    """
    As `score_folder.writing`, also of libraries that have other words for it: datasets, safetensors and torch.

    Args:
        folder (`Path`): Which is written to, for the message.

    Raises:
        ConfigError: what is written inside can't be.
    """
    try:
        yield
    except CDRError:
        raise
    except Exception as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        is_the_disk = isinstance(cause, OSError) and cause.errno in _DISK_ERRORS
        if not is_the_disk and not any(word in str(error) for word in _DISK):
            raise
        with writing(folder):
            raise OSError(" ".join(str(cause or error).split())) from error


def check_saved(folder: Path) -> None:
    """
    Whether a policy was saved with its weights.

    Args:
        folder (`Path`): Where it was saved to.

    Raises:
        ConfigError: it was not: a trainer that shards weights saves them in a form of its own, or none at all.
    """
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(
            f"the trainer saved no weights to {str(folder)!r}, which shards them: set fsdp_state_dict_type: "
            "FULL_STATE_DICT with FSDP, stage3_gather_16bit_weights_on_model_save: true with ZeRO-3, and run again."
        )


def leave_out_long(pairs: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> Dataset:
    """
    The pairs that a trainer need not cut: a completion without its end would be learned as if it had none.

    Args:
        pairs (`Dataset`): `prompt`, `chosen`, `rejected`, and maybe the template's variables.
        tokenizer: The policy's.
        max_length (`int` or `None`): The trainer's, tokens of a prompt and its completion. `None`: there is no limit.

    Raises:
        ConfigError: all of them are longer.
    """
    if max_length is None:
        return pairs

    def fits(row: Mapping[str, Any]) -> bool:
        kwargs = row.get("chat_template_kwargs") or {}
        texts = [
            tokenizer.apply_chat_template(row["prompt"] + row[side], tokenize=False, **kwargs)
            for side in ("chosen", "rejected")
        ]
        lengths = map(len, tokenizer(texts, add_special_tokens=False)["input_ids"])
        return max(lengths) + _ENDS <= max_length

    kept = pairs.filter(fits)
    if len(kept) < len(pairs):
        say(f"{len(pairs) - len(kept)} of {len(pairs)} pairs are longer than max_length ({max_length}) and left out")
    if not len(kept):
        raise ConfigError(
            f"max_length is {max_length} tokens of a prompt and its completion, and all of {len(pairs)} pairs have "
            "more. Pass a larger max_length, and another output_dir."
        )
    return kept


def load_policy_tokenizer(
    policy: str, init_kwargs: Mapping[str, Any], chat_template: str | None
) -> PreTrainedTokenizerBase:
    """
    A policy's tokenizer, with a template for conversations.

    Args:
        policy (`str`): Name or path.
        init_kwargs (`Mapping`): `from_pretrained`'s; those that say where a repository is are heeded.
        chat_template (`str` or `None`): For one that has none.

    Raises:
        ConfigError: it can't be loaded, or neither has a template.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(policy, **hub_kwargs(init_kwargs))
    except Exception as error:  # a library's many ways to say that a folder holds no tokenizer
        raise ConfigError(f"model_name_or_path is {policy!r}, whose tokenizer can't be loaded: {error}") from error
    if own_chat_template(tokenizer) is None:
        if chat_template is None:
            raise ConfigError(
                f"model_name_or_path is {policy!r}, and neither it nor cdr_strong has a chat template: prompts are "
                "conversations. Pass cdr_chat_template."
            )
        tokenizer.chat_template = chat_template
    return tokenizer


def load_pairs(folder: Path, name: str, chat_template_kwargs: Mapping[str, Any] | None = None) -> Dataset:
    """
    A round's pairs as TRL's trainers take them: `prompt`, `chosen`, `rejected`, and the template's variables.

    Args:
        folder (`Path`): The round's.
        name (`str`): `PAIRS` or `EVAL_PAIRS`.
        chat_template_kwargs (`Mapping`, *optional*): Such as `{"enable_thinking": False}`.
    """
    shards = [glob.escape(str(path)) for path in sorted((folder / name / "data").glob("*.parquet"))]
    cache = str(folder / TRAINING / _CACHE)
    pairs = load_dataset("parquet", data_files=shards, split="train", cache_dir=cache)
    pairs = pairs.select_columns(["prompt", "chosen", "rejected"])
    if chat_template_kwargs:
        pairs = pairs.add_column("chat_template_kwargs", [dict(chat_template_kwargs)] * len(pairs))
    return pairs


def read_log(folder: Path) -> dict[str, Any]:
    """
    What the log of a round's training says.

    Args:
        folder (`Path`): The round's.

    Returns:
        `dict`: `steps`; `loss`, the mean of all logs; `accuracy`, the last log's share of pairs whose chosen completion
        the policy prefers; `eval_loss` and `eval_accuracy` of the last evaluation. `None` where nothing was logged, or
        the log was removed.
    """
    path = folder / TRAINING / "trainer_state.json"
    state = json.loads(path.read_bytes()) if path.exists() else {"log_history": [], "global_step": None}
    history = state["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    last = {name: value for entry in history for name, value in entry.items()}
    return {
        "steps": state["global_step"],
        "loss": sum(losses) / len(losses) if losses else None,
        "accuracy": last.get("rewards/accuracies"),
        "eval_loss": last.get("eval_loss"),
        "eval_accuracy": last.get("eval_rewards/accuracies"),
    }


def free_memory() -> None:
    """Let the device have what the policy that was just dropped held: its modules refer to each other in circles."""
    gc.collect()
    clear_device_cache()


def _save_merged(policy: str, adapter: Path, folder: Path, init_kwargs: Mapping[str, Any]) -> None:
    """The policy with an adapter, as one model."""
    loading = {name: value for name, value in init_kwargs.items() if name not in ("quantization_config", "device_map")}
    merge(load_model(policy, "model_name_or_path", device="cpu", init_kwargs=loading), adapter).save_pretrained(folder)
