"""The private parts of other libraries that the package uses, and the differences between versions of these libraries.

Private parts are names with an underscore, signatures, class names and undocumented attributes. No other module uses
one (`tests/test_layers.py`), except `OnlinePreferenceTrainer`, which inherits those that `check_grpo` and
`check_grpo_attributes` look for. If one is gone, `tests/test_private_parts.py` fails. Importing this module is cheap:
its functions import the libraries.
"""

import inspect
import platform
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from packaging.version import Version

from . import __version__
from .errors import ConfigError

_PACKAGES = (
    "trl",
    "transformers",
    "torch",
    "accelerate",
    "datasets",
    "tokenizers",
    "peft",
    "vllm",
    "bitsandbytes",
    "torchao",
)

# Names that other modules import from below the top level of a library. Such names may move without notice.
IMPORTS = {
    "accelerate.utils": ("gather_object",),
    "accelerate.utils.memory": ("clear_device_cache",),
    "datasets.exceptions": ("DatasetsError",),
    "transformers.pytorch_utils": ("Conv1D",),
    "transformers.quantizers.auto": ("AutoQuantizationConfig",),
    "transformers.utils": (
        "cached_file",
        "extract_commit_hash",
        "find_adapter_config_file",
        "get_json_schema",
        "logging",
    ),
    "transformers.utils.logging": ("disable_progress_bar", "enable_progress_bar"),
    "trl.experimental.cpo": ("CPOConfig", "CPOTrainer"),
    "trl.experimental.online_dpo": ("OnlineDPOConfig", "OnlineDPOTrainer"),
}

# What OnlinePreferenceTrainer takes from GRPOTrainer, as TRL 1.0 to 1.16 have it: methods with the arguments that it
# hands them or is handed, and keys of a generated batch.
_GRPO_METHODS = {
    "_generate_and_score_completions": ["inputs"],
    "_calculate_rewards": ["inputs", "prompts", "completions", "completion_ids_list"],
    "compute_loss": ["model", "inputs", "return_outputs", "num_items_in_batch"],
    "log": ["logs", "start_time"],
}
_GRPO_ATTRIBUTES = (
    *("_logs", "_metrics", "args", "log_completions", "log_unique_prompts", "mask_truncated_completions"),
    *("num_completions_to_print", "num_generations", "num_generations_eval", "ref_model", "reward_weights"),
)
_GRPO_KEYS = {"prompt_ids", "prompt_mask", "completion_ids", "completion_mask"}
_IMAGES = ("pixel", "image", "video")  # one of these is in a key of every batch whose prompts hold images


def versions() -> dict[str, str | None]:
    """Versions of Python, of this package and of those that matter to it; None where one is not installed."""
    return {"python": platform.python_version(), "trl-cdr": __version__} | {name: _find(name) for name in _PACKAGES}


def is_online_dpo(args: Any) -> bool:
    """Whether training arguments are online DPO's, whose trainer hands a reward no `log_metric`."""
    return any(kind.__name__ == "OnlineDPOConfig" for kind in type(args).__mro__)


def reward_functions(trainer: Any) -> list[Any]:
    """A trainer's reward functions; none without a trainer."""
    functions = getattr(trainer, "reward_funcs", None)
    return list(functions) if isinstance(functions, (list, tuple)) else []


def cdr_reward(function: Any) -> Any:
    """The `CDRReward` that a trainer's reward function is, or that the environment configures; None for others."""
    return getattr(function, "_cdr_reward", None)


def trainer_behind(log_metric: Any) -> Any:
    """The trainer whose bound method GRPO and RLOO hand to a reward function, the one way to it; else None."""
    owner = getattr(log_metric, "__self__", None)
    return owner if hasattr(owner, "callback_handler") else None


def skips_missing_rewards(trainer: Any) -> bool:
    """
    Whether a completion for which a reward function returns None is left out by the trainer, so far as this reward
    goes. Elsewhere None counts as 0, which often wins against honest negative log-ratios: in online DPO, in GRPO and
    RLOO before TRL 1.6, in later ones beside a second reward function (they leave out only what every function left
    open, and add up the rest), and who knows in trainers that are not TRL's.

    Args:
        trainer: The trainer, or None where it is not known.
    """
    kinds = type(trainer).__mro__
    if any(kind.__name__ == "OnlinePreferenceTrainer" for kind in kinds):
        return True
    method = "_generate_and_score_completions"  # where rewards become advantages
    home = next((kind.__module__ for kind in kinds if method in vars(kind)), None)
    if home not in ("trl.trainer.grpo_trainer", "trl.trainer.rloo_trainer"):
        return False
    if Version(version("trl")).release < (1, 6):
        return False
    # Normalised before they are added, a missing reward is the mean of its group.
    is_neutral = getattr(trainer, "multi_objective_aggregation", None) == "normalize_then_sum"
    return len(reward_functions(trainer)) == 1 or is_neutral


def is_out_of_memory(error: BaseException) -> bool:
    """
    Return True if a device or the host ran out of memory. It is no property of a model: less may fit next time.

    accelerate knows most messages of torch. It lacks Python's own error, and CUDA's and cuBLAS' errors from within a
    kernel.
    """
    from accelerate.utils.memory import should_reduce_batch_size

    if isinstance(error, MemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    words = str(error)
    others = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
    return any(other in words for other in others) or should_reduce_batch_size(RuntimeError(words))


def trust_remote_code(*configs: Any) -> bool:
    """Whether the policy may bring code of its own: TRL moved the field from ModelConfig to the trainers' configs."""
    return any(getattr(config, "trust_remote_code", False) for config in configs)


def end_training(trainer: Any) -> None:
    """Close trackers and the process group, after the last call that needs them. Nothing in transformers < 5.18."""
    end = getattr(trainer, "end", None)
    if end is not None:
        end()


def check_grpo(trainer: type) -> None:
    """
    Whether `GRPOTrainer` has the methods that `OnlinePreferenceTrainer` builds on. They may take more, which is handed
    on, as long as nobody has to pass it.

    Args:
        trainer (`type`): `GRPOTrainer`.

    Raises:
        ConfigError: a method is missing, lacks an argument or asks for another: this TRL is not one that it was tested
            with.
    """
    for name, expected in _GRPO_METHODS.items():
        method = getattr(trainer, name, None)
        if method is None:
            raise _untested(f"there is no {trainer.__name__}.{name}")
        try:
            found = inspect.signature(method)
            found.bind(None, *expected)
            found.bind(None, **dict.fromkeys(expected))
        except TypeError as error:
            raise _untested(f"{trainer.__name__}.{name} takes other arguments than {expected} ({error})") from error


def check_grpo_attributes(trainer: Any) -> None:
    """
    Check that a `GRPOTrainer` has the attributes that `OnlinePreferenceTrainer` reads.

    Args:
        trainer (`GRPOTrainer`): After its `__init__`.

    Raises:
        ConfigError: an attribute is missing: this TRL is not one that it was tested with.
    """
    missing = [name for name in _GRPO_ATTRIBUTES if not hasattr(trainer, name)]
    if missing:
        raise _untested(f"GRPOTrainer has no attribute {', '.join(missing)}")


def check_generated(keys: Collection[str]) -> None:
    """
    Whether a batch that `GRPOTrainer` generated holds what `OnlinePreferenceTrainer` reads, and no images, which it
    would lose.

    Args:
        keys (`Collection[str]`): The batch's.

    Raises:
        ConfigError: a key is missing, or belongs to images.
    """
    missing = sorted(_GRPO_KEYS - set(keys))
    images = sorted(key for key in keys if any(word in key for word in _IMAGES))
    if missing:
        raise _untested(f"a generated batch lacks {', '.join(missing)}")
    if images:
        raise ConfigError(
            f"the prompts hold images (a generated batch has {', '.join(images)}), and OnlinePreferenceTrainer reads "
            "text only. Use GRPOTrainer."
        )


def balances_experts(trainer: Any) -> bool:
    """Return True if a `GRPOTrainer` adds the load-balancing loss of a policy with experts. TRL 1.0 does not."""
    return bool(getattr(trainer, "aux_loss_enabled", False))


def use_adapter() -> Any:
    """
    TRL's context manager that runs a PEFT model with another adapter, or with none.

    Raises:
        ConfigError: this TRL has none.
    """
    try:
        from trl.trainer.utils import use_adapter as found
    except ImportError as error:
        raise _untested("there is no trl.trainer.utils.use_adapter") from error
    return found


def end_tokens(trainer: Any) -> set[int]:
    """The tokens of which `GRPOTrainer` takes one at a completion's end for a sign that it was not cut off."""
    tokenizer = inner_tokenizer(trainer.processing_class)
    # TRL < 1.14.2 knows one end token; drop with the floor.
    return {*getattr(trainer, "eos_token_ids", [tokenizer.eos_token_id]), tokenizer.pad_token_id}


def inner_tokenizer(processing_class: Any) -> Any:
    """
    Return the tokenizer that a trainer's `processing_class` is, or that it holds if it is a processor.

    A tokenizer may have an attribute `tokenizer` that is something else (`MistralCommonBackend`).
    """
    from transformers import ProcessorMixin

    return processing_class.tokenizer if isinstance(processing_class, ProcessorMixin) else processing_class


def unwrapped_policy(trainer: Any) -> Any:
    """Return the policy of a trainer without the wrappers of distributed training."""
    accelerator = getattr(trainer, "accelerator", None)
    return trainer.model if accelerator is None else accelerator.unwrap_model(trainer.model)


def has_environments(trainer: Any) -> bool:
    """Return True if a trainer's prompts have tools of environments, which differ between the rows of a batch."""
    return getattr(trainer, "environment_factories", None) is not None


def conversation_arguments(trainer: Any) -> tuple[dict[str, Any] | None, list[Any] | None]:
    """
    Return the variables and the tools with which a trainer renders the policy's prompts.

    GRPO, RLOO and `OnlinePreferenceTrainer` have both or the variables; online DPO has none. Tools of environments
    differ by row, and are left out.
    """
    kwargs = getattr(trainer, "chat_template_kwargs", None) or getattr(trainer.args, "chat_template_kwargs", None)
    tools = None if has_environments(trainer) else getattr(trainer, "tools", None)
    return kwargs or None, tools or None


def policy_prompt_ids(trainer: Any, prompts: list[Any]) -> list[list[int]] | None:
    """
    Return the token ids that a trainer's policy reads for prompts; `None` if the trainer can't be asked.

    GRPO and RLOO are asked by their own method. If a TRL lacks it, and for online DPO, prompts are rendered as these
    trainers do.

    Args:
        trainer: A trainer of TRL or `OnlinePreferenceTrainer`.
        prompts (`list`): Strings or conversations, all of one kind.
    """
    tokenize = getattr(trainer, "_tokenize_prompts", None)
    try:
        if tokenize is not None:
            result = tokenize(prompts)
            ids = result[0] if isinstance(result, tuple) else result
        elif isinstance(prompts[0], str):
            ids = trainer.processing_class(text=prompts, add_special_tokens=not is_online_dpo(trainer.args))[
                "input_ids"
            ]
        else:
            kwargs, tools = conversation_arguments(trainer)
            template = getattr(trainer, "chat_template", None)
            ids = []
            for prompt in prompts:
                continues = is_online_dpo(trainer.args) and prompt[-1]["role"] == "assistant"
                rendered = trainer.processing_class.apply_chat_template(
                    prompt,
                    chat_template=template,
                    tools=tools,
                    add_generation_prompt=not continues,
                    continue_final_message=continues,
                    return_dict=True,
                    **(kwargs or {}),
                )
                ids.append(rendered["input_ids"])
        return [[int(id) for id in row] for row in ids]
    except Exception:  # images, other processors: whatever the method can't take
        return None


def splits_groups(trainer: Any, num_rows: int) -> bool:
    """
    Return True if a trainer's processes may hold parts of the completions of one prompt.

    Args:
        trainer: GRPO's or RLOO's; `None` if it is not known.
        num_rows (`int`): Completions of one process in a call; all processes have as many.
    """
    is_training = getattr(getattr(trainer, "model", None), "training", True)
    size = getattr(trainer, "num_generations" if is_training else "num_generations_eval", None)
    return isinstance(size, int) and num_rows % size != 0


def has_judges() -> bool:
    """Return True if TRL's trainers take judges. TRL 1.1 removed them (trl#5485)."""
    return Version(version("trl")).release < (1, 1)


def generation_ends(trainer: Any) -> list[int]:
    """Where a trainer lets its policy stop, as far as it says so: GRPO and RLOO do from TRL 1.14.2."""
    return [*getattr(trainer, "eos_token_ids", ())]


def fused_head() -> Any:
    """TRL's function that makes a model return log-probabilities without its logits; None before TRL 1.15."""
    try:
        from trl.trainer.utils import add_fused_lm_head
    except ImportError:
        return None
    return add_fused_lm_head


@contextmanager
def without_deepspeed() -> Iterator[None]:
    """Keep from transformers, for a while, the DeepSpeed config by which `from_pretrained` partitions under ZeRO-3."""
    from transformers.integrations import deepspeed

    held = deepspeed._hf_deepspeed_config_weak_ref  # what sets and unsets it is public, what reads it is not
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = held


def attention_implementation(config: Any) -> str | None:
    """Return how a transformers model computes attention, such as `"sdpa"` or `"eager"`; `None` if it is not known."""
    return getattr(config, "_attn_implementation", None)


def keeps_recurrent_state(model: Any) -> bool:
    """Return True if a transformers model keeps a recurrent state, with or without keys and values."""
    return bool(getattr(model, "_is_stateful", False))


def is_dispatched(module: Any) -> bool:
    """Return True if accelerate moves a module's inputs or weights between devices (`device_map`)."""
    return hasattr(module, "_hf_hook")


def prepare_inputs(trainer: Any, batch: Any) -> Any:
    """Return a batch as a trainer of transformers or TRL gives it to its loss. GRPO and RLOO generate here."""
    return trainer._prepare_inputs(batch)


def children(module: Any) -> dict[str, Any]:
    """Return a torch module's own table of its children, which may be changed. An entry may be `None`."""
    return module._modules  # type: ignore[no-any-return]


def clear_hooks(module: Any) -> None:
    """Remove all hooks of a torch module, and the forward that a library has put in the place of its class's."""
    vars(module).pop("forward", None)
    for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        getattr(module, hooks).clear()


def without_peft(module: Any) -> Any:
    """Return the module that PEFT has wrapped in a tuner's layer or stored with a trained copy; any other unchanged."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    while True:
        if isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
        elif "original_module" in children(module):  # stored with a trained copy (modules_to_save)
            module = module.original_module
        else:
            return module


def is_merged(module: Any) -> bool:
    """Return True if a PEFT layer has its adapter merged into the weights of its base."""
    return bool(getattr(module, "merged", False))


def cpu_attention() -> Any:
    """
    Return the kernel that torch's `scaled_dot_product_attention` runs on a CPU, or `None` if this torch has none.

    It also returns the log-sum-exp of the scores, (B, heads, Q).
    """
    import torch

    return getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)


def _untested(what: str) -> ConfigError:
    return ConfigError(
        f"OnlinePreferenceTrainer was tested with TRL 1.0 to 1.16 on text; in TRL {version('trl')} {what}. Install a "
        "version that it was tested with, or use GRPOTrainer."
    )


def register_pairwise_judge(judge: type) -> None:
    """
    Make a class a subclass of TRL's `BasePairwiseJudge` in the eyes of `isinstance`. Without effect where TRL has no
    judges.

    Args:
        judge (`type`): Has the method `judge` of TRL's protocol.
    """
    if not has_judges():  # looking for them would load trl.experimental; drop with the floor
        return
    from trl.experimental.judges import BasePairwiseJudge

    BasePairwiseJudge.register(judge)


def _find(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
