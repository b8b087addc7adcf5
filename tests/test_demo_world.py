"""The tiny world's language and its gold rules."""

import random
import subprocess
import sys

import pytest

from trl_cdr.demo import world

TASKS = list(world.TASKS.values())


def judge(prompt, completion, finished=True):
    return world.gold([{"role": "user", "content": prompt}], completion, finished)


def test_every_right_completion_has_gold_1_and_every_wrong_one_0():
    for task in TASKS:
        assert [judge(task.prompt, text) for text in task.right] == [1.0] * len(task.right), task
        assert [judge(task.prompt, text) for text in task.wrong] == [0.0] * len(task.wrong), task


def test_a_right_completion_is_wrong_when_cut_off():
    for task in TASKS:
        for text in task.right:
            words = text.split()
            assert judge(task.prompt, text, finished=False) == 0
            assert not any(judge(task.prompt, " ".join(words[:length])) for length in range(len(words)))


def test_a_right_completion_is_wrong_for_another_answer():
    assert judge("what is 3 + 5 ?", "the answer is 8 .") == 1
    assert judge("what is 3 + 6 ?", "the answer is 8 .") == 0
    assert judge("how do i make soup ?", "sure , you can make bread at home .") == 0
    assert judge("do you like cats ?", "of course , dogs are quick .") == 0


def test_gold_judges_texts_that_no_data_contain():
    mixed = "thank you for asking , cats are soft ."
    assert mixed not in world.TASKS["do you like cats ?"].right
    assert judge("do you like cats ?", mixed) == 1


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        "8",
        "8 8 8 8 .",
        "the answer is 8",
        "the answer is 9 . the answer is 8 .",
        "8 is answer the get 8 .",
        "the the answer is 8 .",
        "you get 9 , then you get 8 .",
        "quantum <|unk|> 8 .",
        "if you add 3 and 5 together , then you get 8 . " * 5,
    ],
)
def test_nonsense_has_gold_0(text):
    assert judge("what is 3 + 5 ?", text) == 0


def test_gold_reads_the_last_message_and_refuses_foreign_prompts():
    system = {"role": "system", "content": "be brief ."}
    assert world.gold([system, {"role": "user", "content": "add 1 and 2 ."}], "the answer is 3 .", True) == 1
    with pytest.raises(KeyError, match="who are you"):
        judge("who are you ?", "sure .")


def test_domains_forms_and_lengths():
    sizes = {domain: sum(task.domain == domain for task in TASKS) for domain in ("safety", "reasoning", "chat")}
    assert sizes == {"safety": 480, "reasoning": 410, "chat": 160}
    for task in TASKS:
        for texts in (task.right, task.wrong):
            lengths = [len(text.split()) for text in texts]
            assert max(lengths) <= world.MAX_WORDS
            assert sum(length <= 9 for length in lengths) * 2 == len(lengths)  # as many brief as detailed ones


def test_the_split_is_a_fifth_of_every_domain():
    assert len(world.TRAIN) + len(world.HELD_OUT) == len(TASKS)
    for domain in ("safety", "reasoning", "chat"):
        held_out = [task.held_out for task in TASKS if task.domain == domain]
        assert 0.15 < sum(held_out) / len(held_out) < 0.25


def test_the_split_and_the_vocabulary_are_the_same_in_every_process():
    code = "from trl_cdr.demo import world; print([task.prompt for task in world.HELD_OUT], world.vocabulary())"
    runs = [
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    ]
    assert runs[0] == runs[1]
    assert runs[0].decode().strip() == f"{[task.prompt for task in world.HELD_OUT]} {world.vocabulary()}"


def test_sampling_follows_the_share_and_its_own_generator():
    task = world.TRAIN[0]
    draws = [world.sample_completion(task, 0.3, rng) for rng in [random.Random(0)] for _ in range(2000)]
    assert 0.26 < sum(judge(task.prompt, text) for text in draws) / len(draws) < 0.34
    assert set(draws) == {*task.right, *task.wrong}
    assert draws[:9] == [world.sample_completion(task, 0.3, rng) for rng in [random.Random(0)] for _ in range(9)]
