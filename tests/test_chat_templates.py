"""Every chat template that the installed TRL ships: the scored tokens are those of the template's own text."""

import re
from collections import Counter
from pathlib import Path

import pytest
import trl
from tiny import byte_tokenizer

from trl_cdr import ConfigError
from trl_cdr.conditioning.criteria import Conditioning
from trl_cdr.scoring.encoding import Encoder
from trl_cdr.scoring.types import Completion

FILES = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
NAMES = [path.stem for path in FILES]
ANSWER = "4 good"
THOUGHT = "one and one"
# Generation configs that name other ends than the tokenizer's: GLM ends a turn by the marker of the next one.
GENERATION_ENDS = {"glm4moe": "<|user|>", "glm4moe_training": "<|user|>"}
OPENINGS = ("<think>", "<|channel|>analysis<|message|>", "to=self<|message|>", "<|channel>thought")
CONTROL = r"<[^<>\s]+>"

PROMPTS = {
    "plain": [{"role": "user", "content": "2 + 2?"}],
    "system": [{"role": "system", "content": "be kind"}, {"role": "user", "content": "2 + 2?"}],
    "two turns": [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "2 fine"},
        {"role": "user", "content": "2 + 2?"},
    ],
}
CRITERIA = Conditioning("Prefer right answers.", (), "inline")
PROMPTS["criteria"] = CRITERIA.apply(PROMPTS["system"])
PROMPTS["criteria, two turns"] = CRITERIA.apply(PROMPTS["two turns"])


def tokenizer_of(text):
    """A tokenizer whose control tokens are those of the template."""
    tokenizer = byte_tokenizer(template=text)
    found = set(re.findall(rf"{CONTROL}|\[gMASK\]", text)) - {"<think>", "</think>"}
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(found)})
    ends = ("<|im_end|>", "<|END_OF_TURN_TOKEN|>", "<|eot_id|>", "<|return|>", "<|endoftext|>", "<|eot|>")
    tokenizer.eos_token = next((end for end in ends if end in text), "</s>")
    return tokenizer


def whole(tokenizer, prompt, answer, **fields):
    """The template's own text of a conversation; None if it refuses the conversation."""
    turn = {"role": "assistant", "content": answer, **fields}
    try:
        return tokenizer.apply_chat_template([*prompt, turn], tokenize=False)
    except Exception:  # templates raise all kinds of errors
        return None


def merge_system(prompt):
    """As a template without a system role gets it."""
    system, first, *rest = prompt
    return [{"role": "user", "content": f"{system['content']}\n\n{first['content']}"}, *rest]


def up_to_end(name, text):
    """The template's text up to the end of the turn of its last answer."""
    before, _, after = text.rpartition(ANSWER)
    end = re.match(rf"\s*({CONTROL})+", after)
    return before + ANSWER + (GENERATION_ENDS[name] if end is None else end[0])


def read(tokenizer, name, prompt, completion):
    """The row, and the text that the template itself writes for its prompt and an answer with some fields."""
    ends = [tokenizer.convert_tokens_to_ids(GENERATION_ENDS[name])] if name in GENERATION_ENDS else []
    encoder = Encoder(tokenizer, "strong", generation_ends=ends)
    if prompt[0]["role"] == "system" and not encoder.template.has_system_role:
        prompt = merge_system(prompt)
    return encoder.encode(prompt, completion), prompt


def drops_users(tokenizer):
    """Templates of image models that read no strings."""
    rendered = tokenizer.apply_chat_template(PROMPTS["plain"], tokenize=False, add_generation_prompt=True)
    return "2 + 2?" not in rendered


@pytest.fixture(scope="module")
def counts():
    counts = Counter()
    yield counts
    print("\n" + "\n".join(f"{outcome:60} {number}" for outcome, number in sorted(counts.items())))


@pytest.mark.parametrize("path", FILES, ids=NAMES)
@pytest.mark.parametrize("kind", PROMPTS)
def test_encode_plain_answer(path, kind, counts):
    tokenizer = tokenizer_of(path.read_text(encoding="utf-8"))
    if drops_users(tokenizer):
        with pytest.raises(ConfigError, match="leaves out what the user says"):
            read(tokenizer, path.stem, PROMPTS[kind], Completion(ANSWER, True))
        counts["plain answer: refused, for images"] += 1
        return
    row, prompt = read(tokenizer, path.stem, PROMPTS[kind], Completion(ANSWER, True))
    expected = up_to_end(path.stem, whole(tokenizer, prompt, ANSWER))
    assert row.ids == tuple(tokenizer(expected, add_special_tokens=False).input_ids)
    assert tokenizer.decode(row.completion_ids).startswith(ANSWER)
    counts["plain answer: the template's own text"] += 1


@pytest.mark.parametrize("path", FILES, ids=NAMES)
@pytest.mark.parametrize("kind", PROMPTS)
def test_encode_answer_with_thoughts(path, kind, counts):
    """As a data set holds it, opening and all, and as the policy writes it behind an opening in its prompt."""
    text = path.read_text(encoding="utf-8")
    tokenizer = tokenizer_of(text)
    if drops_users(tokenizer):
        counts["thoughts: refused, for images"] += 1
        return
    _, prompt = read(tokenizer, path.stem, PROMPTS[kind], Completion(ANSWER, True))
    expected = None
    for field in ("reasoning_content", "thinking"):
        found = whole(tokenizer, prompt, ANSWER, **{field: THOUGHT})
        if found is not None and THOUGHT in found:
            expected, outcome = up_to_end(path.stem, found), "thoughts: the template's own text"
    if expected is None:
        answer = f"<think>\n{THOUGHT}\n</think>\n\n{ANSWER}"
        expected, outcome = whole(tokenizer, prompt, answer), "thoughts: the template's own text, as content"
        if (
            answer not in expected
        ):  # DeepSeek's: a turn that is over loses its thoughts. TRL's template for R1 keeps them
            kept = (path.parent / "deepseek_r1_distill_training.jinja").read_text(encoding="utf-8")
            turns = [*prompt, {"role": "assistant", "content": answer}]
            expected = tokenizer.apply_chat_template(turns, tokenize=False, chat_template=kept)
            outcome = "thoughts: dropped by the template, as R1's training template"
        expected = up_to_end(path.stem, expected)
    shown = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    end = re.search(rf"\s*({CONTROL})+$", expected)
    body = expected[: end.start()]
    opening = next(opening for opening in OPENINGS if opening in body.rpartition(THOUGHT)[0])
    written = [body[body.rindex(opening) :]]
    if expected.startswith(shown):
        written.append(body.removeprefix(shown))
    for answer in written:
        row, _ = read(tokenizer, path.stem, prompt, Completion(answer, True))
        assert row.ids == tuple(tokenizer(expected, add_special_tokens=False).input_ids)
        assert THOUGHT in tokenizer.decode(row.completion_ids)
        prompt_text = tokenizer.decode(row.prompt_ids)
        assert shown.startswith(prompt_text) or prompt_text.strip() == shown.strip()
    counts[outcome] += 1


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_encode_generated_answer(path):
    """Whatever a policy wrote follows the generation prompt that it was shown."""
    tokenizer = tokenizer_of(path.read_text(encoding="utf-8"))
    if drops_users(tokenizer):
        pytest.skip("for images")
    for text in (ANSWER, f"{THOUGHT}</think>{ANSWER}", f"<think>{THOUGHT}"):
        completion = Completion(text, False, is_generated=True)
        row, prompt = read(tokenizer, path.stem, PROMPTS["system"], completion)
        shown = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        assert row.ids == tuple(tokenizer(shown + text, add_special_tokens=False).input_ids)
