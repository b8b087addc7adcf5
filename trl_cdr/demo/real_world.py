"""The real world: requests in plain English that a program can check. Text only; knows no model.

A task asks for a sentence about a topic and sets one condition, such as a word to use or a number of words to keep to
(checkable instructions are the idea of IFEval, arXiv 2311.07911; these are our own). *Gold* is the check, and that the
text ended by itself, names its topic and does not repeat itself. Conditions pull in different directions: some are met
by short texts, some by long ones, most by neither, so that length alone is a bad judge.

Topics are split into those that are trained on and those held out, kinds of condition into seen and unseen ones: a pair
is tuned on seen kinds and training topics only.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

TOPICS = (
    "rivers", "bees", "chess", "honey", "lighthouses", "bread", "clouds", "bicycles", "penguins", "trains",
    "gardens", "bridges", "owls", "coffee", "castles", "snow", "mountains", "forests", "horses", "cats",
    "elephants", "dolphins", "whales", "turtles", "spiders", "ants", "apples", "cheese", "chocolate", "pizza",
    "soup", "salt", "rockets", "planets", "comets", "deserts", "islands", "oceans", "lakes", "caves",
    "windmills", "clocks", "mirrors", "candles", "poems", "guitars", "pianos", "drums", "violins", "trumpets",
    "paintings", "museums", "football", "tennis", "skating", "sailing", "kites", "balloons", "tractors",
    "robots", "computers", "telephones", "cameras", "telescopes", "magnets", "engines", "ladders", "umbrellas",
    "hats", "blankets", "farms", "markets", "schools", "airports", "roses", "tulips", "mushrooms", "carrots",
    "onions", "bananas", "lemons", "grapes", "rice", "pasta", "eggs", "milk", "rainbows", "earthquakes",
    "glaciers", "waterfalls", "parrots", "camels", "lizards", "sharks", "frogs", "tunnels",
)  # fmt: skip

_MORE_TOPICS = (
    "ducks", "foxes", "wolves", "bears", "lions", "tigers", "goats", "eagles", "snakes", "butterflies", "peaches",
    "cherries", "pumpkins", "tea", "sugar", "butter", "pepper", "storms", "hills", "valleys", "beaches", "swamps",
    "houses", "towers", "doors", "windows", "carpets", "baskets", "hammers", "needles", "boats", "buses",
)  # fmt: skip

_SINGULARS = {
    "foxes": "fox", "wolves": "wolf", "butterflies": "butterfly", "peaches": "peach", "cherries": "cherry",
    "beaches": "beach", "buses": "bus",
}  # fmt: skip
"""Of the topics that are not their singular and an s."""

MAX_NEW_TOKENS = 48
"""Where a completion is cut off. Nine of ten end before."""

Message = dict[str, str]


@dataclass(frozen=True)
class Kind:
    """One kind of condition: how it is put, the values that it is put with, and its check of a text."""

    name: str
    form: str
    check: Callable[[str, str], bool]
    values: tuple[str, ...] = ("",)


def _words(text: str) -> list[str]:
    return re.findall(r"[\w'\u2019-]+", text.lower())


def _uses(text: str, word: str) -> bool:
    return word.lower() in _words(text)


def _sentences(text: str) -> int:
    return len(re.findall(r"[.!?]+(?=\s|\"|'|$)", text.strip()))


_COLOURS = frozenset(
    {
        "black", "blue", "brown", "golden", "gray", "green", "grey", "orange", "pink", "purple", "red", "silver",
        "white", "yellow",
    }
)  # fmt: skip

SEEN = (
    Kind(
        "word",
        "Use the word '{}'.",
        _uses,
        (
            "people",
            "world",
            "home",
            "summer",
            "children",
            "night",
            "because",
            "many",
            "old",
            "friend",
            "morning",
            "small",
        ),
    ),
    Kind(
        "begin",
        "Begin it with the word '{}'.",
        lambda text, word: _words(text)[:1] == [word.lower()],
        ("The", "When", "In", "If", "A"),
    ),
    Kind("at_most", "Use at most {} words.", lambda text, most: len(_words(text)) <= int(most), ("12", "15", "18")),
    Kind("at_least", "Use at least {} words.", lambda text, least: len(_words(text)) >= int(least), ("20", "25")),
    Kind("no_commas", "Do not use any commas.", lambda text, _: "," not in text),
    Kind("without", "Do not use the word '{}'.", lambda text, word: not _uses(text, word), ("and", "the", "of")),
)
UNSEEN = (
    Kind("past", "Write it in the past tense.", lambda text, _: _uses(text, "was") or _uses(text, "were")),
    Kind("number", "Mention a number in digits.", lambda text, _: re.search(r"\d", text) is not None),
    Kind("first_person", "Write it in the first person.", lambda text, _: bool({"i", "my", "we"} & {*_words(text)})),
    Kind("question", "Make it a question.", lambda text, _: text.strip().endswith("?")),
    Kind("colour", "Name a colour in it.", lambda text, _: bool(_COLOURS & {*_words(text)})),
    Kind("one_sentence", "Write only one.", lambda text, _: _sentences(text) == 1),
)


@dataclass(frozen=True)
class Task:
    """A topic, a kind of condition and the value that it is put with."""

    topic: str
    kind: Kind
    value: str

    @property
    def request(self) -> str:
        """What the user asks."""
        return f"{_request(self.topic)} {self.condition}"

    @property
    def condition(self) -> str:
        """The condition as a sentence."""
        return self.kind.form.format(self.value)

    @property
    def prompt(self) -> list[Message]:
        """The request as a conversation."""
        return [{"role": "user", "content": self.request}]


def ask(topic: str) -> list[Message]:
    """The request without a condition, as a conversation."""
    return [{"role": "user", "content": _request(topic)}]


def _request(topic: str) -> str:
    return f"Write a sentence about {topic}."


def _split(*, held_out: bool) -> list[str]:
    return [topic for place, topic in enumerate(TOPICS) if (place % 4 == 3) == held_out]


def _tasks(topics: list[str], kinds: tuple[Kind, ...], *, turns: Sequence[int] = (0,)) -> list[Task]:
    """Every topic under every kind of condition, in each turn with another value."""
    return [
        Task(topic, kind, kind.values[(place + turn) % len(kind.values)])
        for turn in turns
        for place, topic in enumerate(topics)
        for kind in kinds
        if turn < len(kind.values)
    ]


TRAIN = _tasks(_split(held_out=False), SEEN, turns=(0, 1))
"""72 topics x 6 kinds, and once more with other values: 792."""
HELD_OUT = _tasks(_split(held_out=True), SEEN)
"""24 topics that are not trained on x the same kinds."""
HELD_OUT_AGAIN = _tasks(_split(held_out=True), SEEN, turns=(1,))
"""The same topics and kinds with other values: 120 more."""
HELD_OUT_MORE = _tasks(list(_MORE_TOPICS), SEEN, turns=(0, 1))
"""32 other topics x the same kinds, in two turns: 352 more."""
HELD_OUT_UNSEEN = _tasks(_split(held_out=True), UNSEEN)
"""The same topics x 6 kinds that are not trained on either."""

_BY_REQUEST = {task.request: task for task in (*TRAIN, *HELD_OUT, *HELD_OUT_AGAIN, *HELD_OUT_MORE, *HELD_OUT_UNSEEN)}


def gold_of_prompt(prompt: list[Message], text: str, finished: bool) -> float:
    """`gold`, of the task whose conversation this is; what stands before the user's turn does not count."""
    return gold(_BY_REQUEST[prompt[-1]["content"]], text, finished)


def gold(task: Task, text: str, finished: bool) -> float:
    """
    1 where the text does what was asked, ended by itself, names its topic and does not repeat itself; else 0.

    Args:
        task (`Task`): What was asked.
        text (`str`): The completion, without special tokens.
        finished (`bool`): Whether it ended by itself.
    """
    return float(is_well_formed(task, text, finished) and task.kind.check(text, task.value))


def is_well_formed(task: Task, text: str, finished: bool) -> bool:
    """What gold asks for beside the condition: the text ended by itself, names its topic, does not repeat itself."""
    return finished and _names(text.lower(), task.topic) and not repeats(text)


def _names(text: str, topic: str) -> bool:
    singular = _SINGULARS.get(topic)
    return topic.removesuffix("s") in text or (singular is not None and re.search(rf"\b{singular}\b", text) is not None)


def repeats(text: str) -> bool:
    """Whether four words in a row come twice, or one word three times in a row."""
    words = _words(text)
    runs: list[tuple[Any, ...]] = list(zip(*(words[start:] for start in range(4)), strict=False))
    return len(set(runs)) < len(runs) or any(
        one == two == three for one, two, three in zip(words, words[1:], words[2:], strict=False)
    )


_SENTENCES = {
    "honey": "Honey keeps for years if the jar is closed well.",
    "bicycles": "Bicycles need little more than air in the tyres and oil on the chain.",
    "bridges": "Some bridges open in the middle to let ships pass.",
    "snow": "Snow makes the whole street quiet before anyone is awake.",
    "cats": "Cats find the warmest place in any room.",
    "turtles": "Turtles hatch at night and run for the sea.",
    "cheese": "My uncle says that cheese tastes best when it is not cold.",
    "salt": "Too much salt spoils a soup faster than too much of anything else.",
    "deserts": "After a night of rain some deserts are full of flowers.",
    "caves": "The deeper caves hold the same temperature all year round.",
    "candles": "Candles burn twice as fast in a draught.",
    "drums": "You can hear the drums long before you see the parade.",
    "museums": "I like museums best on a wet Tuesday when nobody else is there.",
    "sailing": "Sailing means waiting for wind and then having too much of it.",
    "robots": "Most robots never leave the factory that they work in.",
    "telescopes": "Large telescopes stand on mountains because the air is thin and dry there.",
    "umbrellas": "Umbrellas are left on trains more often than anything else.",
    "markets": "Markets close early and the best bread is gone by nine.",
    "tulips": "Tulips bend towards the window even in a vase.",
    "bananas": "Bananas turn brown sooner when they lie next to apples.",
    "pasta": "Pasta wants more water than most people give it.",
    "earthquakes": "Most earthquakes are too weak to wake anyone.",
    "camels": "Camels carry fat in their humps and no water at all.",
    "tunnels": "Two crews dug the tunnels from both ends and met in the middle.",
}
WRITTEN = [(task, _SENTENCES[task.topic]) for task in HELD_OUT if task.kind.name == "no_commas"]
"""Held-out tasks that a person did."""
