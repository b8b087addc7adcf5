"""Online SimPO, DPO and IPO on N generations: TRL's GRPOTrainer with another loss.

Generation, rewards, evaluation, logging, vLLM and resuming are GRPO's. Here the rewards of a group make a pair
(`scoring.selection`), the policy is run on the pairs only, and `losses` says what they cost.
"""

import contextlib
import inspect
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from trl import GRPOTrainer
from trl.trainer.utils import use_adapter

from .. import _compat
from ..errors import ConfigError
from ..scoring.selection import Pair, combine_rewards, select_pair
from .losses import dpo_loss, gather_logps, ipo_loss, simpo_loss
from .online_preference_config import OnlinePreferenceConfig, check_batch_size


class OnlinePreferenceTrainer(GRPOTrainer):  # type: ignore[misc]
    """
    Train a policy on pairs of its own completions: of `num_generations` to a prompt, the reward functions say which is
    chosen and which is rejected.

    Rewards are used as they are, weighted by `reward_weights` and added; there are no advantages. A pair whose rewards
    tie, are missing (None or NaN) or differ by less than `min_margin` has weight 0 and is counted; batches have the
    same shape on every process. The loss of a micro-batch is the sum of its weighted losses over its number of pairs,
    and gradients accumulated over smaller batches are those of one larger batch.

    Policy and reference are run on the chosen and the rejected completions only, without temperature, however the
    completions were sampled.

    Args:
        model, reward_funcs, args, **kwargs: As for `GRPOTrainer`; `args` is an [`OnlinePreferenceConfig`]. With
            `preference_loss` `dpo` or `ipo` the reference is the model at the start: loaded anew from its name, or the
            model without its adapter where that is new.

    Raises:
        ConfigError: `args` is another trainer's config, or TRL is not a version that this was tested with. During
            training: prompts hold images.

    Metrics, beside GRPO's `reward` and `rewards/<function>/mean` and what reward functions log (`cdr/...`):

    - `rewards/chosen`, `rewards/rejected`: what the loss compares, as TRL's trainers of that loss log it:
      `preference_beta` times the mean log-probability of the tokens (simpo), or times the distance of the
      log-probability from the reference's (dpo, ipo). `rewards/margins`, `rewards/accuracies`: their difference, and
      how often it is above 0.
    - `logps/chosen`, `logps/rejected`: log-probabilities, nats: mean per token for simpo, summed for dpo and ipo. A
      chosen that falls together with the rejected is likelihood displacement: see `sft_coef`.
    - `pairs/used`, `pairs/ties`, `pairs/missing`, `pairs/below_margin`: shares of the pairs, which add up to 1.
    - `pairs/margin`: by how much the reward functions prefer the chosen. `pairs/chosen_tokens`,
      `pairs/rejected_tokens`: lengths.

    All but the shares are means over the pairs that are used.

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

    _tag_names: ClassVar[list[str]] = ["trl", "online-preference", "trl-cdr"]
    _name = "OnlinePreference"
    _paper: ClassVar[dict[str, str]] = {}  # the base class has GRPO's; each loss has another

    def __init__(
        self, model: Any, reward_funcs: Any = None, args: OnlinePreferenceConfig | None = None, **kwargs: Any
    ) -> None:
        if args is None:
            args = OnlinePreferenceConfig()
        if not isinstance(args, OnlinePreferenceConfig):
            raise ConfigError(f"args is a {type(args).__name__}. Pass an OnlinePreferenceConfig.")
        _compat.check_grpo(GRPOTrainer)
        self._pairs: list[Pair] = []
        super().__init__(model, reward_funcs, args, **kwargs)
        # The config's beta made GRPO load a reference; with 0 it does not run it over the whole group.
        self.beta = 0.0
        policy = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        self._keeps_logits = "logits_to_keep" in inspect.signature(policy.forward).parameters

    def _calculate_rewards(
        self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: list[list[int]]
    ) -> Tensor:
        """GRPO's, gathered from all processes; keeps this process's pairs for `_generate_and_score_completions`."""
        gathered: Tensor = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)  # (B_all, F)
        first = self.accelerator.process_index * len(prompts)
        local = gathered[first : first + len(prompts)]  # (B, F)
        self._pairs = self._select(local, first_group=first // self._group_size)
        roles = [""] * len(prompts)
        for group, pair in enumerate(self._pairs):
            if not pair.skipped:
                roles[group * self._group_size + pair.chosen] = "chosen"
                roles[group * self._group_size + pair.rejected] = "rejected"
        self._log_completion_extra("pair", roles)
        return gathered

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Tensor]:
        """
        GRPO's, cut down to the pairs.

        Returns:
            `dict`, with P groups: `prompt_ids`, `prompt_mask` (P, T_prompt), `completion_ids`, `completion_mask`,
            `loss_mask` (P, 2, T_completion; chosen, rejected) and `weights` (P,).
        """
        if not self.model.training:  # for training the config has checked
            check_batch_size("per_device_eval_batch_size", len(inputs), self._group_size)
        output = super()._generate_and_score_completions(inputs)
        _compat.check_generated(output)
        loss_mask = output["completion_mask"] * output.get("tool_mask", 1)  # (B, T): what the policy itself wrote
        starts = range(0, len(inputs), self._group_size)
        rows = [(start + pair.chosen, start + pair.rejected) for start, pair in zip(starts, self._pairs, strict=True)]
        index = torch.tensor(rows, device=loss_mask.device)  # (P, 2)
        tokens = loss_mask.sum(dim=1)[index]  # (P, 2)
        for number in (tokens == 0).any(dim=1).nonzero()[:, 0].tolist():  # nothing of the policy's own to learn from
            self._pairs[number] = replace(self._pairs[number], skipped="missing")
        weights = torch.tensor([pair.weight for pair in self._pairs], device=loss_mask.device)  # (P,)
        self._log_pairs(tokens, weights)
        return {
            "prompt_ids": output["prompt_ids"][index[:, 0]],
            "prompt_mask": output["prompt_mask"][index[:, 0]],
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
    ) -> Tensor:
        """
        The preference loss of a micro-batch.

        Args:
            model (`nn.Module`): The policy, as prepared for training.
            inputs (`dict`): See `_generate_and_score_completions`.
            return_outputs (`bool`, *optional*, defaults to `False`): Not supported, as in GRPO.
            num_items_in_batch (*optional*): Not used: pairs count, not tokens.

        Returns:
            `Tensor`, a scalar; divided by the steps of gradient accumulation in training, as the base class expects.
        """
        if return_outputs:
            raise ValueError("OnlinePreferenceTrainer returns no outputs")
        args, weights = self.args, inputs["weights"]
        # A completion without a token of the policy's own is in no pair that has weight.
        counts = inputs["loss_mask"].sum(dim=2).clamp(min=1)  # (P, 2)
        if args.preference_loss == "simpo":
            sums = self._logps(model, inputs)
            logps = sums / counts
            rewards = args.preference_beta * logps
            losses = simpo_loss(
                *logps.unbind(1), beta=args.preference_beta, gamma=args.gamma, label_smoothing=args.label_smoothing
            )
        else:
            with torch.no_grad(), self._reference(model) as reference:
                ref_sums = self._logps(reference, inputs)
            logps = sums = self._logps(model, inputs)
            rewards = args.preference_beta * (sums - ref_sums)
            losses = self._loss_against_reference(sums, ref_sums, counts)
        losses = losses - args.sft_coef * (sums / counts)[:, 0]
        self._log_loss(rewards.detach(), logps.detach(), weights)
        loss: Tensor = (weights * losses).sum() / len(weights)
        return loss / self.current_gradient_accumulation_steps if self.model.training else loss

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

    def _logps(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """Summed log-probabilities of the pairs' completions, (P, 2) nats."""
        sums: Tensor = (self._per_token_logps(model, inputs) * inputs["loss_mask"]).sum(dim=2)
        return sums

    def _per_token_logps(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """Log-probabilities of the pairs' tokens, (P, 2, T) nats, at temperature 1; one forward of 2 P rows."""
        prompt_ids, prompt_mask = (inputs[name].repeat_interleave(2, dim=0) for name in ("prompt_ids", "prompt_mask"))
        ids, mask = (inputs[name].flatten(0, 1) for name in ("completion_ids", "completion_mask"))  # (2 P, T)
        length = ids.shape[1]
        options = {"logits_to_keep": length + 1} if self._keeps_logits else {}
        logits = model(
            input_ids=torch.cat([prompt_ids, ids], dim=1),
            attention_mask=torch.cat([prompt_mask, mask], dim=1),
            use_cache=False,
            **options,
        ).logits
        # The last logits predict what would follow; the one before the completion predicts its first token.
        return gather_logps(logits[:, -length - 1 : -1], ids).view(-1, 2, length)

    @contextlib.contextmanager
    def _reference(self, model: nn.Module) -> Iterator[nn.Module]:
        """GRPO's copy; else the policy without its adapter, or with the copy of an adapter that was trained before."""
        if self.ref_model is not None:
            yield self.ref_model
            return
        adapted = self.accelerator.unwrap_model(model)
        with use_adapter(adapted, "ref" if "ref" in adapted.peft_config else None):
            yield model

    @property
    def _group_size(self) -> int:
        """Completions to a prompt, in training or in evaluation."""
        size: int = self.num_generations if self.model.training else self.num_generations_eval
        return size

    def _select(self, rewards: Tensor, *, first_group: int) -> list[Pair]:
        """The pairs of this process's groups. What is drawn depends on seed, step and group, not on the process."""
        combined = combine_rewards(
            rewards, self.reward_weights.to(rewards.device), num_generations=self._group_size
        ).view(-1, self._group_size)
        return [
            select_pair(
                group,
                strategy=self.args.pair_strategy,
                rng=random.Random(f"{self.args.seed} {self.state.global_step} {first_group + number}"),
                min_margin=self.args.min_margin,
            )
            for number, group in enumerate(combined.tolist())
        ]

    def _log_pairs(self, tokens: Tensor, weights: Tensor) -> None:
        """What became of the groups, and lengths (P, 2) and margins of the pairs that are used."""
        device = weights.device
        reasons = {"used": None, "ties": "tie", "missing": "missing", "below_margin": "min_margin"}
        shares = {
            f"pairs/{name}": torch.tensor([float(pair.skipped == reason) for pair in self._pairs], device=device)
            for name, reason in reasons.items()
        }
        self._log_means(shares, torch.ones_like(weights))
        margins = torch.tensor([0.0 if pair.skipped else pair.margin for pair in self._pairs], device=device)
        chosen, rejected = tokens.float().unbind(1)
        means = {"margin": margins, "chosen_tokens": chosen, "rejected_tokens": rejected}
        self._log_means({f"pairs/{name}": value for name, value in means.items()}, weights)

    def _log_loss(self, rewards: Tensor, logps: Tensor, weights: Tensor) -> None:
        """TRL's metrics of a preference loss, from (P, 2) each."""
        (chosen, rejected), (chosen_logps, rejected_logps) = rewards.unbind(1), logps.unbind(1)
        values = {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": (chosen > rejected).float(),
            "logps/chosen": chosen_logps,
            "logps/rejected": rejected_logps,
        }
        self._log_means(values, weights)

    def _log_means(self, values: dict[str, Tensor], weights: Tensor) -> None:
        """Append to the trainer's metrics the weighted mean over all processes of each (P,), NaN where no weight is."""
        rows = torch.stack([*values.values(), torch.ones_like(weights)]) * weights  # (values + 1, P)
        *sums, total = self.accelerator.reduce(rows.sum(dim=1), reduction="sum").tolist()
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, value in zip(values, sums, strict=True):
            metrics[name].append(value / total if total else float("nan"))
