"""What trainers hand over as ids: padding, end tokens, and the proof that they are the pair's."""

from types import SimpleNamespace

import pytest
from tiny import byte_tokenizer, llama

from trl_cdr import CDRConfig
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
