"""One frozen causal language model: load it, check it, and turn rows into per-token log-probabilities.

Knows no prompt, no text and no partner: `encoding` makes the rows, `pair` holds two of these.
"""

import logging
from collections.abc import Iterator, Mapping
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
from .forward import Decoder, Job, OwnLogits, Packed, Padded, Way, why_not_packed
from .logps import LOGITS_PER_CHUNK, Reduce, token_logps
from .packing import MIN_PREFIX, Layout

logger = logging.getLogger(__name__)

# Packing pays for its mask where it runs at most this share of the tokens that padding would.
PACKED_SHARE = 0.8

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
        prefix_cache_tokens (`int`, *optional*, defaults to 8192): Tokens of constant prefixes whose keys and values are
            kept between calls; 0 keeps none.
        seed (`int`, *optional*, defaults to 0): Draws the tokens of the check below.

    Rows are packed (equal prompts and a common prefix are run once) or padded, whichever runs fewer tokens. That both
    give the model's own log-probabilities is checked once, on a few short random rows. A model that packing does not
    suit takes the padded way only, and one that padding does not suit either runs row by row; `way` says which and why.

    Raises:
        ModelError: an encoder-decoder, or a model without a language-modelling head.
    """

    def __init__(self, model: nn.Module, role: str, *, prefix_cache_tokens: int = 8192, seed: int = 0) -> None:
        config = _text_config(model, role)
        if cast(Any, model).get_output_embeddings() is None:
            raise ModelError(
                f"{role} is a {type(model).__name__}, which has no language-modelling head. Load it with "
                "AutoModelForCausalLM."
            )
        self.model = cast(Any, model)
        self._role = role
        self._config = config
        self.decoder = Decoder(model, config)
        self._own = OwnLogits(self.decoder)
        self._padded: Padded | None = None  # until the check has let it pass
        self._packed: Packed | None = None
        self._is_checked = False
        self._reason = ""
        self._prefix_cache_tokens = prefix_cache_tokens
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
        **kwargs: Any,
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
            **kwargs: The class's.

        Raises:
            ModelError: nothing can be loaded from there, an encoder-decoder, or weights that the checkpoint lacks.
        """
        _refuse_partial_weights(role)
        place = _find_device(device)
        loading = {
            "revision": revision,
            "dtype": _choose_dtype(dtype, place),
            "device_map": {"": place},
            "trust_remote_code": False,
            "use_safetensors": True,
            **(init_kwargs or {}),
        }
        old_name = loading.pop("torch_dtype", None)
        loading["dtype"] = old_name or loading["dtype"]
        try:
            config = AutoConfig.from_pretrained(name, **hub_kwargs(loading))
            _refuse_encoder_decoder(config, role)
            cuda = [place.index or 0] if place.type == "cuda" else []
            with torch.random.fork_rng(devices=cuda):  # loading may draw; the trainer's numbers must not shift
                model, report = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **loading)
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
        return cls(model, role, **kwargs)

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

    def per_token_logps(
        self, layout: Layout, *, token_budget: int, reduce: Reduce = token_logps, padded: bool = False
    ) -> list[Tensor]:
        """
        Log-probability of every completion token of every row.

        Args:
            layout (`Layout`): The rows, in any order; each is non-empty and fits the model's positions.
            token_budget (`int`): Tokens of one forward, padding included. Where a forward runs out of memory, the rows
                that are left are laid out anew with half its tokens.
            reduce (`Callable`, *optional*, defaults to `token_logps`): What is kept of each token's logits.
            padded (`bool`, *optional*, defaults to `False`): Pad, also where packing would run fewer tokens.

        Returns:
            `list[Tensor]`: per row a tensor of shape (C,), float32 on the CPU, nats, C its completion tokens; (C, 3)
            with `token_statistics`.

        Raises:
            ModelError: a single row is too much for the memory.
        """
        with self._frozen():
            self._check()
            way = self._choose(layout, token_budget)
            if padded and self._padded is not None:
                way = self._padded
            if layout.longest > self.decoder.rope_switch:
                token_budget = 1  # each row alone, as its own length decides on its positions
            results = self._run(way, layout, token_budget, reduce)
            if way is self._packed and self._padded is not None:
                # What is not finite reaches a pack's other rows through a weight of 0: run those rows apart.
                broken = [index for index, logps in enumerate(results) if not logps.isfinite().all()]
                again = self._run(self._padded, layout.subset(broken), token_budget, reduce)
                for index, logps in zip(broken, again, strict=True):
                    results[index] = logps
        return results

    def way(self) -> tuple[str, str]:
        """How this model runs rows (`"packed"`, `"padded"` or `"row by row"`), and why not in the way before it."""
        with self._frozen():
            self._check()
        if self._padded is None:
            return "row by row", self._reason
        return ("padded" if self._packed is None else "packed"), self._reason

    def describe(self, *, token_budget: int) -> dict[str, Any]:
        """How the model will run, for people. `prefix_mb`: at most; `work_mb`: about, for a forward of the budget."""
        way, reason = self.way()
        parameters = list(self.model.parameters())
        return {
            "name": self.name,
            "revision": getattr(self._config, "_commit_hash", None),
            "architecture": type(self.model).__name__,
            "parameters": sum(parameter.numel() for parameter in parameters),
            "weights_mb": sum(parameter.numel() * parameter.element_size() for parameter in parameters) / 2**20,
            "dtype": str(self.decoder.dtype).removeprefix("torch."),
            "device": str(self.decoder.device),
            "prefix_mb": self._prefix_cache_tokens * self._kept_values() * self.decoder.dtype.itemsize / 2**20,
            "work_mb": self._work_bytes(token_budget) / 2**20,
            "attention": self._config._attn_implementation,
            "way": way,
            "reason": reason,
        }

    def _kept_values(self) -> int:
        """Numbers that the keys and values of a kept token are, over all layers."""
        if self._packed is None:
            return 0
        heads: int = self._config.num_attention_heads
        size: int = getattr(self._config, "head_dim", None) or self._config.hidden_size // heads
        kept_heads: int = getattr(self._config, "num_key_value_heads", None) or heads
        return 2 * int(self._config.num_hidden_layers) * kept_heads * size

    def _work_bytes(self, token_budget: int) -> int:
        """What a forward needs beside the weights: some hidden states, a layer's inner ones, and a chunk of logits."""
        tokens = self.decoder.batch_tokens(token_budget)
        hidden: int = self._config.hidden_size
        inner: int = getattr(self._config, "intermediate_size", None) or 4 * hidden
        return tokens * (6 * hidden + 3 * inner) * self.decoder.dtype.itemsize + 3 * 4 * LOGITS_PER_CHUNK

    def _choose(self, layout: Layout, token_budget: int) -> Way:
        """The way that runs fewer tokens. Depends on the rows alone, so that scores do not depend on the cache."""
        if self._padded is None:
            return self._own
        if self._packed is None or layout.longest > self.decoder.rope_switch:
            return self._padded
        unique = sum(job.num_tokens for job in self._packed.plan(layout, token_budget))
        if not self._packed.keeps(layout):
            unique += len(layout.prefix)
        padded = sum(job.num_tokens for job in self._padded.plan(layout, token_budget))
        return self._packed if unique <= PACKED_SHARE * padded else self._padded

    def _run(self, way: Way, layout: Layout, token_budget: int, reduce: Reduce) -> list[Tensor]:
        results: list[Tensor] = [torch.empty(0)] * len(layout.rows)
        names = list(range(len(layout.rows)))  # what the rows that are left are called in `results`
        jobs = way.plan(layout, token_budget)
        while jobs:
            job, *jobs = jobs
            logps = self._try(way, layout, job, reduce)
            if logps is None:
                clear_device_cache()
                left = [index for other in (job, *jobs) for index in other.rows]
                layout, names = layout.subset(left), [names[index] for index in left]
                jobs = way.plan(layout, job.num_tokens // 2)
                continue
            for index, row_logps in zip(job.rows, logps, strict=True):
                results[names[index]] = row_logps
        return results

    def _try(self, way: Way, layout: Layout, job: Job, reduce: Reduce) -> list[Tensor] | None:
        """A job's log-probabilities, or None where the memory was too small for its rows."""
        try:
            return way.run(layout, job, reduce)
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            if len(job.rows) == 1:
                raise ModelError(
                    f"{self._role} ran out of memory on a single row of {len(layout.rows[job.rows[0]].ids)} tokens. "
                    "Pass a smaller cdr_max_length, cdr_dtype='bfloat16', or another cdr_device."
                ) from error
            return None

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        """Evaluation mode without gradients and autocast; every module's training flag is put back."""
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        try:
            with torch.inference_mode(), torch.autocast(self.decoder.device.type, enabled=False):
                yield
        finally:
            for module in training:
                module.training = True

    def _check(self) -> None:
        """Keep the ways that give the model's own log-probabilities on a few short rows."""
        if self._is_checked:
            return
        layout = _probe(min(self.num_embeddings, 256), self.num_positions, seed=self._seed)
        expected = torch.cat([logps for job in self._own.plan(layout, 1) for logps in self._own.run(layout, job)])
        padded = Padded(self.decoder)
        self._reason = self._differs(padded, layout, expected) or ""
        if not self._reason:
            self._padded = padded
            self._reason = why_not_packed(self.decoder) or ""
        if not self._reason:
            packed = Packed(self.decoder, prefix_cache_tokens=self._prefix_cache_tokens)
            self._reason = self._differs(packed, layout, expected) or ""
            self._packed = None if self._reason else packed
        self._is_checked = True
        self._say_which()

    def _differs(self, way: Way, layout: Layout, expected: Tensor) -> str | None:
        """How the log-probabilities of a way differ from the model's own, or None if they don't."""
        results: dict[int, Tensor] = {}
        try:
            for job in way.plan(layout, 512):
                results |= dict(zip(job.rows, way.run(layout, job), strict=True))
        except (AttributeError, TypeError, ValueError, RuntimeError, LookupError) as error:
            if should_reduce_batch_size(error):
                raise
            return f"it fails there: {error}"
        logps = torch.cat([results[index] for index in range(len(layout.rows))])
        tolerance = _TOLERANCE.get(self.decoder.dtype, 3e-1)
        if torch.allclose(logps, expected, rtol=0, atol=tolerance, equal_nan=True):
            return None
        return f"log-probabilities differ from its own by up to {(logps - expected).abs().max():.2g} nats"

    def _say_which(self) -> None:
        name, reason = self.way()
        level = logging.WARNING if name == "row by row" else logging.INFO
        because = f", not in the faster way: {reason}" if reason else ""
        logger.log(level, "%s (%s, %s) runs %s%s.", self._role, self.name, type(self.model).__name__, name, because)


def _probe(num_ids: int, num_positions: int | None, *, seed: int) -> Layout:
    """
    Two prompts behind a common prefix, with two completions each, of random tokens.

    The ids are low ones: among the high ones are placeholders of images, which some forwards refuse.
    """
    room = 64 if num_positions is None else num_positions
    num_prefix = max(0, min(MIN_PREFIX + 5, room - 16))
    prompts, completions = ((3, 5), (4, 7)) if room >= 16 else ((1, 2), (1, 2))
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(num_ids, (count,), generator=generator).tolist())

    prefix = draw(num_prefix)
    return Layout([Row(prompt, draw(m)) for prompt in [prefix + draw(n) for n in prompts] for m in completions])


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
