"""What is learnt from a chat template: text around an answer, thoughts, ends of turns, roles, and dates."""

from datetime import date

import pytest
from tiny import BRACKETS, CHATML, DATED, OPEN, THINKING, byte_tokenizer, chat

from trl_cdr.scoring.chat_template import ChatTemplate
from trl_cdr.scoring.encoding import Encoder
from trl_cdr.scoring.types import Completion, Unscorable

# GLM's: no end of a turn but the marker of the next one.
NEXT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HEAD = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"


def read(template, text="what", finished=True, *, prompt=None, generated=False, ends=(), **options):
    """The text before a completion, and the completion with its end."""
    tokenizer = byte_tokenizer(template=template)
    encoder = Encoder(tokenizer, "strong", generation_ends=ends, **options)
    row = encoder.encode(prompt or chat("hello"), Completion(text, finished, is_generated=generated))
    return tokenizer.decode(row.prompt_ids), tokenizer.decode(row.completion_ids)


def test_encode_answer_without_thoughts():
    before, completion = read(THINKING)
    assert before == HEAD + "<think>\n\n</think>\n\n"
    assert completion == "what<|im_end|>"


@pytest.mark.parametrize(
    "thoughts", ["<think>\nthis\n</think>\n\n", "<think>this</think>", "<think>\n", "<think></think>"]
)
def test_encode_answer_with_thoughts_of_its_own(thoughts):
    assert read(THINKING, thoughts + "what") == (HEAD, thoughts + "what<|im_end|>")
    before, completion = read(OPEN, thoughts + "what")
    assert before + completion == HEAD + thoughts + "what<|im_end|>"
    assert before in (HEAD + "<think>\n", HEAD + "<think>")


def test_encode_answer_that_goes_on_after_open_thought():
    before, completion = read(OPEN, "this\n</think>\n\nwhat")
    assert (before, completion) == (HEAD + "<think>\n", "this\n</think>\n\nwhat<|im_end|>")


def test_encode_answer_without_opening_where_prompt_opens_none():
    before, completion = read(THINKING, "this\n</think>\n\nwhat")
    assert (before, completion) == (HEAD + "<think>\n", "this\n</think>\n\nwhat<|im_end|>")


@pytest.mark.parametrize(("finished", "expected"), [(True, "<think>\n\n</think>\n\n"), (False, "<think>\n")])
def test_encode_answer_with_open_thought_and_no_close(finished, expected):
    """A finished answer has no thoughts; one that was cut off was cut in its thoughts."""
    before, _ = read(OPEN, "what", finished)
    assert before == HEAD + expected


@pytest.mark.parametrize("template", [CHATML, THINKING, OPEN])
@pytest.mark.parametrize("text", ["what", "<think>this</think>what", "this</think>what"])
def test_encode_generated_text_follows_the_prompt(template, text):
    tokenizer = byte_tokenizer(template=template)
    shown = tokenizer.apply_chat_template(chat("hello"), tokenize=False, add_generation_prompt=True)
    assert read(template, text, generated=True) == (shown, text + "<|im_end|>")


def test_encode_continued_turn_gets_nothing_inserted():
    before, completion = read(CHATML, " this", prompt=chat("hello", "what is"))
    assert (before, completion) == (HEAD + "what is", " this<|im_end|>")


def test_encode_spelled_thought_tokens_that_are_special():
    """The template's own tags in an answer are tokens even if they are flagged as special; other tokens are text."""
    tokenizer = byte_tokenizer(template=THINKING)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    text = "<think>\nthis<|im_end|>\n</think>\n\nwhat"
    row = Encoder(tokenizer, "strong").encode(chat("hello"), Completion(text, True))
    tags = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    assert [row.completion_ids.count(tag) for tag in tags] == [1, 1]
    assert row.completion_ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 1
    assert tokenizer.decode(row.completion_ids) == text + "<|im_end|>"


@pytest.mark.parametrize(
    ("template", "opens", "tag"), [(CHATML, False, None), (THINKING, False, "<think>"), (OPEN, True, "<think>")]
)
def test_thoughts_are_learnt(template, opens, tag):
    learnt = ChatTemplate(byte_tokenizer(), "strong", template)
    assert learnt.opens_thought is opens
    assert (learnt.thoughts and learnt.thoughts.tag) == tag
    assert learnt.has_switch is (template != OPEN)
    assert (tag or "none") in Encoder(byte_tokenizer(template=template), "strong").describe_thoughts()


def test_end_of_turn_is_the_next_turns_marker():
    """If the generation config names it; without one the template is the only source; else it is the end of text."""
    tokenizer = byte_tokenizer(template=NEXT)
    marker = tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert read(NEXT, ends=[marker])[1] == "what<|im_start|>"
    assert read(NEXT)[1] == "what<|im_start|>"
    assert read(NEXT, ends=[tokenizer.eos_token_id])[1] == "what<|im_end|>"
    assert marker in Encoder(tokenizer, "strong", generation_ends=[marker]).end_ids


def test_end_of_turn_with_two_tokens():
    template = CHATML.replace("{{ m.content }}", "{{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}")
    assert read(template)[1] == "what</s><|im_end|>"
    encoder = Encoder(byte_tokenizer(template=template), "strong")
    assert encoder.end_of_turn == "<|im_end|>"
    first = byte_tokenizer().convert_tokens_to_ids("</s>")
    assert first not in encoder.end_ids
    # a generation config that ends at the first one
    assert read(template, ends=[first])[1] == "what</s>"


def test_end_of_conversation_is_no_end_of_turn():
    """Phi-3's template writes the end of text after the whole conversation."""
    template = CHATML + "{% if not add_generation_prompt %}{{ eos_token }}</s>{% endif %}"
    assert read(template)[1] == "what<|im_end|>"


def test_space_before_an_answer_is_the_templates():
    before, completion = read(BRACKETS)
    assert (before, completion) == ("<s>[INST] hello [/INST]", " what</s>")


DROPS = {
    "developer": "{% for m in messages if m.role in ('system', 'user', 'assistant') %}",
    "tool": "{% for m in messages if m.role != 'tool' %}",
    "critic": "{% for m in messages if m.role in ('system', 'developer', 'user', 'assistant', 'tool') %}",
    "second system": "{% for m in messages if m.role != 'system' or m == messages[0] %}",
}


@pytest.mark.parametrize("role", DROPS)
def test_check_dropped_turn_raises(role):
    template = CHATML.replace("{% for m in messages %}", DROPS[role])
    name = role.removeprefix("second ")
    turns = [*chat("hello", "hi"), {"role": name, "content": "hello"}, *chat("hello")]
    if role == "second system":
        turns = [*chat("system:be kind", "hello"), {"role": "system", "content": "hello"}]
    index = next(i for i in reversed(range(len(turns))) if turns[i]["role"] == name)
    with pytest.raises(Unscorable, match=rf"strong's chat template leaves out message {index} .* the role '{name}'"):
        read(template, prompt=turns)
    assert read(CHATML, prompt=turns)[0].count("hello") == sum(turn["content"] == "hello" for turn in turns)


def test_check_dropped_turn_with_fields_raises():
    """A turn with more than role and content is looked at every time."""
    template = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.name is not defined %}")
    with pytest.raises(Unscorable, match="leaves out message 0"):
        read(template, prompt=[{"role": "user", "content": "hello", "name": "Ann"}, *chat("what")])
    assert "hello" in read(template, prompt=chat("hello"))[0]


def test_date_is_the_given_one():
    for day in (date(2026, 11, 29), date(2026, 11, 30)):
        assert read(DATED, today=day)[0].startswith(f"Today is {day:%d %B %Y}.\n<|im_start|>")


@pytest.mark.parametrize("template", [CHATML, THINKING, BRACKETS])
def test_template_without_date_has_none(template):
    encoder = Encoder(byte_tokenizer(template=template), "strong", today=date(2026, 11, 29))
    assert encoder.written_date is None
    assert encoder.is_like(Encoder(byte_tokenizer(template=template), "strong", today=date(2026, 11, 30)))


def test_encoders_of_different_dates_are_not_alike():
    first, second = (Encoder(byte_tokenizer(template=DATED), "strong", today=date(2026, 11, day)) for day in (29, 30))
    assert first.written_date == "2026-11-29"
    assert not first.is_like(second)
