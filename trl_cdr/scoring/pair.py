"""Strong and weak together: each with the encoder that feeds it, and what makes their scores comparable.

Knows no conversation and no score: `scorer` asks it for two encoders and two models. `pair_loading` loads.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from ..conditioning.criteria import Conditioning
from .causal_lm import CausalLM
from .encoding import Encoder, PromptForm, fit, own_chat_template, vocabulary_hash
from .logps import Reduce, token_logps
from .packing import Group, Layout, common_prefix
from .served_lm import ServedLM
from .types import Completion, Prompt, Row, Unscorable
from .weights import fingerprint

# Prompts that start differently: what their conditioned forms share is the conditioning's and the template's.
_PROBES = ("a", "B", "7", "(", "-", "é", "中")


@dataclass(frozen=True)
class Member:
    """One model of the pair with the encoder that feeds it, and the longest row in tokens (None: no limit)."""

    lm: CausalLM | ServedLM
    encoder: Encoder
    max_length: int | None
    _constants: dict[tuple[Conditioning, bool], tuple[int, ...]] = field(default_factory=dict, repr=False)

    @property
    def is_served(self) -> bool:
        """The model is on servers."""
        return isinstance(self.lm, ServedLM)

    @property
    def local(self) -> CausalLM:
        """The model, of which the caller knows that it is here."""
        assert isinstance(self.lm, CausalLM), "on servers"
        return self.lm

    @property
    def end_ids(self) -> frozenset[int]:
        """Ids at which a completion ends. A generation config is believed only where it names special tokens."""
        added = self.encoder.tokenizer.added_tokens_decoder
        return self.encoder.end_ids | {id for id in self.lm.end_ids if id in added and added[id].special}

    @property
    def final_ids(self) -> tuple[int, ...]:
        """Those of `end_ids` that the model predicts."""
        return tuple(sorted(id for id in self.end_ids if id < self.lm.num_embeddings))

    def adapt(self, form: PromptForm) -> "Member":
        """Return this model with an encoder that writes prompts in another form."""
        return Member(self.lm, self.encoder.adapt(form), self.max_length)

    def describe(self, *, token_budget: int) -> dict[str, Any]:
        """How this model will run, for people; see `CausalLM.describe`."""
        own = own_chat_template(self.encoder.tokenizer)
        template = "own" if self.encoder.chat_template == own else "its partner's, or cdr_chat_template"
        return {
            **self.lm.describe(token_budget=token_budget),
            "max_length": self.max_length,
            "end_of_turn": self.encoder.end_of_turn,
            "end_tokens": self.encoder.tokenizer.convert_ids_to_tokens(self.final_ids),
            "chat_template": template if self.encoder.chat_template else "none",
            "thoughts": self.encoder.describe_thoughts(),
            "date": self.encoder.written_date,
        }

    def encode(self, prompt: Prompt, completion: Completion) -> Row:
        """One row that fits the model; see `Encoder.encode` and `fit`."""
        row = fit(self.encoder.encode(prompt, completion), self.max_length)
        self.check(row)
        return row

    def check(self, row: Row) -> None:
        """
        Raises:
            Unscorable: the model can't read one of the row's ids.
        """
        if max(row.ids) >= self.lm.num_embeddings:
            raise Unscorable(f"the row holds the token id {max(row.ids)}, for which {self.lm.name} has no embedding")

    def constant_ids(self, conditioning: Conditioning, *, is_text: bool) -> tuple[int, ...]:
        """
        The tokens that every prompt under a conditioning starts with; nothing where they are too few to be kept.

        Args:
            conditioning (`Conditioning`): What the prompts are conditioned with.
            is_text (`bool`): The prompts are strings, not conversations.
        """
        if conditioning.is_empty:
            return ()
        key = (conditioning, is_text)
        if key not in self._constants:
            prompts: list[Prompt] = [text if is_text else [{"role": "user", "content": text}] for text in _PROBES]
            try:
                rows = [self.encoder.encode(conditioning.apply(prompt), Completion("a", None)) for prompt in prompts]
            except Unscorable:  # the rows themselves will say why
                rows = []
            self._constants[key] = common_prefix(rows)
        return self._constants[key]

    def per_token_logps(
        self, groups: Sequence[Group], *, token_budget: int, reduce: Reduce = token_logps
    ) -> list[Tensor]:
        """Log-probabilities of every row of the groups in the call's order; see `CausalLM.per_token_logps`."""
        if isinstance(self.lm, ServedLM):  # servers find by themselves what rows have in common, and get all at once
            together = {
                index: row for group in groups for index, row in zip(group.indices, group.layout.rows, strict=True)
            }
            layout = Layout([together[index] for index in range(len(together))])
            return self.lm.per_token_logps(layout, token_budget=token_budget, reduce=reduce)
        results: dict[int, Tensor] = {}
        for group in groups:
            logps = self.lm.per_token_logps(group.layout, token_budget=token_budget, reduce=reduce)
            results.update(zip(group.indices, logps, strict=True))
        return [results[index] for index in range(len(results))]


@dataclass(frozen=True)
class Pair:
    """
    The two scoring models.

    Attributes:
        strong, weak (`Member`): Better and less aligned model.
        shares_vocabulary (`bool`): A token id means the same token to both, so ids that the policy wrote can be scored
            as they are, and log-ratios exist per token.
        reads_alike (`bool`): Both encode every row to the same ids, so that it is encoded and laid out once.
        end_ids (`frozenset[int]`): Ids at which a completion ends, of both models: templates, tokenizers and generation
            configs.
    """

    strong: Member
    weak: Member
    shares_vocabulary: bool = field(init=False)
    reads_alike: bool = field(init=False)
    end_ids: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        strong, weak = self.strong.encoder, self.weak.encoder
        is_alike = self.strong.max_length == self.weak.max_length and strong.is_like(weak)
        shares = vocabulary_hash(strong.tokenizer) == vocabulary_hash(weak.tokenizer)
        object.__setattr__(self, "shares_vocabulary", shares)
        object.__setattr__(self, "reads_alike", is_alike)
        object.__setattr__(self, "end_ids", self.strong.end_ids | self.weak.end_ids)

    @property
    def has_template(self) -> bool:
        """The models have chat templates, or share one."""
        return self.strong.encoder.template is not None and self.weak.encoder.template is not None

    @cached_property
    def has_equal_weights(self) -> bool:
        """
        True if strong and weak have the same weights, so that every log-ratio is 0. Reads all weights if they are not
        known by their files. False if a model is on servers.
        """
        if self.strong.is_served or self.weak.is_served:
            return False
        strong, weak = self.strong.local, self.weak.local
        known = [(lm.weights, lm.adapter and lm.adapter.weights) for lm in (strong, weak)]
        if known[0] == known[1] and known[0][0] is not None:
            return True
        if None not in (strong.weights, weak.weights):
            return False
        for lm in (strong, weak):
            lm.wake()
        return fingerprint(strong.model) == fingerprint(weak.model)

    def adapt(self, form: PromptForm) -> "Pair":
        """Return the pair with encoders that write prompts in another form."""
        return Pair(self.strong.adapt(form), self.weak.adapt(form))

    def encode(self, prompt: Prompt, completion: Completion) -> tuple[Row, Row]:
        """
        One row as strong and weak read it.

        Raises:
            Unscorable: one of them can't; see `Member.encode`.
            ConfigError, ModelError: see `Encoder.encode`.
        """
        strong = self.strong.encode(prompt, completion)
        if not self.reads_alike:
            return strong, self.weak.encode(prompt, completion)
        self.weak.check(strong)  # it may embed fewer tokens
        return strong, strong
