"""The real world's tasks: split by topic and by kind, and a gold that does what it says."""

import pytest

from trl_cdr.demo import real_world
from trl_cdr.demo.real_world import (
    HELD_OUT,
    HELD_OUT_AGAIN,
    HELD_OUT_MORE,
    HELD_OUT_UNSEEN,
    SEEN,
    TOPICS,
    TRAIN,
    UNSEEN,
    WRITTEN,
    Task,
    gold,
)


def task(name, value="", topic="bees"):
    kind = next(kind for kind in (*SEEN, *UNSEEN) if kind.name == name)
    return Task(topic, kind, value)


def test_topics_and_kinds_are_split():
    assert len(set(TOPICS)) == len(TOPICS) == 96
    assert len(SEEN) == len(UNSEEN) == 6
    assert not {kind.name for kind in SEEN} & {kind.name for kind in UNSEEN}
    held_out = (*HELD_OUT, *HELD_OUT_AGAIN, *HELD_OUT_MORE, *HELD_OUT_UNSEEN)
    assert not {task.topic for task in TRAIN} & {task.topic for task in held_out}
    assert (len(TRAIN), len(HELD_OUT), len(HELD_OUT_AGAIN)) == (72 * (6 + 5), 24 * 6, 24 * 5)
    assert (len(HELD_OUT_MORE), len(HELD_OUT_UNSEEN)) == (32 * (6 + 5), 24 * 6)
    requests = [task.request for task in (*TRAIN, *held_out)]
    assert len(set(requests)) == len(requests)


RIGHT_AND_WRONG = [
    ("word", "old", "Bees are an old family.", "Bees hold on to golden things."),
    ("begin", "In", "In summer bees fly far.", "Inside a hive live bees."),
    ("at_most", "5", "Bees fly from May on.", "Bees fly from early May on."),
    ("at_least", "6", "Bees fly from early May on.", "Bees fly from May on."),
    ("no_commas", "", "Bees fly and dance.", "Bees fly, and dance."),
    ("without", "the", "Bees know their other sisters.", "Bees leave The hive."),
    ("past", "", "The bees were here first.", "Bees wash their hives."),
    ("number", "", "Bees have 6 legs.", "Bees have six legs."),
    ("first_person", "", "I like bees.", "Idle bees like it."),
    ("question", "", "Do bees sleep? ", "Do bees sleep? They do."),
    ("colour", "", "Bees see blue.", "Bees bluff."),
    ("one_sentence", "", "Bees fly 2.5 miles.", "Bees fly. They dance."),
]


@pytest.mark.parametrize(("name", "value", "right", "wrong"), RIGHT_AND_WRONG)
def test_each_kind_tells_right_from_wrong(name, value, right, wrong):
    assert gold(task(name, value), right, True) == 1
    assert gold(task(name, value), wrong, True) == 0
    assert {one[0] for one in RIGHT_AND_WRONG} == {kind.name for kind in (*SEEN, *UNSEEN)}


@pytest.mark.parametrize(
    ("text", "finished"),
    [
        ("Bees fly and dance.", False),
        ("They fly and dance.", True),
        ("Bees fly and dance and bees fly and dance.", True),
        ("Bees fly fly fly.", True),
        ("", True),
    ],
    ids=["cut off", "another topic", "four words twice", "a word three times", "nothing"],
)
def test_what_is_no_completion_is_not_gold(text, finished):
    assert gold(task("no_commas"), "Bees fly and dance.", True) == 1
    assert gold(task("no_commas"), text, finished) == 0


@pytest.mark.parametrize(
    ("topic", "right", "wrong"),
    [
        ("foxes", "A red fox sleeps.", "A red ox sleeps."),
        ("wolves", "The wolf's den is deep.", "The den is deep."),
        ("cherries", "Cherries and a cherry.", "A cheery day."),
        ("buses", "Take the bus!", "She is busy in business."),
    ],
)
def test_a_topic_is_named_in_the_singular_too(topic, right, wrong):
    assert [gold(task("no_commas", topic=topic), text, True) for text in (right, wrong)] == [1, 0]


def test_every_topic_in_the_plural_has_a_singular_that_names_it():
    irregular = {topic for topic in real_world._MORE_TOPICS if topic.endswith(("ies", "ves", "xes", "hes", "ses"))}
    assert irregular - {"houses"} == set(real_world._SINGULARS)
    assert not {topic for topic in TOPICS if topic.endswith(("ies", "ves", "xes"))} - {"caves"}


def test_a_conversation_names_its_task():
    for one in (TRAIN[0], HELD_OUT[7], HELD_OUT_UNSEEN[-1]):
        system = {"role": "system", "content": "Be kind."}
        for text in ("", f"In the summer {one.topic} are red, not 7."):
            assert real_world.gold_of_prompt([system, *one.prompt], text, True) == gold(one, text, True)


def test_what_people_wrote_is_gold():
    assert len(WRITTEN) == 24
    assert [gold(task, text, True) for task, text in WRITTEN] == [1.0] * 24
