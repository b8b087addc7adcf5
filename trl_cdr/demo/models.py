"""The tiny world's models: tokenizer, architecture, training from scratch, sampling. `cache` keeps the checkpoints.

`world` supplies the texts; `story` scores, trains and judges with what is built here. Nothing here reads the gold
reward: the models differ only in the share of right completions in their data.

Runs on the CPU everywhere (the models are too small to gain from a GPU) and leaves the global random state alone.
"""

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import datasets
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from . import steering, world
from .cache import build_once

RECIPE_VERSION = 2
"""Part of the cache folder's name. Raise it with every change that alters the world, the models or their training."""

MAX_NEW_TOKENS = 22
BATCH_SIZE = 64

_SPECIAL = ("<|pad|>", "<|unk|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True)
class Checkpoints:
    """Folders that `from_pretrained` loads, each with the shared tokenizer.

    `mild` is `base` trained further on better data: the demo's strong and weak model. `policy` comes from another seed.
    """

    base: Path
    mild: Path
    policy: Path


@dataclass(frozen=True)
class Steerable:
    """
    A pair for criteria. `strong` does what stands before a prompt; `weak`, which it comes from, was shown the same and
    trained to pass over it.
    """

    weak: Path
    strong: Path


Draw = Callable[[random.Random], tuple[Sequence[Mapping[str, str]], str]]  # -> a conversation and its completion


@dataclass(frozen=True)
class Recipe:
    """How one checkpoint is made of drawn data: from random weights, or from the checkpoint named `parent`."""

    name: str
    draw: Draw
    steps: int
    learning_rate: float
    seed: int
    parent: str | None = None


RECIPES = (
    Recipe("base", partial(world.draw_row, share_right=0.2), steps=600, learning_rate=1e-2, seed=0),
    Recipe("mild", partial(world.draw_row, share_right=0.5), steps=150, learning_rate=2e-3, seed=1, parent="base"),
    Recipe("policy", partial(world.draw_row, share_right=0.3), steps=600, learning_rate=1e-2, seed=2),
)
PLAIN_RECIPES = (
    Recipe("base", partial(world.draw_plain_row, share_right=0.5), steps=600, learning_rate=1e-2, seed=5),
    Recipe("weak", partial(world.draw_plain_row, share_right=0.7), 150, learning_rate=2e-3, seed=6, parent="base"),
    Recipe("strong", partial(world.draw_plain_row, share_right=0.97), 150, learning_rate=2e-3, seed=7, parent="weak"),
    Recipe("policy", partial(world.draw_plain_row, share_right=0.65), steps=600, learning_rate=1e-2, seed=8),
)
_RUNGS = 12
LADDER_RECIPES = tuple(
    Recipe(
        f"rung-{rung:02}",
        partial(world.draw_row, share_right=0.2 + 0.75 * rung / _RUNGS),
        steps=40,
        learning_rate=2e-3,
        seed=20 + rung,
        parent=f"rung-{rung - 1:02}" if rung > 1 else "base",
    )
    for rung in range(1, _RUNGS + 1)
)
STEERABLE_RECIPES = (
    Recipe("weak", steering.draw_ignored, steps=150, learning_rate=2e-3, seed=3, parent="base"),
    Recipe("strong", steering.draw_obeyed, steps=600, learning_rate=4e-3, seed=4, parent="weak"),
)


@dataclass(frozen=True)
class Sample:
    """One completion that a model wrote: its text without special tokens, and whether it ended it."""

    text: str
    finished: bool


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, lower-cased, marks on their own, and a chat template with an end token after every turn."""
    words = sorted({*world.vocabulary(), *steering.vocabulary()})
    vocabulary = {token: index for index, token in enumerate([*_SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unk|>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation(behavior="isolated")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        unk_token="<|unk|>",
        eos_token="<|end|>",
        additional_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
        chat_template=_CHAT_TEMPLATE,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],  # transformers 4 adds token_type_ids, which Llama refuses
    )


def build_checkpoints(cache: bool = True) -> Checkpoints:
    """Train the tiny world's models, or find them in the cache.

    They are kept in `tiny-world-v<RECIPE_VERSION>-transformers<major>`, see `cache`. One recipe gives the same bits at
    every build on a machine.

    Args:
        cache (`bool`): Take what is cached; `False` builds again and replaces it.

    Raises:
        ConfigError: the cache folder can't be written.
    """
    folder = _build_once("tiny-world", RECIPES, cache=cache)
    return Checkpoints(**{recipe.name: folder / recipe.name for recipe in RECIPES})


def build_steerable(checkpoints: Checkpoints, *, cache: bool = True) -> Steerable:
    """Train the pair for criteria from `checkpoints.base`, or find it in the cache; see `build_checkpoints`."""
    folder = _build_once("tiny-world-steerable", STEERABLE_RECIPES, cache=cache, base=checkpoints.base)
    return Steerable(weak=folder / "weak", strong=folder / "strong")


def build_plain(*, cache: bool = True) -> Path:
    """The models of the world without common mistakes: a folder with one for each of `PLAIN_RECIPES`."""
    return _build_once("tiny-world-plain", PLAIN_RECIPES, cache=cache)


def build_ladder(checkpoints: Checkpoints, *, cache: bool = True) -> dict[str, Path]:
    """
    Models that are right the more often, the later they come: `checkpoints.base`, and each of `LADDER_RECIPES`, trained
    on from the one before it; see `build_checkpoints`.
    """
    folder = _build_once("tiny-world-ladder", LADDER_RECIPES, cache=cache, base=checkpoints.base)
    return {"base": checkpoints.base, **{recipe.name: folder / recipe.name for recipe in LADDER_RECIPES}}


def _build_once(name: str, recipes: Sequence[Recipe], *, cache: bool, **parents: Path) -> Path:
    """The folder with the recipes' checkpoints, each in a folder of its name. `parents` are checkpoints from before."""
    return build_once(f"{name}-v{RECIPE_VERSION}", lambda folder: _build(folder, recipes, parents), cache=cache)


def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompts: Sequence[list[world.Message]],
    per_prompt: int,
    seed: int,
) -> list[list[Sample]]:
    """Let a model write `per_prompt` completions to each prompt at temperature 1, at most `MAX_NEW_TOKENS` tokens long.

    The model's training mode and the global random state are as before when it returns.
    """
    rendered = tokenizer.apply_chat_template(list(prompts), tokenize=False, add_generation_prompt=True)
    batch = tokenizer(rendered, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
    was_training = model.training
    model.eval()
    with one_thread(), torch.no_grad(), seeded(seed):
        ids = model.generate(
            **batch,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            num_return_sequences=per_prompt,
            max_new_tokens=MAX_NEW_TOKENS,
        )[:, batch["input_ids"].shape[1] :]  # (B * per_prompt, T)
    model.train(was_training)
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    ends = (ids == tokenizer.eos_token_id).any(dim=1).tolist()
    samples = [Sample(text, finished) for text, finished in zip(texts, ends, strict=True)]
    return [samples[start : start + per_prompt] for start in range(0, len(samples), per_prompt)]


def progress() -> Progress:
    """The demo's progress bars, on stderr; silent where that is no terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description:<28}"), BarColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread inside. Models this small gain little from more, and lose much where cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide transformers' and datasets' own progress bars: a bar for each of a dozen tiny loads says nothing."""
    libraries = (logging, datasets.utils.logging)
    shown = [library for library in libraries if library.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()


def _build(folder: Path, recipes: Sequence[Recipe], parents: Mapping[str, Path]) -> None:
    tokenizer = build_tokenizer()
    with one_thread(), quiet(), progress() as bars:
        for recipe in recipes:
            bar = bars.add_task(f"training {recipe.name}", total=recipe.steps)
            parent = None if recipe.parent is None else parents.get(recipe.parent, folder / recipe.parent)
            model = _new_model(recipe.seed) if parent is None else LlamaForCausalLM.from_pretrained(parent)
            _train(model, tokenizer, recipe=recipe, advance=partial(bars.advance, bar))
            model.save_pretrained(folder / recipe.name)
            tokenizer.save_pretrained(folder / recipe.name)


def _new_model(seed: int) -> LlamaForCausalLM:
    tokenizer = build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=192,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.06,  # the usual 0.02 learns three times slower at this width
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with seeded(seed):
        return LlamaForCausalLM(config)


def _train(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, *, recipe: Recipe, advance: Callable[[], None]
) -> None:
    """Train on freshly drawn rows; the loss counts completion tokens only."""
    rng = random.Random(recipe.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(  # a short warm-up, then cosine
        optimizer, recipe.learning_rate, total_steps=recipe.steps + 1, pct_start=0.1, cycle_momentum=False
    )
    model.train()
    for _ in range(recipe.steps):
        # Drawn at random, not bucketed by length: length is style, and batches of one style hide it from the model.
        rows = [recipe.draw(rng) for _ in range(BATCH_SIZE)]
        prompts = tokenizer.apply_chat_template(
            [list(prompt) for prompt, _ in rows], tokenize=False, add_generation_prompt=True
        )
        texts = [f"{prompt}{said}<|end|>" for prompt, (_, said) in zip(prompts, rows, strict=True)]
        batch = tokenizer(texts, add_special_tokens=False, padding=True, padding_side="right", return_tensors="pt")
        model(**batch, labels=_completion_labels(batch, tokenizer)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        advance()
    model.eval()


def _completion_labels(batch: dict[str, torch.Tensor], tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """The token ids after the assistant's turn opens, -100 elsewhere: (B, T)."""
    ids = batch["input_ids"]
    opens = ids == tokenizer.convert_tokens_to_ids("<|assistant|>")
    completion = (opens.cumsum(dim=1) > 0) & ~opens & (batch["attention_mask"] == 1)
    return ids.masked_fill(~completion, -100)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the CPU's generator inside, restore its state after. `torch.manual_seed` would seed every GPU as well."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
