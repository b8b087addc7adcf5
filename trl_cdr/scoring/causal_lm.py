"""One frozen causal language model: load it, check it, and turn rows into per-token log-probabilities.

Knows no prompt, no text and no partner: `encoding` makes the rows, `pair` holds two of these.
"""

import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.integrations import is_deepspeed_zero3_enabled

from ..errors import ConfigError, ModelError
from .encoding import Row
from .logps import head_logps
from .packing import plan_batches

logger = logging.getLogger(__name__)

# Largest difference, in nats per token, at which two ways to the same log-probability count as equal.
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3, torch.float16: 5e-2, torch.bfloat16: 3e-1}


class CausalLM:
    """
    A causal language model that is only ever read: in evaluation mode, without gradients, outside of autocast.

    A module that the caller holds is used where it is and as it is: neither moved nor changed, its training flags
    restored after each call. Use [`CausalLM.load`] for a name or a path.

    Args:
        model (`nn.Module`): A decoder with a language-modelling head, from transformers.
        role (`str`): `"strong"` or `"weak"`, for messages.
        seed (`int`, *optional*, defaults to 0): Draws the tokens of the check below.

    The head is applied to gathered hidden states (see `logps`). That this gives the model's own logits is checked
    once, on two short random rows; where it does not, rows are run one by one through the model's own forward.

    Raises:
        ModelError: an encoder-decoder, or a model without a language-modelling head.
    """

    def __init__(self, model: nn.Module, role: str, *, seed: int = 0) -> None:
        self.model = cast(Any, model)
        self._role = role
        self._config = _text_config(model, role)
        self._head = self.model.get_output_embeddings()
        if self._head is None:
            raise ModelError(
                f"{role} is a {type(model).__name__}, which has no language-modelling head. Load it with "
                "AutoModelForCausalLM."
            )
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._is_checked = self._can_gather = False
        self._seed = seed

    @classmethod
    def load(
        cls,
        name: str,
        role: str,
        *,
        revision: str | None = None,
        dtype: str = "auto",
        device: str = "auto",
        init_kwargs: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> "CausalLM":
        """
        Load a checkpoint, frozen, on one device.

        Args:
            name (`str`): Name on the Hub or path. Only safetensors, no remote code, unless `init_kwargs` say otherwise.
            role (`str`): `"strong"` or `"weak"`, for messages.
            revision (`str`, *optional*): Branch, tag or commit.
            dtype (`str`, *optional*, defaults to `"auto"`): The checkpoint's; float32 on CPU.
            device (`str`, *optional*, defaults to `"auto"`): The process's own device.
            init_kwargs (`Mapping`, *optional*): For `from_pretrained`; wins over all of the above.
            seed (`int`, *optional*, defaults to 0): See the class.

        Raises:
            ModelError: nothing can be loaded from there, an encoder-decoder, or weights that the checkpoint lacks.
        """
        _refuse_partial_weights(role)
        place = _find_device(device)
        kwargs = {
            "revision": revision,
            "dtype": _choose_dtype(dtype, place),
            "device_map": {"": place},
            "trust_remote_code": False,
            "use_safetensors": True,
            **(init_kwargs or {}),
        }
        loading_dtype = kwargs.pop("torch_dtype", None)  # the old name of dtype
        kwargs["dtype"] = loading_dtype or kwargs["dtype"]
        try:
            config = AutoConfig.from_pretrained(name, **hub_kwargs(kwargs))
            _refuse_encoder_decoder(config, role)
            cuda = [place.index or 0] if place.type == "cuda" else []
            with torch.random.fork_rng(devices=cuda):  # loading may draw; the trainer's numbers must not shift
                model, report = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **kwargs)
        except ModelError:
            raise
        except Exception as error:  # the libraries below have a dozen ways to say that it can't be loaded
            raise ModelError(
                f"{role} is {name!r}, which can't be loaded as a causal language model: {error}"
            ) from error
        missing = sorted(report["missing_keys"])
        if missing:
            raise ModelError(
                f"{role} is {name!r}, whose checkpoint lacks {len(missing)} weights ({missing[0]}, ...): they would be "
                "random. Use a checkpoint of a causal language model."
            )
        model.requires_grad_(False)
        model.eval()
        return cls(model, role, seed=seed)

    @property
    def name(self) -> str:
        """The checkpoint's name or path, as the config remembers it."""
        return str(getattr(self._config, "_name_or_path", "") or type(self.model).__name__)

    @property
    def num_embeddings(self) -> int:
        """Token ids that the model can read: V, or a little more where the embedding is padded."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    @property
    def num_positions(self) -> int | None:
        """Tokens that the model can read at once, or None where it has no limit."""
        positions = getattr(self._config, "max_position_embeddings", None)
        return None if positions is None or positions <= 0 else int(positions)

    @property
    def end_ids(self) -> frozenset[int]:
        """The ids at which the model's own generation stops."""
        ids = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        return frozenset() if ids is None else frozenset([ids] if isinstance(ids, int) else ids)

    def per_token_logps(self, rows: Sequence[Row], *, token_budget: int) -> list[Tensor]:
        """
        Log-probability of every completion token of every row.

        Args:
            rows (`Sequence[Row]`): In any order; each is non-empty and fits the model's positions.
            token_budget (`int`): Padded tokens of one forward. Where a batch runs out of memory, the rows that are
                left are laid out anew with half its tokens.

        Returns:
            `list[Tensor]`: per row a tensor of shape (C,), float32 on the CPU, nats, C its completion tokens.

        Raises:
            ModelError: a single row is too much for the memory.
        """
        with self._frozen():
            if not self._is_checked:
                self._check()
            lengths = [len(row.ids) for row in rows]
            results: list[Tensor | None] = [None] * len(rows)
            waiting = plan_batches(lengths, token_budget)
            while waiting:
                batch, *waiting = waiting
                try:
                    logps = self._run([rows[index] for index in batch])
                except RuntimeError as error:
                    if not should_reduce_batch_size(error):
                        raise
                    if len(batch) == 1:
                        raise ModelError(
                            f"{self._role} ran out of memory on a single row of {lengths[batch[0]]} tokens. Pass a "
                            "smaller cdr_max_length, cdr_dtype='bfloat16', or another cdr_device."
                        ) from error
                    logps = None  # go on outside of this block: the error keeps the failed forward's tensors alive
                if logps is None:
                    clear_device_cache()
                    remaining = [index for other in (batch, *waiting) for index in other]
                    half = len(batch) * lengths[batch[0]] // 2
                    plan = plan_batches([lengths[index] for index in remaining], half)
                    waiting = [[remaining[place] for place in other] for other in plan]
                    continue
                for index, row_logps in zip(batch, logps, strict=True):
                    results[index] = row_logps
        return [result for result in results if result is not None]

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        """Evaluation mode without gradients and autocast; every module's training flag is put back."""
        training = [module for module in self.model.modules() if module.training]
        device = self._device
        self.model.eval()
        try:
            with torch.inference_mode(), torch.autocast(device.type, enabled=False):
                yield
        finally:
            for module in training:
                module.training = True

    @property
    def _device(self) -> torch.device:
        device: torch.device = self.model.get_input_embeddings().weight.device
        return device

    def _run(self, rows: list[Row]) -> list[Tensor]:
        if self._can_gather:
            return self._run_gathered(rows)
        return [self._run_own_logits(row) for row in rows]

    def _run_gathered(self, rows: list[Row]) -> list[Tensor]:
        """One padded forward without the head; the head only where a completion token is predicted."""
        device = self._device
        longest = max(len(row.ids) for row in rows)
        input_ids = torch.zeros(len(rows), longest, dtype=torch.long)  # (B, T)
        mask = torch.zeros_like(input_ids)  # (B, T)
        predicting = torch.zeros_like(input_ids, dtype=torch.bool)  # (B, T)
        for index, row in enumerate(rows):
            input_ids[index, : len(row.ids)] = torch.tensor(row.ids)
            mask[index, : len(row.ids)] = 1
            predicting[index, row.predicting] = True
        targets = torch.tensor([token for row in rows for token in row.completion_ids], device=device)  # (N,)
        output = self.model.base_model(
            input_ids=input_ids.to(device), attention_mask=mask.to(device), use_cache=False, return_dict=True
        )
        hidden = output.last_hidden_state[predicting.to(device)]  # (N, H)
        del output
        logps = head_logps(hidden, targets, self._logits, vocab_size=self._config.vocab_size)  # (N,)
        return list(torch.split(logps.cpu(), [len(row.completion_ids) for row in rows]))

    def _run_own_logits(self, row: Row) -> Tensor:
        """The slower path: the model's own forward, one row, its logits kept from the first prediction on."""
        device = self._device
        kept = len(row.ids) - row.predicting.start
        output = self.model(
            input_ids=torch.tensor([row.ids], device=device),
            use_cache=False,
            return_dict=True,
            **({"logits_to_keep": kept} if self._keeps_logits else {}),
        )
        targets = torch.tensor(row.completion_ids, device=device)  # (C,)
        logits = output.logits[0, output.logits.shape[1] - kept :][: len(targets)]  # (C, V)
        return head_logps(logits, targets, lambda kept: kept, vocab_size=logits.shape[1]).cpu()

    def _logits(self, hidden: Tensor) -> Tensor:
        """The head with what the architecture does to its output: (n, H) -> (n, V)."""
        logits: Tensor = self._head(hidden)
        if (scaling := getattr(self._config, "logits_scaling", None)) is not None:  # Granite
            logits = logits / scaling
        if (scale := getattr(self._config, "logit_scale", None)) is not None:  # Cohere
            logits = logits * scale
        if (cap := getattr(self._config, "final_logit_softcapping", None)) is not None:  # Gemma 2
            logits = torch.tanh(logits / cap) * cap
        return logits

    def _check(self) -> None:
        """Whether gathered states through the head, in a padded batch, give the model's own log-probabilities."""
        generator = torch.Generator().manual_seed(self._seed)
        # From the low ids: among the high ones are placeholders of images, which some forwards refuse.
        draw = torch.randint(min(self.num_embeddings, 256), (19,), generator=generator).tolist()
        rows = [Row(tuple(draw[:3]), tuple(draw[3:7])), Row(tuple(draw[7:12]), tuple(draw[12:]))]
        own = torch.cat([self._run_own_logits(row) for row in rows])
        try:
            gathered = torch.cat(self._run_gathered(rows))
            tolerance = _TOLERANCE.get(self._head.weight.dtype, 3e-1)
            self._can_gather = torch.allclose(gathered, own, rtol=0, atol=tolerance, equal_nan=True)
            reason = f"they differ by up to {(gathered - own).abs().max():.2g} nats"
        except (AttributeError, TypeError, ValueError, RuntimeError) as error:
            if should_reduce_batch_size(error):
                raise
            reason = str(error)
        if not self._can_gather:
            logger.warning(
                "%s (%s, %s) runs row by row through its own logits, which is slower: its hidden states and head did "
                "not give the same log-probabilities in a padded batch (%s).",
                self._role,
                self.name,
                type(self.model).__name__,
                reason,
            )
        self._is_checked = True


def _refuse_partial_weights(role: str) -> None:
    """Under these two, `from_pretrained` gives empty or partitioned weights, and scores that nobody would suspect."""
    if parse_flag_from_env("ACCELERATE_USE_FSDP") and parse_flag_from_env("FSDP_CPU_RAM_EFFICIENT_LOADING"):
        cause, remedy = "FSDP's RAM-efficient loading", "set fsdp_cpu_ram_efficient_loading: false"
    elif is_deepspeed_zero3_enabled():
        cause, remedy = "DeepSpeed ZeRO-3", "use ZeRO-2"
    else:
        return
    raise ModelError(
        f"{role} can't be loaded under {cause}: its weights would be empty or partitioned. Pass a model that was "
        f"loaded before the trainer's arguments were made, or {remedy}."
    )


def hub_kwargs(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `from_pretrained`'s arguments that say where a repository is, for its config and its tokenizer."""
    names = ("revision", "token", "cache_dir", "subfolder", "local_files_only", "trust_remote_code")
    return {name: kwargs[name] for name in names if name in kwargs}


def _text_config(model: nn.Module, role: str) -> PretrainedConfig:
    config = getattr(model, "config", None)
    if not isinstance(config, PretrainedConfig):
        raise ModelError(
            f"{role} is a {type(model).__name__}, which is no transformers model. Pass a name, a path or a model that "
            "AutoModelForCausalLM loaded."
        )
    _refuse_encoder_decoder(config, role)
    return config.get_text_config()


def _refuse_encoder_decoder(config: PretrainedConfig, role: str) -> None:
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{role} is a {config.model_type}, an encoder-decoder: a completion must continue its prompt in one "
            "sequence. Use a decoder-only model."
        )


def _find_device(device: str) -> torch.device:
    if device == "auto":
        return cast(torch.device, PartialState().device)
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise ConfigError(
            f"cdr_device is {device!r}, which torch does not know. Use auto, cpu or cuda:0, say."
        ) from error


def _choose_dtype(dtype: str, device: torch.device) -> torch.dtype | str:
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    return getattr(torch, dtype)  # type: ignore[no-any-return]
