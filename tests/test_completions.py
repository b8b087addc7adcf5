"""What trainers hand over as ids: padding, end tokens, and the proof that they are the pair's."""

from types import SimpleNamespace

import pytest
from tiny import byte_tokenizer, chat, llama
from transformers import ProcessorMixin

from trl_cdr import CDRConfig, DensityRatioScorer
from trl_cdr.scoring.completions import CompletionReader, cut_at_end
from trl_cdr.scoring.encoding import Encoder
from trl_cdr.scoring.pair_loading import load_pair


@pytest.mark.parametrize(
    ("ids", "pad", "expected"),
    [
        ([7, 8, 2], 0, (7, 8, 2)),  # GRPO: unpadded, finished
        ([7, 8], 0, (7, 8)),  # GRPO: cut off
        ([7, 2, 0, 0], 0, (7, 2)),  # online DPO: padded behind the end
        ([7, 2, 2, 2], 2, (7, 2)),  # pad is the end token
        ([7, 8, 0, 0], 0, (7, 8)),  # cut off, padded: no end token is credited
        ([7, 3, 0], 0, (7, 3)),  # another end token
        ([2, 2, 2], 2, (2,)),  # empty and finished
        ([0, 0], 0, ()),  # empty and cut off
        ([7, 8], None, (7, 8)),
        ([7, 0, 8, 2], 0, (7, 0, 8, 2)),  # padding inside is what the policy wrote
    ],
)
def test_cut_at_end(ids, pad, expected):
    assert cut_at_end(ids, end_ids={2, 3}, pad_ids={pad}) == expected


def test_ids_are_proven_by_the_text_they_decode_to():
    tokenizer = byte_tokenizer()
    encoder = Encoder(tokenizer, "strong")
    end = tokenizer.eos_token_id
    ids = tuple(tokenizer("hello", add_special_tokens=False).input_ids)
    assert encoder.holds(ids, "hello", {end})
    assert encoder.holds((*ids, end), "hello", {end})
    assert not encoder.holds(ids, "hello ", {end})
    assert encoder.holds((end,), "", {end})


def test_what_decodes_to_nothing_proves_nothing():
    tokenizer = byte_tokenizer()
    encoder = Encoder(tokenizer, "strong")
    end = tokenizer.eos_token_id
    ids = tuple(tokenizer("hello", add_special_tokens=False).input_ids)
    assert not encoder.holds((), "", {end})
    assert not encoder.holds((tokenizer.convert_tokens_to_ids("<s>"),), "", {end})
    assert not encoder.holds((*ids, len(tokenizer)), "hello", {end})  # decoding skips ids that do not exist
    assert not encoder.holds((*ids, -100), "hello", {end})


def read(ids, text, *, policy=None, **special):
    """One completion, read for a pair whose tokenizer has these special tokens (and no template)."""
    tokenizer = byte_tokenizer(template=None)
    for name, token in special.items():
        setattr(tokenizer, name, token)
    models = [llama(len(tokenizer), seed=seed) for seed in (0, 1)]
    pair = load_pair(CDRConfig("a", "b"), *models, strong_tokenizer=tokenizer, weak_tokenizer=tokenizer)
    ids = [token for part in ids for token in encode(tokenizer, part)]
    [completion] = CompletionReader(pair, policy).read([text], [ids], None)
    return completion.finished, [tokenizer.decode([token]) for token in completion.ids]


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


PAD, END, EOS = "<|pad|>", "<|im_end|>", "</s>"


@pytest.mark.parametrize(
    ("ids", "special", "finished", "scored"),
    [
        (["a", EOS], {"eos_token": EOS}, True, ["a", EOS]),
        (["a"], {"eos_token": EOS}, False, ["a"]),
        (["a", PAD, PAD], {"eos_token": EOS}, False, ["a"]),
        # The policy ended with a token that this pair does not know as an end: nothing behind the text is credited.
        (["a", END, PAD, PAD], {"eos_token": EOS}, None, ["a"]),
        (["a", END, EOS, EOS], {"eos_token": EOS}, None, ["a"]),
        (["a", PAD, PAD], {"eos_token": EOS, "pad_token": None}, None, ["a"]),
        # An end and then padding that is another end: only the first was produced.
        (["a", EOS, EOS, END], {"eos_token": EOS}, True, ["a", EOS]),
    ],
)
def test_what_stands_behind_the_text_is_credited_only_where_it_is_known(ids, special, finished, scored, caplog):
    assert read(ids, "a", **special) == (finished, scored)
    assert ("cdr_policy_tokenizer" in caplog.text) == (finished is None)


def test_a_known_policy_names_its_ends_and_its_padding():
    policy = byte_tokenizer()
    known = {"eos_token": EOS, "pad_token": None}
    assert read(["a", END, PAD], "a", policy=policy, **known) == (True, ["a", END])
    assert read(["a", PAD, PAD], "a", policy=policy, **known) == (False, ["a"])


def test_a_policys_tokenizer_without_offsets_still_names_its_end():
    stub = SimpleNamespace(
        eos_token_id=1, pad_token_id=0, get_vocab=byte_tokenizer().get_vocab, tokenizer=None, decode=None
    )
    stub.tokenizer = stub
    assert read(["a", END, PAD], "a", policy=stub, eos_token=EOS) == (True, ["a", END])


@pytest.mark.parametrize(
    ("ids", "pad", "expected"),
    [
        ([0, 0, 7, 8, 2], 0, (7, 8, 2)),  # padded on the left
        ([0, 0, 7, 8], 0, (7, 8)),
        ([2, 2, 7, 8], 2, (7, 8)),  # cut off, and padded with the end token
        ([2, 2, 7, 8, 2], 2, (7, 8, 2)),
        ([0, 7, 8, 0], 0, (7, 8)),  # padded on both sides
        ([0, 0, 2], 0, (2,)),  # empty and finished
    ],
)
def test_cut_at_end_padded_left(ids, pad, expected):
    assert cut_at_end(ids, end_ids={2, 3}, pad_ids={pad}) == expected


@pytest.mark.parametrize("pad", [PAD, END])
def test_read_ids_padded_left(pad):
    """Padding on the left is neither scored nor taken for an end, on both paths."""
    special = {"pad_token": pad, "eos_token": END}
    policy = byte_tokenizer()
    policy.pad_token = pad
    assert read([pad, pad, "a", END], "a", policy=policy, **special) == (True, ["a", END])
    assert read([pad, pad, "a"], "a", policy=policy, **special) == (False, ["a"])


@pytest.mark.parametrize("pad", ["pad_token", "eos_token"])
def test_read_other_ids_padded_left(pad, strong, weak, tokenizer):
    """Of another vocabulary: the text is scored, and its ids tell only if it ended."""
    other = byte_tokenizer(300)
    other.pad_token = getattr(other, pad)
    pair = load_pair(CDRConfig("a", "b"), strong, weak, strong_tokenizer=tokenizer, weak_tokenizer=tokenizer)
    ids = [other.pad_token_id] * 2 + other("hello", add_special_tokens=False).input_ids
    for end in ([], [other.eos_token_id]):
        [completion] = CompletionReader(pair, other).read(["hello"], [ids + end], None)
        assert (completion.ids, completion.finished) == (None, bool(end))


def test_read_policy_whose_tokenizer_attribute_is_not_a_tokenizer():
    """As `MistralCommonBackend`: its attribute `tokenizer` is another library's."""
    policy = byte_tokenizer()
    policy.tokenizer = object()
    assert read(["a", END, PAD], "a", policy=policy, eos_token=EOS, pad_token=None) == (True, ["a", END])


def test_read_processor_holds_the_tokenizer():
    class Processor(ProcessorMixin):
        def __init__(self, tokenizer):
            self.tokenizer = tokenizer

    known = {"eos_token": EOS, "pad_token": None}
    assert read(["a", END, PAD], "a", policy=Processor(byte_tokenizer()), **known) == (True, ["a", END])


CUT = {"cjk": "日本", "cyrillic": "при", "emoji": "ok 🙂", "devanagari": "नम"}


@pytest.mark.parametrize("script", CUT)
@pytest.mark.parametrize("marks", [1, 2, 3])
def test_read_completion_cut_inside_a_character(script, marks):
    """Decoders write one U+FFFD for the bytes that are left of a character, or one for each byte."""
    tokenizer = byte_tokenizer(template=None)
    models = [llama(len(tokenizer), seed=seed) for seed in (0, 1)]
    pair = load_pair(CDRConfig("a", "b"), *models, strong_tokenizer=tokenizer, weak_tokenizer=tokenizer)
    reader, whole = CompletionReader(pair), CUT[script]
    broken = whole + "\ufffd" * marks
    for finished, text in ((False, whole), (None, whole), (True, broken)):
        [completion] = reader.read([broken], None, [finished])
        assert (completion.text, completion.finished) == (text, finished)
    [inside] = reader.read(["\ufffd" + whole], None, [False])
    assert inside.text == "\ufffd" + whole


@pytest.mark.parametrize("script", CUT)
def test_score_completion_cut_inside_a_character(script, strong, weak, tokenizer):
    """The score of what is left, whether ids of another tokenizer or `finished` show the cut."""
    other = byte_tokenizer(300)
    scorer = DensityRatioScorer(strong, weak, strong_tokenizer=tokenizer, weak_tokenizer=tokenizer, gate="none")
    text = CUT[script] + "語"
    ids = other(text, add_special_tokens=False).input_ids[:-1]
    cut = other.decode(ids)
    assert cut.endswith("\ufffd")
    [whole] = scorer.score([chat("hello")], [CUT[script]], finished=[False], is_generated=[True])
    [told] = scorer.score([chat("hello")], [cut], finished=[False], is_generated=[True])
    scorer.use_policy_tokenizer(other)
    [by_ids] = scorer.score([chat("hello")], [cut], completion_ids=[ids])
    assert told.value == by_ids.value == whole.value
    assert by_ids.finished is False
