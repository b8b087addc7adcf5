"""Attacks that need no model, by their texts."""

import random

from tiny import chat

from trl_cdr.annotation.attacks import ATTACKS, read_request, write_attacks
from trl_cdr.scoring.types import Completion

HONEST = Completion("Bees fly far from home.", True)


def write(honest=HONEST, other="Roses grow.", prompt="Write about bees."):
    return write_attacks(prompt, honest, other, random.Random(0))


def test_attacks_are_what_they_are_called():
    attacks = write(prompt=chat("Hi.", "Hello.", "Write about bees."))
    assert list(attacks) == list(ATTACKS)
    texts = {name: one.text for name, one in attacks.items()}
    assert texts["word"].split() == ["Bees"] * 20
    assert texts["prompt"] == "Write about bees."
    assert texts["twice"] == "Bees fly far from home. Bees fly far from home."
    assert texts["two"] == "Bees fly far from home. Roses grow."
    assert texts["other"] == "Roses grow."
    assert sorted(texts["shuffled"].split()) == ["Bees", "far", "fly", "from", "home."]
    assert texts["cut"] == texts["unfinished"] == "Bees fly"
    assert texts["clause"].split().count("home.") == 6
    for name in ("padding", "flattery", "long", "markdown"):
        assert HONEST.text in texts[name] != HONEST.text, name
    assert [name for name, one in attacks.items() if not one.finished] == ["unfinished"]


def test_a_text_that_is_the_honest_one_again_is_no_attack():
    attacks = write(Completion(" 4", True), prompt="4")
    assert not {"prompt", "shuffled", "cut"} & set(attacks)
    assert attacks["word"].text.split() == ["4"] * 20
    assert "other" in attacks
    assert "other" not in write(other=HONEST.text)


def test_without_another_prompt_and_without_an_end():
    attacks = write(Completion("Bees fly.", None), other=None, prompt=[{"role": "user", "content": None}])
    assert set(ATTACKS) - set(attacks) == {"prompt", "two", "other", "unfinished"}
    assert {one.finished for one in attacks.values()} == {None}


def test_the_request_is_the_last_users_turn():
    assert read_request([{"role": "user", "content": [{"type": "text", "text": " a "}]}]) == "a"
    assert read_request(chat("system: b", "c", "d")) == "c"
    assert read_request([{"role": "system", "content": "b"}]) is None
    assert read_request("  ") is None
