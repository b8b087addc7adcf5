"""One model's pass: the scorer's own log-probabilities, kept on disk, each text run once, also after a kill."""

import json
from pathlib import Path

import pytest
from tiny import chat

from trl_cdr import ConfigError, Criteria, DensityRatioScorer, DomainCriteria
from trl_cdr.annotation.passes import Entry, Passes, Text, cache_folder, find_models
from trl_cdr.config import CDRConfig

PROMPTS = [chat("hello"), chat("what is this"), chat("over the")]
COMPLETIONS = ["a dog and that", "the fox jumps over", " lazy dog"]
TEXTS = [Text(prompt, completion) for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True)]


@pytest.fixture
def config(checkpoints):
    return CDRConfig(checkpoints["strong"], checkpoints["weak"], cdr_gate="surprise")


@pytest.fixture
def passes(tmp_path):
    return Passes(tmp_path / "passes")


def find(config, *roles):
    return find_models([(config, role) for role in roles or ("strong",)])


def lines(passes, model):
    return (passes.folder / f"{model.key}.jsonl").read_bytes().splitlines(keepends=True)


def test_entries_are_what_the_scorer_has(config, passes):
    scores = DensityRatioScorer.from_config(config).score(PROMPTS, COMPLETIONS)
    strong, weak = (passes.read(model, TEXTS) for model in find(config, "strong", "weak"))
    for score, one, other in zip(scores, strong, weak, strict=True):
        assert one.logps == pytest.approx(score.strong_logps, abs=1e-4)
        assert other.logps == pytest.approx(score.weak_logps, abs=1e-4)
        assert (one.n_tokens, one.gated, one.truncated) == (score.n_tokens, score.gated, score.truncated)
        assert (one.surprise, one.survival) == pytest.approx((score.surprise, score.survival), abs=1e-3)
    assert (passes.run, passes.found) == (2, 0)


def test_conditioned_texts_are_what_the_scorer_has(config, passes):
    criteria = Criteria({"short": DomainCriteria("A good completion is short. " * 4)})
    scorer = DensityRatioScorer(config.cdr_strong, config.cdr_weak, criteria=criteria, gate="surprise")
    prompts, conditionings = scorer.condition(PROMPTS)
    texts = [Text(*each) for each in zip(prompts, COMPLETIONS, conditionings, strict=True)]
    entries = passes.read(*find(config), texts)
    expected = [score.strong_logps for score in scorer.score(PROMPTS, COMPLETIONS)]
    assert [entry.logps for entry in entries] == pytest.approx(expected, abs=1e-4)
    assert {text.key for text in texts}.isdisjoint(text.key for text in TEXTS)


def test_no_text_is_run_twice(config, passes):
    [model] = find(config)
    first = passes.read(model, [TEXTS[0], TEXTS[1], TEXTS[0]])
    assert first[0] == first[2] != first[1]
    assert len(lines(passes, model)) == 1 + 2
    assert json.loads(lines(passes, model)[0])["model"] == config.cdr_strong
    again = Passes(passes.folder)
    assert again.read(model, TEXTS[:2]) == first[:2]
    assert (again.run, again.found) == (0, 1)
    assert again.read(model, TEXTS)[:2] == first[:2]
    assert (again.run, again.found) == (1, 1)
    assert len(lines(passes, model)) == 1 + 3


@pytest.mark.parametrize("kept", [10, -40])
def test_a_pass_that_was_killed_goes_on(config, passes, kept):
    [model] = find(config)
    whole = passes.read(model, TEXTS)
    path = passes.folder / f"{model.key}.jsonl"
    content = path.read_bytes()
    path.write_bytes(content[:kept])
    again = passes.read(model, TEXTS)
    assert [entry.logps for entry in again] == pytest.approx([entry.logps for entry in whole], abs=1e-4)
    assert passes.run == 2
    assert {line[:45] for line in path.read_bytes().splitlines()} == {line[:45] for line in content.splitlines()}


def test_what_a_table_is_of(config, checkpoints, tmp_path):
    (tmp_path / "own.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    [model] = find(config)
    others = [
        find(config, "weak"),
        find(CDRConfig(checkpoints["strong"], checkpoints["weak"], cdr_gate="none")),
        find(CDRConfig(checkpoints["strong"], checkpoints["weak"], cdr_gate="surprise", cdr_dtype="bfloat16")),
        find(CDRConfig(checkpoints["strong"], "-", cdr_gate="surprise", cdr_max_length=64)),
        find(CDRConfig(checkpoints["strong"], "-", cdr_gate="surprise", cdr_chat_template=str(tmp_path / "own.jinja"))),
    ]
    assert len({model.key, *(other.key for [other] in others)}) == 6
    [same] = find(CDRConfig("-", checkpoints["strong"], cdr_gate="surprise", cdr_token_budget=64), "weak")
    assert same.key == model.key


def test_a_model_without_a_template_reads_the_first_ones(config, checkpoints, tmp_path, tokenizer, weak):
    weak.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    for name in ("chat_template.jinja", "chat_template.json"):
        (tmp_path / "base" / name).unlink(missing_ok=True)
    path = tmp_path / "base" / "tokenizer_config.json"
    settings = {name: value for name, value in json.loads(path.read_text()).items() if name != "chat_template"}
    path.write_text(json.dumps(settings))
    base = CDRConfig(str(tmp_path / "base"), checkpoints["strong"])
    assert [model.template for model in find(base, "strong", "weak")] == [tokenizer.chat_template] * 2
    assert [model.template for model in find(base)] == [None]


def test_what_cannot_be_scored_is_kept_as_a_reason(checkpoints, passes):
    short = CDRConfig(checkpoints["strong"], checkpoints["weak"], cdr_max_length=8)
    [model] = find(short)
    long = Text("a", "this and that " * 20)
    entries = passes.read(model, [long, TEXTS[2]])
    assert "at most 8 fit" in entries[0].error
    assert entries[0].logps is None
    assert entries[1].error is None
    assert passes.read(model, [long]) == entries[:1]
    assert passes.found == 1


def test_entries_are_written_in_few_words(config, passes):
    [model] = find(config)
    passes.read(model, TEXTS[:1])
    [line] = map(json.loads, lines(passes, model)[1:])
    assert set(line) <= {"text", "logps", "n_tokens", "surprise", "survival", "gated"}
    assert Entry() == Entry(None, 0)


def test_a_table_that_is_none(config, passes):
    [model] = find(config)
    passes.read(model, TEXTS)
    path = passes.folder / f"{model.key}.jsonl"
    path.write_bytes(lines(passes, model)[0] + b'{"text": 1, "what": 2}\n')
    with pytest.raises(ConfigError, match=r"jsonl:2 is no line of a table of log-probabilities.*Remove the file"):
        passes.read(model, TEXTS)


def test_a_folder_that_cannot_be_written(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cache_dir is .*file', which can't be written or locked"):
        Passes(tmp_path / "file").read(*find(config), TEXTS)


def test_the_cache_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("TRL_CDR_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "trl-cdr"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "trl-cdr"
    monkeypatch.setenv("TRL_CDR_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    assert Passes().folder == Path(tmp_path / "own" / "passes")
