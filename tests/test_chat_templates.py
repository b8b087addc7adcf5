"""Every chat template that the installed TRL ships: the scored tokens are those of the template's own text."""

import re
from collections import Counter
from pathlib import Path

import pytest
import trl
from packaging.version import Version
from tiny import byte_tokenizer

from trl_cdr import ConfigError
from trl_cdr.conditioning.criteria import Conditioning
from trl_cdr.scoring.encoding import Encoder
from trl_cdr.scoring.types import Completion

# A clone without constraints may have a TRL whose new templates nobody has read yet.
KNOWN = Version("1.17")
pytestmark = pytest.mark.xfail(
    Version(trl.__version__) >= KNOWN, reason="this TRL may have templates that are new", strict=False
)

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
    """Print how many rows of all templates had each outcome; `-s` shows it."""
    counts = Counter()
    yield counts
    print("\n" + "\n".join(f"{outcome:62} {number}" for outcome, number in sorted(counts.items())))


def with_thoughts(tokenizer, prompt, folder):
    """The text of a conversation whose answer has thoughts, and where it is from."""
    for field in ("reasoning_content", "thinking"):
        text = whole(tokenizer, prompt, ANSWER, **{field: THOUGHT})
        if text is not None and THOUGHT in text:
            return text, "thoughts: the template's own text"
    answer = f"<think>\n{THOUGHT}\n</think>\n\n{ANSWER}"
    text = whole(tokenizer, prompt, answer)
    if answer in text:
        return text, "thoughts: the template's own text, as content"
    # DeepSeek's templates drop the thoughts of a turn that is over. TRL's training template for R1 keeps them.
    kept = (folder / "deepseek_r1_distill_training.jinja").read_text(encoding="utf-8")
    turns = [*prompt, {"role": "assistant", "content": answer}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, chat_template=kept)
    return text, "thoughts: dropped by the template, as R1's training template"


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_encode_plain_answer(path, counts):
    tokenizer = tokenizer_of(path.read_text(encoding="utf-8"))
    for given in PROMPTS.values():
        if drops_users(tokenizer):
            with pytest.raises(ConfigError, match="leaves out what the user says"):
                read(tokenizer, path.stem, given, Completion(ANSWER, True))
            counts["plain answer: refused, for images"] += 1
            continue
        row, prompt = read(tokenizer, path.stem, given, Completion(ANSWER, True))
        expected = up_to_end(path.stem, whole(tokenizer, prompt, ANSWER))
        assert row.ids == tuple(tokenizer(expected, add_special_tokens=False).input_ids)
        assert tokenizer.decode(row.completion_ids).startswith(ANSWER)
        counts["plain answer: the template's own text"] += 1


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_encode_answer_with_thoughts(path, counts):
    """As a data set has it, with its opening, and as a policy writes it if its prompt has the opening."""
    tokenizer = tokenizer_of(path.read_text(encoding="utf-8"))
    if drops_users(tokenizer):
        counts["thoughts: refused, for images"] += len(PROMPTS)
        return
    for given in PROMPTS.values():
        _, prompt = read(tokenizer, path.stem, given, Completion(ANSWER, True))
        text, outcome = with_thoughts(tokenizer, prompt, path.parent)
        expected = up_to_end(path.stem, text)
        shown = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        body = expected[: re.search(rf"\s*({CONTROL})+$", expected).start()]
        opening = next(opening for opening in OPENINGS if opening in body.rpartition(THOUGHT)[0])
        written = [body[body.rindex(opening) :]]
        if expected.startswith(shown):
            written.append(body.removeprefix(shown))
        for answer in written:
            row, _ = read(tokenizer, path.stem, prompt, Completion(answer, True))
            assert row.ids == tuple(tokenizer(expected, add_special_tokens=False).input_ids)
            assert THOUGHT in tokenizer.decode(row.completion_ids)
            before = tokenizer.decode(row.prompt_ids)
            assert shown.startswith(before) or before.strip() == shown.strip()
        counts[outcome] += 1


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_encode_generated_answer(path):
    """A policy's text follows the generation prompt that it was shown."""
    tokenizer = tokenizer_of(path.read_text(encoding="utf-8"))
    if drops_users(tokenizer):
        return
    for text in (ANSWER, f"{THOUGHT}</think>{ANSWER}", f"<think>{THOUGHT}"):
        completion = Completion(text, False, is_generated=True)
        row, prompt = read(tokenizer, path.stem, PROMPTS["system"], completion)
        shown = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        assert row.ids == tuple(tokenizer(shown + text, add_special_tokens=False).input_ids)
