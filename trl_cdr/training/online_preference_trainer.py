"""Online SimPO, DPO and IPO on N generations: TRL's GRPOTrainer with another loss.

Generation, rewards, evaluation, logging, vLLM and resuming are GRPO's. Here the rewards of a group make a pair
(`scoring.selection`), the policy is run on the pairs only, and `losses` says what they cost.
"""

import contextlib
import logging
import math
import random
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerState, TrainingArguments
from trl import GRPOTrainer

from .. import _compat
from ..errors import ConfigError
from ..scoring.selection import Pair, combine_rewards, select_pair
from .losses import TokenLogps, dpo_loss, gather_logps, ipo_loss, simpo_loss
from .online_preference_config import OnlinePreferenceConfig, check_batch_size
from .pairs_table import print_table, write_table

logger = logging.getLogger(__name__)


class _MetricsOfCheckpoint(TrainerCallback):  # type: ignore[misc]
    """Tells an `OnlinePreferenceTrainer` when the state of the checkpoint that it resumes is there."""

    def __init__(self, trainer: "OnlinePreferenceTrainer") -> None:
        self._trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:  # noqa: ARG002
        self._trainer.resume_metrics(state)


class OnlinePreferenceTrainer(GRPOTrainer):  # type: ignore[misc]
    """
    Train a policy on pairs of its own completions: of `num_generations` to a prompt, the reward functions say which is
    chosen and which is rejected.

    Rewards are used as they are, weighted by `reward_weights` and added; there are no advantages. A pair whose rewards
    tie, are missing (None or NaN) or differ by less than `min_margin` has weight 0 and is counted; batches have the
    same shape on every process. The loss of a micro-batch is the sum of its weighted losses over its number of pairs,
    and gradients accumulated over smaller batches are those of one larger batch. `eval_loss` is the mean over the pairs
    of the whole evaluation that have weight, NaN where none has: it says nothing of those that have not, so that the
    best checkpoint is by default the one with the highest `eval_reward`.

    Policy and reference are run on the chosen and the rejected completions only, without temperature, however the
    completions were sampled. This trainer keeps no float32 copy of the logits; with `bf16=True` or `fp16=True`
    accelerate makes one. On a GPU TRL's fused head (TRL 1.15 and later) never makes logits.

    Args:
        model, reward_funcs, args, **kwargs: As for `GRPOTrainer`; `args` is an [`OnlinePreferenceConfig`]. With
            `preference_loss` `dpo` or `ipo` the reference is the model at the start: loaded anew from its name, or the
            model without its adapter where that is new.

    Raises:
        ConfigError: `args` is another trainer's config, or TRL is not a version that this was tested with. During
            training: prompts hold images.

    Metrics, beside GRPO's `rewards/<function>/mean` and what reward functions log (`cdr/...`):

    - `reward`, `reward_std`: of the completions whose reward is known. GRPO counts what one of several functions leaves
      open as 0, TRL before 1.6 also that of a single one.
    - `rewards/chosen`, `rewards/rejected`: what the loss compares, as TRL's trainers of that loss log it:
      `preference_beta` times the mean log-probability of the tokens (simpo), or times the distance of the
      log-probability from the reference's (dpo, ipo). `rewards/margins`, `rewards/accuracies`: their difference, and
      how often it is above 0.
    - `logps/chosen`, `logps/rejected`: log-probabilities, nats: mean per token for simpo, summed for dpo and ipo. A
      chosen that falls together with the rejected is likelihood displacement: see `sft_coef`.
    - `aux_loss`: load-balancing loss of a policy with experts. `router_aux_loss_coef` times it is added to the loss,
      as in TRL's GRPO and DPO, if the TRL has this field.
    - `entropy`: of the policy at the pairs' tokens, mean per token, nats. `kl` (dpo, ipo): the log-ratio of policy and
      reference, mean over the pairs' tokens, nats: an estimate of the divergence from the reference that may be
      negative, and is of chosen and rejected completions only.
    - `pairs/used`, `pairs/ties`, `pairs/missing`, `pairs/truncated` (with `mask_truncated_completions`: fewer than two
      of the group's completions ended), `pairs/below_margin`: shares of the pairs, which add up to 1.
    - `pairs/margin`: by how much the reward functions prefer the chosen. `pairs/chosen_tokens`,
      `pairs/rejected_tokens`: lengths.

    All but the shares are means over the pairs that are used since the last log, on all processes.

    Example:

    ```python
    from trl_cdr import CDRReward, OnlinePreferenceConfig, OnlinePreferenceTrainer

    trainer = OnlinePreferenceTrainer(
        model="Qwen/Qwen2.5-0.5B-Instruct",
        reward_funcs=CDRReward(strong=strong, weak=weak),
        args=OnlinePreferenceConfig("out", num_generations=8, per_device_train_batch_size=8),
        train_dataset=prompts,
    )
    trainer.train()
    ```
    """

    log_completions: bool  # GRPO's
    _tag_names: ClassVar[list[str]] = ["trl", "online-preference", "trl-cdr"]
    _name = "OnlinePreference"
    _paper: ClassVar[dict[str, str]] = {}  # the base class has GRPO's; each loss has another
    _fused_devices: ClassVar[tuple[str, ...]] = ("cuda", "xpu")  # where TRL's fused head is a kernel

    def __init__(
        self, model: Any, reward_funcs: Any = None, args: OnlinePreferenceConfig | None = None, **kwargs: Any
    ) -> None:
        if args is None:
            args = OnlinePreferenceConfig()
        if not isinstance(args, OnlinePreferenceConfig):
            raise ConfigError(f"args is a {type(args).__name__}. Pass an OnlinePreferenceConfig.")
        _compat.check_grpo(GRPOTrainer)
        self._use_adapter = _compat.use_adapter()
        self._pairs: list[Pair] = []
        # Of each metric the weighted sum and the sum of weights since the last log, over all processes.
        self._sums: dict[str, dict[str, tuple[float, float]]] = {"train": {}, "eval": {}}
        self._generations = (-1, 0)  # step, and generations for training in it
        self._eval_set = ""  # of several evaluation sets, the one that is evaluated
        super().__init__(model, reward_funcs, args, **kwargs)
        self._check_best_metric()
        # The config's beta made GRPO load a reference; with 0 it does not run it over the whole group.
        self.beta = 0.0
        _compat.check_grpo_attributes(self)
        policy = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        self._fuses_head = self._fuse_head(policy)
        self._keeps_logits = True  # until the policy's forward does not
        self.add_callback(_MetricsOfCheckpoint(self))

    def _check_best_metric(self) -> None:
        """Check that one of several evaluation sets decides on the best checkpoint."""
        metric = (self.args.metric_for_best_model or "").removeprefix("eval_")
        if not isinstance(self.eval_dataset, dict) or not metric:
            return
        names = list(self.eval_dataset)
        if not any(metric.startswith(f"{name}_") for name in names):
            raise ConfigError(
                f"metric_for_best_model is {self.args.metric_for_best_model!r}, and eval_dataset has the sets "
                f"{', '.join(names)}: each set has metrics of its own. Set metric_for_best_model to "
                f"'eval_{names[0]}_reward', for example."
            )

    def _fuse_head(self, policy: nn.Module) -> bool:
        """Give policy and reference TRL's head without logits; on a CPU it would take more memory than the logits."""
        if self.accelerator.device.type not in self._fused_devices:
            return False
        fuse = _compat.fused_head()
        if fuse is None:
            logger.warning(
                "TRL %s has no trl.trainer.utils.add_fused_lm_head: all logits of a micro-batch are computed, which "
                "takes more memory. TRL 1.15 and 1.16 have it.",
                _compat.versions()["trl"],
            )
            return False
        models = [policy] if self.ref_model is None else [policy, self.accelerator.unwrap_model(self.ref_model)]
        for model in models:  # GRPO's own has the temperature of sampling
            fuse(model, cast_lm_head_to_fp32=self.args.cast_lm_head_to_fp32, outputs=("log_probs", "entropy"))
        return True

    # What a later TRL may hand over beside what is read here is its own: `*args, **kwargs` go on to it.
    def _calculate_rewards(
        self,
        inputs: Any,
        prompts: Any,
        completions: Any,
        completion_ids_list: list[list[int]],
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """GRPO's, gathered from all processes; keeps this process's pairs for `_generate_and_score_completions`."""
        gathered: Tensor = super()._calculate_rewards(  # (B_all, F)
            inputs, prompts, completions, completion_ids_list, *args, **kwargs
        )
        weights = self.reward_weights.to(gathered.device)
        combined = combine_rewards(gathered, weights, num_generations=self._group_size)  # (B_all,)
        self._log_rewards(combined)
        if getattr(self.args, "multi_objective_aggregation", None) == "normalize_then_sum":
            combined = combine_rewards(gathered, weights, num_generations=self._group_size, normalize=True)
        first = self.accelerator.process_index * len(prompts)
        local = combined[first : first + len(prompts)]  # (B,)
        truncated: set[int] = set()
        if self.mask_truncated_completions:
            ends = _compat.end_tokens(self)
            truncated = {row for row, ids in enumerate(completion_ids_list) if ids[-1] not in ends}
        self._pairs = self._select(local, truncated, first_group=first // self._group_size)
        return gathered

    def _generate_and_score_completions(
        self, inputs: list[dict[str, Any]], *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """
        GRPO's, cut down to the pairs.

        Returns:
            `dict`, with P groups: `prompt_ids`, `prompt_mask` (P, 2, T_prompt; chosen, rejected: an environment may
            have told each something else), `completion_ids`, `completion_mask`, `loss_mask` (P, 2, T_completion) and
            `weights` (P,).
        """
        if not self.model.training:  # for training the config has checked
            check_batch_size("per_device_eval_batch_size", len(inputs), self._group_size)
        output = super()._generate_and_score_completions(inputs, *args, **kwargs)
        _compat.check_generated(output)
        loss_mask = output["completion_mask"] * output.get("tool_mask", 1)  # (B, T): what the policy itself wrote
        starts = range(0, len(inputs), self._group_size)
        rows = [(start + pair.chosen, start + pair.rejected) for start, pair in zip(starts, self._pairs, strict=True)]
        index = torch.tensor(rows, device=loss_mask.device)  # (P, 2)
        tokens = loss_mask.sum(dim=1)[index]  # (P, 2)
        for number in (tokens == 0).any(dim=1).nonzero()[:, 0].tolist():  # nothing of the policy's own to learn from
            if not self._pairs[number].skipped:
                self._pairs[number] = replace(self._pairs[number], skipped="missing")
        roles = [""] * len(inputs)
        for pair, (chosen, rejected) in zip(self._pairs, rows, strict=True):
            if not pair.skipped:
                roles[chosen], roles[rejected] = "chosen", "rejected"
        self._logs["extra"]["pair"].extend(gather_object(roles))  # a column of the completions table
        weights = torch.tensor([pair.weight for pair in self._pairs], device=loss_mask.device)  # (P,)
        self._log_pairs(tokens, weights)
        return {
            "prompt_ids": output["prompt_ids"][index],
            "prompt_mask": output["prompt_mask"][index],
            "completion_ids": output["completion_ids"][index],
            "completion_mask": output["completion_mask"][index],
            "loss_mask": loss_mask[index],
            "weights": weights,
        }

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,  # noqa: ARG002 - the base class hands it over
        *_: Any,
        **__: Any,
    ) -> Tensor:
        """
        The preference loss of a micro-batch.

        Args:
            model (`nn.Module`): The policy, as prepared for training.
            inputs (`dict`): See `_generate_and_score_completions`.
            return_outputs (`bool`, *optional*, defaults to `False`): Not supported, as in GRPO.
            num_items_in_batch (*optional*): Not used: pairs count, not tokens.

        Returns:
            `Tensor`, a scalar; divided by the steps of gradient accumulation in training, as the base class expects. In
            evaluation the mean over this process's pairs that have weight, NaN without one.
        """
        if return_outputs:
            raise ValueError("OnlinePreferenceTrainer returns no outputs")
        args, weights, mask = self.args, inputs["weights"], inputs["loss_mask"]
        # A completion without a token of the policy's own is in no pair that has weight.
        counts = mask.sum(dim=2).clamp(min=1)  # (P, 2)
        ref_sums = None
        if args.preference_loss != "simpo":
            with torch.no_grad(), self._reference(model) as reference:
                ref_sums = (self._token_logps(reference, inputs)[0].logps * mask).sum(dim=2)  # (P, 2) nats
        found, aux_loss = self._token_logps(model, inputs, balances=_compat.balances_experts(self))
        sums = (found.logps * mask).sum(dim=2)  # (P, 2) nats
        if ref_sums is None:
            logps = sums / counts
            rewards = args.preference_beta * logps
            losses = simpo_loss(
                *logps.unbind(1), beta=args.preference_beta, gamma=args.gamma, label_smoothing=args.label_smoothing
            )
        else:
            logps = sums
            rewards = args.preference_beta * (sums - ref_sums)
            losses = self._loss_against_reference(sums, ref_sums, counts)
        losses = losses - args.sft_coef * (sums / counts)[:, 0]
        balance = None if aux_loss is None else self.router_aux_loss_coef * aux_loss
        by_token = {"entropy": (found.entropies * mask).sum(dim=(1, 2))}  # (P,) sums over the tokens
        if ref_sums is not None:
            by_token["kl"] = (sums - ref_sums).detach().sum(dim=1)
        logged = losses if balance is None else losses + balance
        self._log_loss(rewards.detach(), logps.detach(), logged.detach(), weights)
        self._log_by_token(by_token, counts.sum(dim=1), weights)
        divisor = len(weights) if self.model.training else weights.sum()
        loss: Tensor = (weights * losses).sum() / divisor  # in evaluation NaN without a pair
        by_batch = {}
        if balance is not None and aux_loss is not None:
            loss = loss + balance
            by_batch["aux_loss"] = aux_loss.detach()[None]
        share = 1.0
        if self.model.training:
            share /= self.current_gradient_accumulation_steps
            by_batch["loss"] = loss.detach()[None]
        if by_batch:  # every update of the policy counts once
            self._count(by_batch, torch.full_like(weights[:1], share))
        return loss * share

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """The base class's, whose loss is a mean over batches: here it is one over the pairs that are used."""
        for counted in (self._sums, self._metrics):
            counted["eval"].clear()  # of a prediction, which is not logged
        self._eval_set = metric_key_prefix.removeprefix("eval").removeprefix("_")
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        total, count = self._sums["eval"].pop("loss", (0.0, 0.0))
        output.metrics[f"{metric_key_prefix}_loss"] = total / count if count else math.nan
        return output

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """GRPO's, with the means of what was counted since the last log, and a table of pairs in place of its own."""
        mode = "train" if self.model.training else "eval"
        for name, (total, count) in list(self._sums[mode].items()):
            if name == "loss" and name not in logs:  # not the trainer's own log
                continue
            self._metrics[mode][name] = [total / count if count else math.nan]
            del self._sums[mode][name]
        if mode == "eval" and self._eval_set:  # GRPO gives all sets the same names, and the last one would count
            for name in list(self._metrics[mode]):
                self._metrics[mode][f"{self._eval_set}_{name}"] = self._metrics[mode].pop(name)
        is_shown = self.log_completions
        self.log_completions = False
        try:
            super().log(logs, *args, **kwargs)
        finally:
            self.log_completions = is_shown
        if mode == "eval":
            # What the best checkpoint is chosen by: TRL 1.0 keeps its metrics to itself, and None can't be compared.
            entry = self.state.log_history[-1]
            logs.update({name: math.nan if entry[name] is None else entry[name] for name in entry if name != "step"})
        if is_shown and self.accelerator.is_main_process and self._logs["prompt"]:
            self._show_completions()

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """GRPO's. A checkpoint also gets the values that no log has shown yet, so that a resumed run logs them."""
        metrics = {name: [float(value) for value in values] for name, values in self._metrics["train"].items()}
        attributes = {"metrics": metrics, "sums": dict(self._sums["train"])}
        self.state.stateful_callbacks[self._name] = {"args": {}, "attributes": attributes}
        super().save_model(*args, **kwargs)

    def resume_metrics(self, state: TrainerState) -> None:
        """Begin a run with the values that its checkpoint has, which no log has shown yet; see `save_model`."""
        kept = state.stateful_callbacks.get(self._name, {}).get("attributes", {})
        self._metrics["train"].clear()
        self._metrics["train"].update({name: list(values) for name, values in kept.get("metrics", {}).items()})
        self._sums["train"] = {name: (total, count) for name, (total, count) in kept.get("sums", {}).items()}

    def _show_completions(self) -> None:
        """Print and keep what GRPO has gathered."""
        columns = {name: list(self._logs[name]) for name in ("prompt", "completion")}
        columns |= {name: list(values) for part in ("rewards", "extra") for name, values in self._logs[part].items()}
        step = self.state.global_step
        print_table(columns, step=step, rows=self.num_completions_to_print)
        write_table(
            columns,
            Path(self.args.output_dir) / "completions",
            step=step,
            trackers=self.args.report_to or (),
            unique_prompts=self.log_unique_prompts,
        )

    def _loss_against_reference(self, sums: Tensor, ref_sums: Tensor, counts: Tensor) -> Tensor:
        """DPO's or IPO's loss (P,) from summed log-probabilities (P, 2) and numbers of tokens (P, 2)."""
        if self.args.preference_loss == "ipo":
            sums, ref_sums = sums / counts, ref_sums / counts
        (chosen, rejected), (ref_chosen, ref_rejected) = sums.unbind(1), ref_sums.unbind(1)
        reference = {"ref_chosen_logps": ref_chosen, "ref_rejected_logps": ref_rejected}
        beta = self.args.preference_beta
        if self.args.preference_loss == "ipo":
            return ipo_loss(chosen, rejected, **reference, beta=beta)
        return dpo_loss(chosen, rejected, **reference, beta=beta, label_smoothing=self.args.label_smoothing)

    def _token_logps(
        self, model: nn.Module, inputs: dict[str, Tensor], *, balances: bool = False
    ) -> tuple[TokenLogps, Tensor | None]:
        """
        The pairs' tokens, (P, 2, T) each, at temperature 1, and with `balances` the load-balancing loss of a model with
        experts, a scalar; one forward of 2 P rows.
        """
        names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "loss_mask")
        prompt_ids, prompt_mask, ids, mask, counted = (inputs[name].flatten(0, 1) for name in names)  # (2 P, T)
        length = ids.shape[1]
        rows = {
            "input_ids": torch.cat([prompt_ids, ids], dim=1),
            "attention_mask": torch.cat([prompt_mask, mask], dim=1),
            "use_cache": False,
            **({"output_router_logits": True} if balances else {}),
        }
        if self._fuses_head:
            labels = torch.cat([torch.full_like(prompt_ids, -100), ids.masked_fill(counted == 0, -100)], dim=1)
            with self.accelerator.autocast():  # the reference's own was left behind with its forward
                output = model(**rows, labels=labels, fused_lm_head=True)
            found = TokenLogps(output.log_probs[:, -length:], output.entropy[:, -length:].detach())
        else:
            # From the logits before the completion, which predict its first token.
            logits, output = self._last_logits(model, rows, length + 1)
            found = gather_logps(logits, ids)
        aux_loss = output.aux_loss if balances else None
        return TokenLogps(*(each.view(-1, 2, length) for each in found)), aux_loss

    def _last_logits(self, model: nn.Module, rows: dict[str, Any], count: int) -> tuple[Tensor, Any]:
        """
        The last logits (B, count, V) of rows, and the output that they are of. If a forward can't leave out the other
        logits, a warning is logged once.
        """
        if not self._keeps_logits:
            output = model(**rows)
            return output.logits[:, -count:], output  # its gradient is a copy of all
        try:
            output = model(**rows, logits_to_keep=count)
        except TypeError as error:
            if "logits_to_keep" not in str(error):
                raise
            output = model(**rows)
        logits: Tensor = output.logits
        if logits.shape[1] > count:
            self._keeps_logits = False
            logger.warning(
                "%s does not keep to logits_to_keep: logits of the prompts are computed too, in every step, and their "
                "memory grows with the prompts.",
                type(self.accelerator.unwrap_model(model)).__name__,
            )
            logits = logits[:, -count:]
        return logits, output

    @contextlib.contextmanager
    def _reference(self, model: nn.Module) -> Iterator[nn.Module]:
        """GRPO's copy; else the policy without its adapter, or with the copy of an adapter that was trained before."""
        if self.ref_model is not None:
            yield self.ref_model
            return
        adapted = self.accelerator.unwrap_model(model)
        with self._use_adapter(adapted, "ref" if "ref" in adapted.peft_config else None):
            yield model

    @property
    def _group_size(self) -> int:
        """Completions to a prompt, in training or in evaluation."""
        size: int = self.num_generations if self.model.training else self.num_generations_eval
        return size

    def _select(self, rewards: Tensor, truncated: Collection[int], *, first_group: int) -> list[Pair]:
        """
        The pairs of this process's groups, from combined rewards (B,). Draws depend on seed, step, generation within
        the step and group, not on the process.
        """
        size = self._group_size
        step, generation = self.state.global_step, -1
        if self.model.training:
            last, count = self._generations
            generation = count + 1 if last == step else 0
            self._generations = (step, generation)
        return [
            select_pair(
                group,
                strategy=self.args.pair_strategy,
                rng=random.Random(f"{self.args.seed} {step} {generation} {first_group + number}"),
                min_margin=self.args.min_margin,
                truncated=[index for index in range(size) if number * size + index in truncated],
            )
            for number, group in enumerate(rewards.view(-1, size).tolist())
        ]

    def _log_rewards(self, combined: Tensor) -> None:
        """
        Mean and deviation of the rewards that are known, of all processes (B_all,), in place of GRPO's, where a reward
        function that says nothing of a completion counts as 0: a policy that can't be scored would come out best.
        """
        known = combined[combined.isfinite()]
        values = {"reward": (known.sum().item(), float(len(known)))}
        if len(known) > 1:
            values["reward_std"] = (known.std().item(), 1.0)
        counted = self._sums["train" if self.model.training else "eval"]
        for name, (value, weight) in values.items():
            total, count = counted.get(name, (0.0, 0.0))
            counted[name] = (total + value, count + weight)

    def _log_pairs(self, tokens: Tensor, weights: Tensor) -> None:
        """What became of the groups, and lengths (P, 2) and margins of the pairs that are used."""
        device = weights.device
        reasons = {
            "used": None,
            "ties": "tie",
            "missing": "missing",
            "truncated": "truncated",
            "below_margin": "min_margin",
        }
        shares = {
            f"pairs/{name}": torch.tensor([float(pair.skipped == reason) for pair in self._pairs], device=device)
            for name, reason in reasons.items()
        }
        self._count(shares, torch.ones_like(weights))
        margins = torch.tensor([0.0 if pair.skipped else pair.margin for pair in self._pairs], device=device)
        chosen, rejected = tokens.float().unbind(1)
        means = {"margin": margins, "chosen_tokens": chosen, "rejected_tokens": rejected}
        self._count({f"pairs/{name}": value for name, value in means.items()}, weights)

    def _log_loss(self, rewards: Tensor, logps: Tensor, losses: Tensor, weights: Tensor) -> None:
        """TRL's metrics of a preference loss, from (P, 2) each and (P,); in evaluation also the loss."""
        (chosen, rejected), (chosen_logps, rejected_logps) = rewards.unbind(1), logps.unbind(1)
        values = {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": (chosen > rejected).float(),
            "logps/chosen": chosen_logps,
            "logps/rejected": rejected_logps,
        }
        self._count(values if self.model.training else values | {"loss": losses}, weights)

    def _log_by_token(self, sums: dict[str, Tensor], tokens: Tensor, weights: Tensor) -> None:
        """Means over tokens, from each pair's sum (P,) and its number of tokens (P,)."""
        self._count({name: value / tokens for name, value in sums.items()}, weights * tokens)

    def _count(self, values: dict[str, Tensor], weights: Tensor) -> None:
        """Add each (P,) of all processes to what the next log will show the weighted mean of, or NaN without weight."""
        rows = torch.stack([*values.values(), torch.ones_like(weights)]) * weights  # (values + 1, P)
        *sums, weight = self.accelerator.reduce(rows.sum(dim=1), reduction="sum").tolist()
        counted = self._sums["train" if self.model.training else "eval"]
        for name, value in zip(values, sums, strict=True):
            total, count = counted.get(name, (0.0, 0.0))
            counted[name] = (total + value, count + weight)
