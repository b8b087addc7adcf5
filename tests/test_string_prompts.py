"""Prompts that are strings: one meaning everywhere outside trainers, another one in trainers, told once."""

import json
import logging

import pytest
from datasets import Dataset, load_dataset
from tiny import answer, byte_tokenizer, chat, llama

from trl_cdr import CDRConfig, CDRJudge, CDRReward, ConfigError, DensityRatioScorer
from trl_cdr._compat import has_judges
from trl_cdr.annotation.annotate import AnnotateArguments, annotate
from trl_cdr.annotation.evaluate import evaluate
from trl_cdr.annotation.passes import Passes
from trl_cdr.annotation.preferences import read_preferences
from trl_cdr.annotation.probe import probe
from trl_cdr.annotation.reader import open_source
from trl_cdr.annotation.score_file import ScoreArguments, score_file
from trl_cdr.scoring.string_prompts import describe_strings, string_meaning

WORDS = ["hello", "what is this", "the quick brown fox", "a lazy dog"]
SAID = [" world", "that", "jumps", "over"]
TURNS = [chat(word) for word in WORDS]


def values(scores):
    return [score.value for score in scores]


@pytest.fixture
def make(strong, weak, tokenizer):
    def make(kind=DensityRatioScorer, template=True, **options):
        own = tokenizer if template else byte_tokenizer(template=None)
        return kind(strong, weak, strong_tokenizer=own, weak_tokenizer=own, gate="none", **options)

    return make


@pytest.mark.parametrize(
    ("option", "has_template", "in_trainer", "meaning"),
    [
        ("auto", True, False, "user"),
        ("auto", False, False, "text"),
        ("auto", True, True, "text"),
        ("auto", False, True, "text"),
        ("user", True, True, "user"),
        ("text", True, False, "text"),
    ],
)
def test_string_meaning(option, has_template, in_trainer, meaning):
    assert string_meaning(option, has_template=has_template, in_trainer=in_trainer) == meaning


def test_score_strings_as_turns(make):
    assert values(make().score(WORDS, SAID)) == values(make().score(TURNS, SAID))
    assert values(make(string_prompts="user").score(WORDS, SAID)) == values(make().score(TURNS, SAID))


def test_score_strings_as_text(make):
    raw = values(make(string_prompts="text").score(WORDS, SAID))
    assert raw != values(make().score(TURNS, SAID))
    assert values(make().score(WORDS, SAID, in_trainer=True)) == raw
    assert values(make(template=False).score(WORDS, SAID)) == raw


def test_score_strings_as_turns_without_template_raises(make):
    with pytest.raises(ConfigError, match="cdr_chat_template"):
        make(template=False, string_prompts="user").score(WORDS, SAID)


def test_score_strings_with_messages_are_turns(make):
    expected = values(make().score(TURNS, SAID))
    for option in ("auto", "text"):
        assert values(make(string_prompts=option).score(WORDS, [answer(text) for text in SAID])) == expected


def test_score_mixed_prompts(make):
    mixed = [WORDS[0], TURNS[1], WORDS[2], TURNS[3]]
    assert values(make().score(mixed, SAID)) == values(make().score(TURNS, SAID))


def test_reward_outside_a_trainer_reads_turns(make):
    reward = make(CDRReward)
    assert reward(WORDS, SAID) == reward(TURNS, SAID)
    raw = make(CDRReward, string_prompts="text")(WORDS, SAID)
    assert reward(WORDS, SAID, trainer_state=None) == raw  # what a trainer hands over


def test_judge_reads_what_its_trainer_means(make):
    """TRL 1.0 has trainers with judges; later a judge is called by its user."""
    judge, others = CDRJudge(make(CDRReward)), [" this", "world", "brown", "the"]
    pairs = [list(pair) for pair in zip(SAID, others, strict=True)]
    meant = CDRJudge(make(CDRReward, string_prompts="text" if has_judges() else "user"))
    expected = meant.judge(WORDS, pairs, return_scores=True)
    assert judge.judge(WORDS, pairs, return_scores=True) == expected


def test_meaning_is_told_once(make, caplog):
    scorer = make()
    with caplog.at_level(logging.INFO, logger="trl_cdr"):
        for _ in range(3):
            scorer.score(WORDS, SAID)
            scorer.score(TURNS, SAID)
        [told] = [record for record in caplog.records if "String prompts" in record.getMessage()]
        assert told.levelno == logging.WARNING
        assert told.getMessage() == "String prompts are read as a user's turn (cdr_string_prompts='auto')."
        caplog.clear()
        make(string_prompts="text").score(WORDS, SAID)
        [told] = [record for record in caplog.records if "String prompts" in record.getMessage()]
        assert told.levelno == logging.INFO  # as it was asked for


@pytest.fixture
def config(checkpoints):
    return CDRConfig(checkpoints["strong"], checkpoints["weak"], cdr_gate="none")


def with_option(config, option):
    return CDRConfig(config.cdr_strong, config.cdr_weak, cdr_gate="none", cdr_string_prompts=option)


@pytest.mark.parametrize("option", ["auto", "text"])
def test_score_file_reports_strings(option, config, tmp_path, capsys):
    rows = [{"prompt": prompt, "completion": text} for prompt, text in zip([*WORDS[:3], TURNS[3]], SAID, strict=True)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:3]))
    out = tmp_path / "out"
    summary = score_file(ScoreArguments(str(path), str(out)), with_option(config, option))
    meaning = "user" if option == "auto" else "text"
    assert summary["string_prompts"] == {meaning: 3}
    assert describe_strings({meaning: 3})[0] in capsys.readouterr().out
    assert json.loads((out / "options.json").read_text())["string_prompts"] == meaning
    with pytest.raises(ConfigError, match="string_prompts="):
        score_file(ScoreArguments(str(path), str(out)), with_option(config, "user" if meaning == "text" else "text"))


def test_score_file_resumes(config, tmp_path):
    data = Dataset.from_dict({"prompt": WORDS, "completion": SAID})
    arguments = ScoreArguments("rows", str(tmp_path), shard_size=2, shard="0/2")
    score_file(arguments, config, data=data)
    rest = ScoreArguments("rows", str(tmp_path), shard_size=2, shard="1/2")
    assert score_file(rest, config, data=data)["string_prompts"] == {"user": 4}


def write_preferences(tmp_path, name, prompts, wrap):
    rows = [
        {"prompt": prompt, "chosen": wrap(f"{prompt_} fox"), "rejected": wrap("a dog")}
        for prompt, prompt_ in zip(prompts, WORDS * 5, strict=True)
    ]
    path = tmp_path / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_preferences(open_source(str(path)))[0]


def test_evaluate_reads_strings_as_messages(config, tmp_path):
    """Twenty rows, as strings, as messages, and as strings with answers that are messages."""
    found = {
        name: evaluate(config, write_preferences(tmp_path, name, prompts, wrap), passes=Passes(tmp_path / name))
        for name, prompts, wrap in (
            ("strings", WORDS * 5, str),
            ("messages", TURNS * 5, str),
            ("answers", WORDS * 5, answer),
        )
    }
    rows = [[row["scores_chosen"] for row in one.rows] for one in found.values()]
    assert rows[0] == rows[1] == rows[2]
    assert [one.summary["string_prompts"] for one in found.values()] == [{"user": 20}, {}, {}]
    text = with_option(config, "text")
    raw = evaluate(text, write_preferences(tmp_path, "raw", WORDS * 5, str), passes=Passes(tmp_path / "raw"))
    assert raw.summary["string_prompts"] == {"text": 20}
    assert [row["scores_chosen"] for row in raw.rows] != rows[0]


def test_probe_reads_strings_as_messages(make):
    options = {"best_of": 0, "search_budget": 0, "max_new_tokens": 4}
    strings = probe(make(), WORDS, SAID, **options)
    turns = probe(make(), TURNS, SAID, **options)
    assert strings.pop("string_prompts") == {"user": 4}
    assert turns.pop("string_prompts") == {}
    strings.pop("examples"), turns.pop("examples")
    assert strings == turns


def test_annotate_strings_as_text(config, tmp_path):
    """TRL's standard format comes out; a conversation can't be among its rows."""
    groups = [[text, f"{text} fox"] for text in SAID]
    data = Dataset.from_dict({"prompt": WORDS, "completions": groups})
    text = with_option(config, "text")
    summary = annotate(AnnotateArguments("rows", str(tmp_path / "text")), text, data=data)
    assert summary["string_prompts"] == {"text": 4}
    rows = load_dataset(str(tmp_path / "text"), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows["prompt"] == WORDS
    scorer = DensityRatioScorer.from_config(text)
    for row, group in zip(rows, groups, strict=True):
        assert {row["chosen"], row["rejected"]} == set(group)
        assert row["scores"] == pytest.approx(values(scorer.score([row["prompt"]] * 2, group)), abs=1e-4)
    summary = annotate(AnnotateArguments("rows", str(tmp_path / "turns")), config, data=data)
    assert summary["string_prompts"] == {"user": 4}
    turns = load_dataset(str(tmp_path / "turns"), split="train", cache_dir=str(tmp_path / "cache"))
    assert turns["prompt"] == TURNS
    mixed = Dataset.from_dict({"prompt": TURNS, "completions": groups})
    with pytest.raises(Exception, match="has messages as its prompt, and prompts are read as raw text"):
        annotate(AnnotateArguments("rows", str(tmp_path / "mixed")), text, data=mixed)


def test_annotate_without_template_is_text(tmp_path):
    tokenizer = byte_tokenizer(template=None)
    folders = []
    for seed in (0, 1):
        folders.append(str(tmp_path / f"model-{seed}"))
        llama(len(tokenizer), seed=seed).save_pretrained(folders[-1])
        tokenizer.save_pretrained(folders[-1])
    data = Dataset.from_dict({"prompt": WORDS, "completions": [[text, f"{text} fox"] for text in SAID]})
    annotate(AnnotateArguments("rows", str(tmp_path / "out")), CDRConfig(*folders, cdr_gate="none"), data=data)
    rows = load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows["prompt"] == WORDS
