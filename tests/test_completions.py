"""What trainers hand over as ids: padding, end tokens, and the proof that they are the pair's."""

import pytest
from tiny import byte_tokenizer

from trl_cdr.scoring.completions import cut_at_end
from trl_cdr.scoring.encoding import Encoder


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
    assert cut_at_end(ids, end_ids={2, 3}, pad_id=pad) == expected


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
