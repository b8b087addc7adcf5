"""Prompts -> a preference data set: N completions to each, scored by the pair, and the chosen and the rejected of them.

`annotate` is `trl-cdr annotate`: it reads rows, has `writers` or `server` write completions where there are none,
scores, selects (`groups`, which is pure), and writes shards that `load_dataset` and TRL's trainers take as they are
(`pipeline`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, get_args

from datasets import Dataset

from ..config import CDRConfig
from ..errors import ConfigError
from ..scoring.pair import Member
from ..scoring.pair_loading import has_template
from ..scoring.rewards import rewards_from_scores
from ..scoring.scorer import DensityRatioScorer
from ..scoring.sources import find_model
from ..scoring.string_prompts import count_strings, string_meaning
from ..scoring.types import Completion, Prompt
from .annotate_report import show, summarise
from .groups import SCHEMA, TEXT_SCHEMA, Strategy, check_group, label_group, read_group
from .pair_options import check_router, known_options, loaded_options, row_domains
from .pipeline import Job, RunArguments, open_input, run
from .reader import BadRow, Row
from .score_folder import fix_date
from .server import Server
from .shards import Labelled, add_counts
from .writers import load_policy, write

Writer = Callable[[Sequence[Prompt], Sequence[str]], list[list[Completion]]]
"""Prompts, and a seed for each -> completions to each; none to one that it can't take."""

# What of the arguments decides what is written.
_DECIDES = ("num_generations", "max_completion_length", "temperature", "seed", "pair_strategy", "min_margin")
_REFUSED = (
    "has a prompt that the policy can't take: it can't be encoded, or leaves no room for max_completion_length tokens. "
    "Leave it out, or pass on_bad_row=skip."
)
_ABOUT = (
    "Preferences that no human and no judge has labelled: each completion's score is the log-density ratio of a strong "
    "over a weak model, log p_strong(y | c, x) - log p_weak(y | c, x), nats "
    "([arXiv 2411.02481](https://arxiv.org/abs/2411.02481)). `prompt`, `chosen` and `rejected` are conversations, as "
    "TRL's `DPOTrainer` and `CPOTrainer` read them; `margin` is the difference of the two `rewards`, which are the "
    "`scores` of all completions behind the gate."
)


@dataclass
class AnnotateArguments(RunArguments):
    """
    What is annotated, by whom the completions are, and how pairs are chosen.

    Raises:
        ConfigError: a value is out of range.
    """

    input: str = field(
        metadata={
            "help": "Prompts: a .jsonl (or .jsonl.gz, .parquet, .json, .csv) file, a folder of such, or a name on the "
            "Hub. Each row holds prompt (messages, or a string: one user turn) and may hold completions (two or more; "
            "without them the policy writes some), finished (for each: false is cut off) and domain."
        }
    )
    output_dir: str = field(
        default="./trl-cdr-annotate",
        metadata={"help": "Folder for the data set. A run that was stopped, however, goes on from here."},
    )
    policy: str | None = field(
        default=None,
        metadata={
            "help": "Model (or LoRA adapter) that writes completions: name or path; with server, its name there."
        },
    )
    policy_revision: str | None = field(
        default=None, metadata={"help": "Revision (branch, tag, commit) of the policy."}
    )
    server: str | None = field(
        default=None,
        metadata={"help": "URL of an OpenAI-compatible server that runs the policy, such as http://localhost:8000/v1."},
    )
    num_generations: int = field(default=8, metadata={"help": "Completions to each prompt."})
    max_completion_length: int = field(
        default=512, metadata={"help": "Longest completion, in tokens. One that was cut off is in no pair."}
    )
    temperature: float = field(default=1.0, metadata={"help": "Of the policy's samples."})
    pair_strategy: Strategy = field(
        default="best_worst",
        metadata={
            "help": "Which pairs of a prompt: best_worst, best_random (the best, and one of the others), all_pairs."
        },
    )
    min_margin: float = field(default=0.0, metadata={"help": "Pairs of a smaller margin are left out, nats."})
    seed: int = field(default=0, metadata={"help": "Of completions and of best_random; each row draws for itself."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_generations", "max_completion_length"):
            if not isinstance(getattr(self, name), int):  # YAML's 8.0
                raise ConfigError(f"{name} is {getattr(self, name)!r}. Use a whole number.")
        if self.server is not None and self.policy is None:
            raise ConfigError(f"server is {self.server!r}, and policy is missing: the model's name there. Pass policy.")
        if self.num_generations < 2:
            raise ConfigError(f"num_generations is {self.num_generations}: a pair needs two. Use 2 or more.")
        if self.max_completion_length < 1:
            raise ConfigError(f"max_completion_length is {self.max_completion_length} tokens. Use 1 or more.")
        if not self.temperature > 0:
            raise ConfigError(f"temperature is {self.temperature}: without any, all completions are equal. Use 1.0.")
        if self.pair_strategy not in get_args(Strategy):
            raise ConfigError(f"pair_strategy is {self.pair_strategy!r}. Use one of: {', '.join(get_args(Strategy))}.")
        if not self.min_margin >= 0:
            raise ConfigError(f"min_margin is {self.min_margin}: it is a distance, nats. Use 0 or more.")


def annotate(arguments: AnnotateArguments, config: CDRConfig, *, data: Dataset | None = None) -> dict[str, Any] | None:
    """
    Make a preference data set: `data/*.parquet`, `README.md`, `options.json`, `summary.json` in the output folder.
    `load_dataset` reads it. A run that was killed ends, started again, with the rows of one that was not.

    Args:
        arguments (`AnnotateArguments`): Input, policy, selection and output.
        config (`CDRConfig`): The pair and its options; `cdr_gate` is the gate behind which completions are compared.
        data (`Dataset`, *optional*): Rows from memory in place of `arguments.input`, which is then their name.

    Returns:
        `dict` or `None`: what `summary.json` holds; `None` while other machines or processes have shards to write.

    Raises:
        InputError, ConfigError: see `pipeline.run` and `Server`.
        ModelError: see `DensityRatioScorer`; or the policy can't be loaded, or its server fails.
    """
    source = open_input(arguments, data)
    scorer = DensityRatioScorer.from_config(fix_date(config, Path(arguments.output_dir)))
    check_router(scorer, source)
    is_text = config.cdr_string_prompts == "text"
    if config.cdr_string_prompts == "auto":
        is_text = string_meaning("auto", has_template=has_template(config)) == "text"
    job = make_job(arguments, scorer, options=known_options(scorer), is_text=is_text)
    return run(arguments, source, job)


def make_job(
    arguments: AnnotateArguments, scorer: DensityRatioScorer, *, options: Mapping[str, Any], is_text: bool = False
) -> Job:
    """
    What annotating is to the pipeline.

    Args:
        arguments (`AnnotateArguments`): Policy and selection.
        scorer (`DensityRatioScorer`): What scores.
        options (`Mapping`): What its scores depend on.
        is_text (`bool`, *optional*, defaults to `False`): Prompts are raw text, and pairs are strings: TRL's standard
            format.

    Raises:
        ConfigError: see `Server`.
        ModelError: there is no such policy.
    """
    policy = Policy(arguments, scorer)
    return Job(
        command="annotate",
        options={**options, **policy.identify(), **{name: getattr(arguments, name) for name in _DECIDES}},
        check=partial(check_group, can_write=arguments.policy is not None, is_text=is_text),
        schema=lambda: TEXT_SCHEMA if is_text else SCHEMA,
        load=lambda: loaded_options(scorer),
        label=partial(label_rows, arguments=arguments, scorer=scorer, writer=policy, is_text=is_text),
        summarise=summarise,
        show=show,
        about=_ABOUT,
    )


class Policy:
    """
    What writes completions: a model of this process, loaded when it is first asked, or a server.

    Args:
        arguments (`AnnotateArguments`): Its name, and how it writes.
        scorer (`DensityRatioScorer`): Its strong model's template serves a policy that has none.

    Raises:
        ConfigError: see `Server`.
    """

    def __init__(self, arguments: AnnotateArguments, scorer: DensityRatioScorer) -> None:
        self.arguments, self.scorer = arguments, scorer
        self.server = None if arguments.server is None else Server(arguments.server, model=str(arguments.policy))
        self.member: Member | None = None

    def identify(self) -> dict[str, Any]:
        """
        Which weights write, as far as that can be known.

        Raises:
            ModelError: there is no such model.
        """
        name = self.arguments.policy
        init_kwargs: Any = self.scorer.config.cdr_model_init_kwargs
        if name is None:
            identity = None
        elif self.server is not None:
            identity = f"{name} of a server"
        else:
            revision = self.arguments.policy_revision
            source = find_model(name, "policy", revision=revision, init_kwargs=init_kwargs)
            identity = source.identify("policy", init_kwargs=init_kwargs)
        return {"policy": name, "policy_identity": identity, "server": self.server and self.server.shown}

    def __call__(self, prompts: Sequence[Prompt], seeds: Sequence[str]) -> list[list[Completion]]:
        """
        Completions to each prompt, which depend on its seed; with a server, as far as it honours seeds.

        Raises:
            ModelError: the model can't be loaded, or the server fails.
        """
        options: dict[str, Any] = {
            "per_prompt": self.arguments.num_generations,
            "temperature": self.arguments.temperature,
            "max_new_tokens": self.arguments.max_completion_length,
            "seeds": seeds,
        }
        if self.server is not None:
            return self.server.write(prompts, **options)
        if self.member is None:
            with self.scorer.use() as pair:
                self.member = load_policy(
                    str(self.arguments.policy), self.scorer.config, pair, revision=self.arguments.policy_revision
                )
        return write(self.member, prompts, **options)


def label_rows(
    rows: Sequence[Row],
    *,
    arguments: AnnotateArguments,
    scorer: DensityRatioScorer,
    writer: Writer,
    is_text: bool = False,
) -> Labelled:
    """
    Rows -> their pairs. What a row gets does not depend on the rows beside it, but for rounding.

    Args:
        rows (`Sequence[Row]`): That `check_group` has passed.
        arguments (`AnnotateArguments`): How pairs are chosen.
        scorer (`DensityRatioScorer`): What scores.
        writer (`Writer`): Writes completions where there are none.
        is_text (`bool`, *optional*, defaults to `False`): See `make_job`.
    """
    labelled = Labelled()
    read = [read_group(row.fields, is_text=is_text) for row in rows]
    bare = [place for place, (_, completions) in enumerate(read) if completions is None]
    written: dict[int, list[Completion]] = {}
    if bare:
        prompts = [read[place][0] for place in bare]
        seeds = [f"{arguments.seed} {rows[place].index}" for place in bare]
        written = dict(zip(bare, writer(prompts, seeds), strict=True))
    kept, groups = [], []
    for place, (row, (_, completions)) in enumerate(zip(rows, read, strict=True)):
        group = written.get(place) if completions is None else completions
        if group and len(group) > 1:
            kept.append(place)
            groups.append(group)
        else:
            labelled.bad.append(BadRow(row.index, row.where, _REFUSED))
    given = [rows[place].fields["prompt"] for place in kept]
    strings = count_strings(given, [read[place][0] for place in kept])
    add_counts(labelled.counts, {"": {f"strings_{meaning}": count for meaning, count in strings.items()}})
    flat = [(rows[place], read[place][0], one) for place, group in zip(kept, groups, strict=True) for one in group]
    scores = iter(
        scorer.score(
            [prompt for _, prompt, _ in flat],
            [one.text for _, _, one in flat],
            finished=[one.finished for _, _, one in flat],
            is_generated=[one.is_generated for _, _, one in flat],
            domains=row_domains(scorer, [row for row, _, _ in flat]),
        )
    )
    for place, group in zip(kept, groups, strict=True):
        scored = [next(scores) for _ in group]
        rewards = rewards_from_scores(scored, on_unscorable="none", reduction=scorer.config.cdr_reduction)
        label_group(
            labelled,
            index=rows[place].index,
            prompt=read[place][0],
            completions=group,
            scores=scored,
            rewards=rewards,
            strategy=arguments.pair_strategy,
            min_margin=arguments.min_margin,
            seed=arguments.seed,
        )
    return labelled
