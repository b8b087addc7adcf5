"""One frozen causal language model: check it, and turn rows into per-token log-probabilities.

Knows no prompt, no text and no partner: `encoding` makes the rows, `pair` holds two of these.
"""

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn
from transformers import PretrainedConfig

from .. import _compat
from ..errors import ModelError
from .adapters import attach
from .checkpoint import identify_weights
from .forward import Decoder, Job, OwnLogits, Padded, Way
from .load_check import LoadCheck, missing_input, short_windows
from .loading import load_model, refuse_encoder_decoder
from .logps import Reduce, token_logps
from .memory import prefix_bytes, weight_bytes, work_bytes
from .packed import VERIFIED, Packed, why_not_packed
from .packing import Layout
from .sources import Adapter

logger = logging.getLogger(__name__)

# Packing pays for its mask where it runs at most this share of the tokens that padding would.
PACKED_SHARE = 0.8


class CausalLM:
    """
    A causal language model that is only ever read: in evaluation mode, without gradients, outside of autocast.

    A module that the caller holds is used where it is and as it is: neither moved nor changed, its training flags
    restored after each call. Use [`CausalLM.load`] for a name or a path.

    Args:
        model (`nn.Module`): A decoder with a language-modelling head, from transformers, or a `PeftModel` around one.
        role (`str`): `"strong"` or `"weak"`, for messages.
        prefix_cache_tokens (`int`, *optional*, defaults to 0): Tokens of constant prefixes whose keys and values are
            kept between calls. Only for weights that nobody changes: optimizers, callbacks and adapters leave no trace
            that could be relied on, and keys and values of other weights give wrong scores without a word.
        seed (`int`, *optional*, defaults to 0): Draws the tokens of the check below.

    Rows are packed (equal prompts and a common prefix are run once) or padded, whichever runs fewer tokens. That both
    give the model's own log-probabilities is checked once, on a few short random rows. A model that packing does not
    suit takes the padded way only, and one that padding does not suit either runs row by row; `way` says which and why.

    Raises:
        ModelError: an encoder-decoder, or a model without a language-modelling head. At the first call: its own forward
            fails, or its log-probabilities of a token depend on later tokens.
    """

    def __init__(self, model: nn.Module, role: str, *, prefix_cache_tokens: int = 0, seed: int = 0) -> None:
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
        self._is_logged = False
        self._reason = ""
        self._prefix_cache_tokens = prefix_cache_tokens
        self._seed = seed
        # Of what was loaded: the model itself, to be shared, what was put on it, and which weights they are.
        self.base: nn.Module | None = None
        self.adapter: Adapter | None = None
        self._weights: str | None = None
        # Since a forward ran out of memory: tokens of one, and of a row that is packed.
        self._most_tokens: int | None = None
        self._longest_packed: float = math.inf
        # Called before the weights are read: they may have been put to sleep; see `offload`.
        self.wake: Callable[[], None] = _stay_awake

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
        adapter: Adapter | None = None,
        base: nn.Module | None = None,
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
            adapter (`Adapter`, *optional*): What is put on the checkpoint.
            base (`nn.Module`, *optional*): The same checkpoint, loaded by another: `base` of that one. Its weights are
                used in place of a second copy, and an adapter that the other has is none of this one's.
            **kwargs: The class's.

        Raises:
            ModelError: nothing can be loaded from there, an encoder-decoder, weights that the checkpoint lacks, or an
                adapter that does not fit it.
            ConfigError: there is an adapter, and peft is not installed.
        """
        if base is None:
            base = load_model(name, role, revision=revision, dtype=dtype, device=device, init_kwargs=init_kwargs)
        lm = cls(base if adapter is None else attach(base, adapter, role), role, **kwargs)
        lm.base, lm.adapter = base, adapter
        lm._weights = identify_weights(name, role, revision=revision, init_kwargs=init_kwargs)
        return lm

    @property
    def weights(self) -> str | None:
        """Which weights were loaded, as `identify_weights` has it; `None` for a module that the caller holds."""
        return self._weights

    @property
    def name(self) -> str:
        """The checkpoint's name or path, as the config remembers it."""
        return str(self._config.name_or_path or type(self.model).__name__)

    @property
    def is_known_to_pack(self) -> bool:
        """True if the tests have compared packs of this model's type with its own logits. Runs nothing."""
        return self._config.model_type in VERIFIED

    @property
    def num_embeddings(self) -> int:
        """Token ids that the model can read and predict: V, or a little more where both are padded."""
        ends = (self.model.get_input_embeddings(), self.model.get_output_embeddings())
        return min(int(end.weight.shape[0]) for end in ends)

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
            token_budget (`int`): Tokens of one forward, padding included. Where a forward runs out of memory, kept
                prefixes are dropped and the rows that are left are laid out anew with half its tokens; later calls
                start there.
            reduce (`Callable`, *optional*, defaults to `token_logps`): What is kept of each token's logits.
            padded (`bool`, *optional*, defaults to `False`): Pad, also where packing would run fewer tokens.

        Returns:
            `list[Tensor]`: per row a tensor of shape (C,), float32 on the CPU, nats, C its completion tokens; (C, 3)
            with `token_statistics`.

        Raises:
            ModelError: a single row is too much for the memory.
        """
        self.wake()
        with self._frozen():
            self._check()
            token_budget = self._budget(token_budget)
            self._log_way(layout, token_budget)
            way = self._choose(layout, token_budget)
            if padded and self._padded is not None:
                way = self._padded
            if layout.longest >= self.decoder.rope_switch:
                token_budget = 1  # each row alone, as its own length decides on its positions
            results = self._run(way, layout, token_budget, reduce)
            if way is self._packed and self._padded is not None:
                # What is not finite reaches a pack's other rows through a weight of 0: run those rows apart.
                broken = [index for index, logps in enumerate(results) if not logps.isfinite().all()]
                again = self._run(self._padded, layout.subset(broken), token_budget, reduce)
                for index, logps in zip(broken, again, strict=True):
                    results[index] = logps
        return results

    def count_tokens(self, layout: Layout, *, token_budget: int) -> int:
        """Tokens that `per_token_logps` would run for these rows, padding included, a prefix that is kept not."""
        self._ensure_checked()
        token_budget = self._budget(token_budget)
        return self._tokens(self._choose(layout, token_budget), layout, token_budget)

    def way(self) -> tuple[str, str]:
        """How this model runs rows (`"packed"`, `"padded"` or `"row by row"`), and why it is not faster, or `""`."""
        self._ensure_checked()
        if self._padded is None:
            return "row by row", self._reason
        return ("padded" if self._packed is None else "packed"), self._reason

    def explain_way(self) -> str:
        """Return how this model runs rows, and why it is not faster, as a sentence without its full stop."""
        way, reason = self.way()
        what = f"{self._role} ({self.name}, {type(self.model).__name__}) runs {way}"
        if not reason:
            return what
        return f"{what} {reason}" if way == "packed" else f"{what}, not packed: {reason}"

    def rest(self, *, keep: bool) -> None:
        """Have kept prefixes leave the device: for the host's memory, or for good."""
        if self._packed is not None:
            self._packed.rest() if keep else self._packed.drop()

    @property
    def keeps_prefixes(self) -> bool:
        """Whether keys and values are kept for later calls."""
        return self._packed is not None and self._packed.is_keeping

    def drop_prefixes(self) -> None:
        """Let go of all keys and values that are kept: the weights have changed."""
        if self._packed is not None:
            self._packed.drop()

    def describe(self, *, token_budget: int) -> dict[str, Any]:
        """How the model will run, for people. `prefix_mb`: at most; `work_mb`: about, for a forward of the budget."""
        way, reason = self.way()
        return {
            "name": self.name,
            "weights": self._weights,
            "adapter": None if self.adapter is None else self.adapter.name,
            "adapter_weights": None if self.adapter is None else self.adapter.weights,
            "architecture": type(self.model).__name__,
            "parameters": self.model.num_parameters(),
            "weights_mb": weight_bytes(self.model) / 2**20,
            "dtype": str(self.decoder.dtype).removeprefix("torch."),
            "device": str(self.decoder.device),
            "prefix_mb": prefix_bytes(self.decoder, self._packed, self._prefix_cache_tokens) / 2**20,
            "work_mb": work_bytes(self.decoder, self._packed, token_budget, self._prefix_cache_tokens) / 2**20,
            "attention": _compat.attention_implementation(self._config),
            "way": way,
            "reason": reason,
        }

    def _choose(self, layout: Layout, token_budget: int) -> Way:
        """The way that runs fewer tokens. Depends on the rows alone, so that scores do not depend on the cache."""
        if self._padded is None:
            return self._own
        is_short = layout.longest < self.decoder.rope_switch and layout.longest <= self._longest_packed
        if self._packed is None or not is_short:
            return self._padded
        unique, padded = (self._tokens(way, layout, token_budget) for way in (self._packed, self._padded))
        return self._packed if unique <= PACKED_SHARE * padded else self._padded

    def _tokens(self, way: Way, layout: Layout, token_budget: int) -> int:
        tokens = sum(job.num_tokens for job in way.plan(layout, token_budget))
        is_run = way is self._packed and not self._packed.keeps(layout)
        return tokens + len(layout.prefix) if is_run else tokens

    def _run(self, way: Way, layout: Layout, token_budget: int, reduce: Reduce) -> list[Tensor]:
        places: list[int] = []  # of the rows in the call, in the order in which they were run
        pieces: list[Tensor] = []
        names = list(range(len(layout.rows)))  # what the rows that are left are called in the call
        rest = layout
        jobs = way.plan(rest, self._budget(token_budget))
        try:
            while jobs:
                job, *others = jobs
                piece = self._try(way, rest, job, reduce)
                if piece is not None:
                    pieces.append(piece)
                    places += [names[index] for index in job.rows]
                    jobs = others
                    continue
                way = self._shrink(way, rest, job)
                left = [index for other in jobs for index in other.rows]
                rest, names = rest.subset(left), [names[index] for index in left]
                jobs = way.plan(rest, self._budget(token_budget))
        finally:
            if self._packed is not None:
                self._packed.forget()
        if not places:
            return []
        counts = [len(layout.rows[place].completion_ids) for place in places]
        flat = torch.cat(pieces).cpu()  # once a call: a device works on while its host plans
        by_place = dict(zip(places, torch.split(flat, counts), strict=True))
        return [by_place[place] for place in range(len(layout.rows))]

    def _budget(self, token_budget: int) -> int:
        """Tokens of one forward: as asked, or as the memory has allowed."""
        return min(token_budget, self._most_tokens or token_budget)

    def _try(self, way: Way, layout: Layout, job: Job, reduce: Reduce) -> Tensor | None:
        """A job's log-probabilities, or None where the memory was too small for it."""
        try:
            return way.run(layout, job, reduce)
        except RuntimeError as error:
            if not _compat.is_out_of_memory(error):
                raise
            if len(job.rows) == 1 and way is not self._packed:
                raise ModelError(
                    f"{self._role} ran out of memory on a single row of {len(layout.rows[job.rows[0]].ids)} tokens. "
                    "Pass a smaller cdr_max_length, cdr_dtype='bfloat16', or another cdr_device."
                ) from error
            return None

    def _shrink(self, way: Way, layout: Layout, job: Job) -> Way:
        """Make room after a job that ran out of memory, for good; returns the way that goes on."""
        if self._packed is not None:
            self._packed.drop()
        clear_device_cache()
        longest = max(len(layout.rows[index].ids) for index in job.rows)
        what = f"{self._role} ({self.name}) ran out of memory on {len(job.rows)} rows of up to {longest} tokens"
        if way is self._packed and self._padded is not None and (len(job.rows) == 1 or job.width == 1):
            # Smaller packs do not help: what stands before them is too large. Padded rows keep no keys and values.
            self._longest_packed, self._most_tokens = longest - 1, None
            logger.warning("%s: from here on rows of %d tokens and more are padded.", what, longest)
            return self._padded
        self._most_tokens = max(1, job.width // 2)
        logger.warning(
            "%s: from here on, forwards of %d tokens at most. Pass a smaller cdr_token_budget to start there.",
            what,
            self._most_tokens,
        )
        return way

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

    def _ensure_checked(self) -> None:
        if not self._is_checked:
            self.wake()
            with self._frozen():
                self._check()

    def _check(self) -> None:
        """Keep the ways that give the model's own log-probabilities on a few short rows."""
        if self._is_checked:
            return
        with short_windows(self._config):
            try:
                check = LoadCheck(
                    self._own,
                    dtype=self.decoder.dtype,
                    num_ids=self.num_embeddings,
                    num_positions=self.num_positions,
                    seed=self._seed,
                    has_experts=self.decoder.has_experts,
                )
                later = check.sees_later_tokens()
            except Exception as error:  # remote code and kernels may raise any exception
                if _compat.is_out_of_memory(error):
                    raise
                raise ModelError(self._why_it_fails(error)) from error
            if later is not None:
                raise ModelError(self._why_it_looks_ahead(later))
            padded, packed = Padded(self.decoder), Packed(self.decoder, prefix_cache_tokens=self._prefix_cache_tokens)
            padded_reason = check.differs(padded, "padded")
            reason = padded_reason or why_not_packed(self.decoder) or missing_input(self.decoder)
            reason = reason or check.differs(packed, "packed")
        packed.drop()  # what was run under short windows
        self._padded = None if padded_reason else padded
        self._packed = None if reason else packed
        self._reason = reason or packed.lost_speed or ""
        self._is_checked = True

    def _why_it_fails(self, error: Exception) -> str:
        types = Counter(parameter.dtype for parameter in self.model.parameters() if parameter.is_floating_point())
        message = f"{self._role} ({self.name}) fails on a short row: {error}."
        if len(types) > 1:
            counts = ", ".join(f"{count} {str(dtype).removeprefix('torch.')}" for dtype, count in types.most_common())
            message += (
                f" Its parameters have several types ({counts}), and rewards are computed outside of autocast. Give it "
                "one type, as by model.to(torch.bfloat16)."
            )
        return message

    def _why_it_looks_ahead(self, difference: str) -> str:
        return (
            f"{self._role} ({self.name}) is a {type(self.model).__name__} whose log-probabilities of a token change by "
            f"{difference} if later tokens change. Each token must depend on earlier tokens only. Use a causal "
            "language model, or make this one causal in its config (is_decoder=True for BERT, "
            "use_bidirectional_attention=False for Gemma 3)."
        )

    def _log_way(self, layout: Layout, token_budget: int) -> None:
        """
        Log once how the model runs rows: a warning if speed is lost, with the reason and the cost on the first call.
        """
        if self._is_logged or not layout.rows:
            return
        self._is_logged = True
        if self._packed is not None:
            logger.log(logging.WARNING if self._reason else logging.INFO, "%s.", self.explain_way())
            return
        is_slower = self._padded is None or self.is_known_to_pack
        tokens = self._tokens(self._choose(layout, token_budget), layout, token_budget)
        logger.log(
            logging.WARNING if is_slower else logging.INFO,
            "%s. The first call runs %d tokens for %d unique tokens (%.1f times).",
            self.explain_way(),
            tokens,
            layout.num_unique,
            tokens / layout.num_unique,
        )


def _stay_awake() -> None:
    """For weights that nobody puts to sleep."""


def _text_config(model: nn.Module, role: str) -> PretrainedConfig:
    config = getattr(model, "config", None)
    if not isinstance(config, PretrainedConfig):
        raise ModelError(
            f"{role} is a {type(model).__name__}, which is no transformers model. Pass a name, a path or a model that "
            "AutoModelForCausalLM loaded."
        )
    refuse_encoder_decoder(config, role)
    return config.get_text_config()
