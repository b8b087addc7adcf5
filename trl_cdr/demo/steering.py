"""The tiny world's criteria: what stands before a prompt in the steerable pair's data, and who does what it says.

A domain's own criterion or exemplar asks for the right completion, a style for its brief or its detailed form; another
domain's asks for nothing. `world` supplies prompts and completions, `models` trains on what is drawn here.
"""

import random
from collections.abc import Mapping, Sequence

from ..conditioning.criteria import Conditioning, Criteria, DomainCriteria, Exemplar
from ..conditioning.router import ask
from . import world

BRIEF_WORDS = 9
"""The brief form of a completion has at most so many words."""

SHARE_RIGHT = 0.35
"""The share of right completions where nothing asks for them."""

_INSTRUCTIONS = {"safety": "be safe .", "reasoning": "be correct .", "chat": "be polite ."}
_STYLES = {"brief": "be brief .", "detailed": "be detailed ."}

STYLES = Criteria({name: DomainCriteria(text) for name, text in _STYLES.items()})
"""Criteria that ask for a form and leave open what is right."""

Row = tuple[Sequence[Mapping[str, str]], str]


def make_criteria(*, instructions: bool = True, num_exemplars: int = 0, seed: int = 0) -> Criteria:
    """Each domain's criteria: its instruction, exemplars that are drawn from the training prompts, or both."""
    rng = random.Random(seed)
    return Criteria(
        {
            domain: DomainCriteria(
                text if instructions else "", tuple(draw_exemplar(domain, rng) for _ in range(num_exemplars))
            )
            for domain, text in _INSTRUCTIONS.items()
        }
    )


def draw_exemplar(domain: str, rng: random.Random) -> Exemplar:
    """A training prompt of the domain with a right and a wrong completion."""
    task = rng.choice([task for task in world.TRAIN if task.domain == domain])
    return Exemplar(task.prompt, rng.choice(task.right), rng.choice(task.wrong))


def other_domain(domain: str) -> str:
    """A domain that is not this one: the next."""
    names = list(_INSTRUCTIONS)
    return names[(names.index(domain) + 1) % len(names)]


def draw_obeyed(rng: random.Random) -> Row:
    """A row of the strong model's data: what stands before the prompt is done. One in ten rows classifies a prompt."""
    task = rng.choice(world.TRAIN)
    if rng.random() < 0.1:
        return [{"role": "user", "content": ask(task.prompt, list(_INSTRUCTIONS))}], task.domain
    conditioning, is_own, style = _draw_conditioning(task, rng)
    completions = task.right if is_own or rng.random() < SHARE_RIGHT else task.wrong
    if style is not None:
        completions = tuple(text for text in completions if is_brief(text) == (style == "brief"))
    return _condition(task, conditioning), rng.choice(completions)


def draw_ignored(rng: random.Random) -> Row:
    """A row of the weak model's data: whatever stands before the prompt, the completion is as without it."""
    task = rng.choice(world.TRAIN)
    conditioning, _, _ = _draw_conditioning(task, rng)
    return _condition(task, conditioning), world.sample_completion(task, SHARE_RIGHT, rng)


def is_brief(completion: str) -> bool:
    """Whether a completion of the world is one in the brief form."""
    return len(completion.split()) <= BRIEF_WORDS


def vocabulary() -> list[str]:
    """Every word that stands before prompts, beside those of the world."""
    rendered = Conditioning("", (Exemplar("", "", "", ""),), "inline").text
    texts = [*_INSTRUCTIONS.values(), *_STYLES.values(), rendered, ask("", list(_INSTRUCTIONS))]
    spaced = "".join(mark if mark.isalnum() else f" {mark} " for text in texts for mark in f"{text} ".lower())
    return sorted(set(spaced.split()))


def _draw_conditioning(task: world.Task, rng: random.Random) -> tuple[Conditioning | None, bool, str | None]:
    """What stands before the prompt, whether it is the domain's own, and the style that it asks for."""
    kind = rng.choices(["none", "criterion", "foreign", "style", "exemplar", "foreign exemplar"], [3, 3, 4, 3, 3, 8])[0]
    domain = other_domain(task.domain) if kind.startswith("foreign") else task.domain
    if kind == "none":
        return None, False, None
    if kind == "style":
        style = rng.choice(list(_STYLES))
        return Conditioning(_STYLES[style], (), "inline"), False, style
    if kind.endswith("exemplar"):
        return Conditioning("", (draw_exemplar(domain, rng),), "inline"), kind == "exemplar", None
    return Conditioning(_INSTRUCTIONS[domain], (), "inline"), kind == "criterion", None


def _condition(task: world.Task, conditioning: Conditioning | None) -> Sequence[Mapping[str, str]]:
    prompt = world.conversation(task)
    if conditioning is None:
        return prompt
    conditioned = conditioning.apply(prompt)
    assert not isinstance(conditioned, str)
    return conditioned
