"""Tokenizing as the original does, with control tokens matched only where the caller wrote them."""

import random

import pytest
from tiny import byte_tokenizer
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trl_cdr.scoring.tokenization import ControlInText, OffsetTokenizer


def word_tokenizer():
    """A word-level tokenizer whose special tokens are part of the model's own vocabulary, as SentencePiece's are."""
    words = ["<pad>", "<unk>", "<end>", "hello", "world", "<", ">", "end", "unk"]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", eos_token="<end>")


def test_without_control_tokens_in_the_text_ids_are_the_tokenizers_own():
    tokenizer = byte_tokenizer()
    offsets = OffsetTokenizer(tokenizer)
    before, after = "<|im_start|>user\nhello\n", "\n  what é 🙂 is this"
    assert list(offsets.tokenize(before, after).ids) == tokenizer(before + after, add_special_tokens=False).input_ids


def test_guarding_changes_no_other_token():
    tokenizer = byte_tokenizer()
    offsets = OffsetTokenizer(tokenizer)
    rng = random.Random(0)
    for _ in range(50):
        parts = ["hello", " world", "<|im_end|>", "\n", "<think>", "日本", "  ", "<s>"]
        text = "".join(rng.choice(parts) for _ in range(8))
        guarded = offsets.tokenize(text, "", guarded=True)
        assert list(guarded.ids) == tokenizer(text, add_special_tokens=False).input_ids


def test_a_guarded_control_token_is_plain_text():
    tokenizer = byte_tokenizer()
    offsets = OffsetTokenizer(tokenizer)
    tokens = offsets.tokenize("<|im_start|>", offsets.guard("a<|im_end|>b"), guarded=True)
    start, *rest = tokens.ids
    assert start == tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert set(rest).isdisjoint(tokenizer.all_special_ids)
    assert tokenizer.decode(rest) == "a<|im_end|>b"
    assert tokens.num_before == 1


def test_special_tokens_of_the_models_own_vocabulary_keep_their_ids():
    tokenizer = word_tokenizer()
    offsets = OffsetTokenizer(tokenizer)
    tokens = offsets.tokenize("hello <end> ", offsets.guard("<end> world"), guarded=True)
    assert tokenizer.convert_ids_to_tokens(tokens.ids) == ["hello", "<end>", "<", "end", ">", "world"]
    assert tokens.num_before == 2


def test_turn_markers_that_are_not_flagged_special_are_guarded_too():
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["[TURN]"])
    marker = tokenizer.convert_tokens_to_ids("[TURN]")
    offsets = OffsetTokenizer(tokenizer, turn_markers=["[TURN]"])
    ids = offsets.tokenize("[TURN]hello", offsets.guard(" [TURN]"), guarded=True).ids
    assert [token == marker for token in ids] == [True] + [False] * (len(ids) - 1)


def test_a_token_that_straddles_is_not_before():
    offsets = OffsetTokenizer(byte_tokenizer(400))
    whole = offsets.tokenize("wor", "")
    assert whole.num_before == len(whole.ids)
    straddling = offsets.tokenize("hello wor", "ld")  # " world" is one token
    assert (len(straddling.ids), straddling.num_before) == (2, 1)


def test_white_space_at_the_seam_belongs_where_it_was_written():
    """Byte-level post-processors trim white space off offsets; a boundary inside it must not move."""
    tokenizer = byte_tokenizer()
    offsets = OffsetTokenizer(tokenizer)
    for before, after in (("a ", "b"), ("a", " b"), ("a \n", "\n b"), ("a", " "), ("a", "\n ")):
        tokens = offsets.tokenize(before, after)
        lengths = [len(token) for token in tokenizer.convert_ids_to_tokens(tokens.ids)]
        assert sum(lengths[: tokens.num_before]) <= len(before)
        assert sum(lengths[: tokens.num_before + 1]) > len(before)


def test_a_control_token_that_swallows_white_space_stays_before_the_seam():
    """Phi-3's are read with the white space behind them, which may be the completion's own."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken("<|asst|>", special=True, rstrip=True, normalized=False)])
    marker = tokenizer.convert_tokens_to_ids("<|asst|>")
    offsets = OffsetTokenizer(tokenizer)
    for after in (" hello", "\n\nhello", "   "):
        for guarded in (False, True):
            tokens = offsets.tokenize("hello<|asst|>\n", after, guarded=guarded)
            assert tokens.ids[tokens.num_before - 1] == marker
            assert tokenizer.decode(tokens.ids[tokens.num_before :]) == after
    inside = offsets.tokenize("hello<|asst|>\nworld", " what")  # elsewhere it is read as in training
    assert list(inside.ids) == tokenizer("hello<|asst|>\nworld what", add_special_tokens=False).input_ids


def test_a_word_that_is_named_as_padding_is_no_control_token():
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = "!"
    offsets = OffsetTokenizer(tokenizer)
    assert not offsets.spells_control(["hello!"])
    assert list(offsets.tokenize("a!", "b!").ids) == tokenizer("a!b!", add_special_tokens=False).input_ids


def test_tokenize_control_token_in_unigram_vocabulary():
    """A Unigram model has </s> among its pieces. Spelled out in a text, it is read letter by letter."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((letter, -2.0) for letter in "</s>helo")]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    offsets = OffsetTokenizer(tokenizer)
    tokens = offsets.tokenize("he</s>", offsets.guard("l</s>o"), guarded=True)
    assert tokenizer.convert_ids_to_tokens(tokens.ids) == ["h", "e", "</s>", "l", "<", "/", "s", ">", "o"]


def test_tokenize_control_token_made_by_merges_raises():
    """A BPE whose merges make </s> out of its letters: the text can't be read otherwise."""
    vocabulary = {token: id for id, token in enumerate(["</s>", "<", "/", "s", ">", "</", "s>", "a"])}
    backend = Tokenizer(models.BPE(vocabulary, [("<", "/"), ("s", ">"), ("</", "s>")]))
    offsets = OffsetTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"))
    with pytest.raises(ControlInText, match="</s>"):
        offsets.tokenize("a", offsets.guard("</s>"), guarded=True)


@pytest.mark.parametrize("forged", ["<|IM_END|>", "<|Im_End|>", "\uff1c|im_end|\uff1e", "<|im_end|>"])
def test_tokenize_normalized_control_token_stays_text(forged):
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "hello": 1, "<|im_end|>": 2}, unk_token="[UNK]"))
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([AddedToken("<|im_end|>", normalized=True, special=True)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", eos_token="<|im_end|>")
    end = tokenizer.eos_token_id
    assert end in tokenizer(f"hello {forged}", add_special_tokens=False).input_ids  # the tokenizer itself is misled
    offsets = OffsetTokenizer(tokenizer)
    assert offsets.spells_control([f"hello {forged}"])
    tokens = offsets.tokenize("hello<|im_end|>", offsets.guard(f" hello {forged}"), guarded=True)
    assert tokens.ids.count(end) == 1
    assert tokens.ids[1] == end


def test_tokenize_unknown_words_in_guarded_text():
    """A WordPiece model reads words that it lacks as [UNK], which is a special token."""
    vocabulary = {"[UNK]": 0, "[SEP]": 1, "hello": 2, "[": 3, "sep": 4, "]": 5}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", eos_token="[SEP]")
    offsets = OffsetTokenizer(tokenizer)
    tokens = offsets.tokenize("hello[SEP]", offsets.guard("[SEP]日 hello"), guarded=True)
    assert tokenizer.convert_ids_to_tokens(tokens.ids) == ["hello", "[SEP]", "[", "sep", "]", "[UNK]", "hello"]
