"""Chat templates that write today's date: one date for a run, recorded, and used again when the run is resumed."""

import json
import pickle
from datetime import date

import pytest
from datasets import Dataset
from tiny import CHATML, DATED, TRAINING, byte_tokenizer, chat, llama
from trl import GRPOConfig, GRPOTrainer

from trl_cdr import CDRCallback, CDRConfig, CDRReward, ConfigError, DensityRatioScorer
from trl_cdr.annotation.annotate import AnnotateArguments, annotate
from trl_cdr.annotation.evaluate import evaluate
from trl_cdr.annotation.passes import Passes, find_models
from trl_cdr.annotation.preferences import Preference
from trl_cdr.annotation.score_file import ScoreArguments, score_file
from trl_cdr.scoring.chat_template import ChatTemplate

PROMPTS = [chat("hello"), chat("what is this"), chat("the quick brown fox"), chat("a lazy dog")]
SAID = [" world", "that", "jumps", "over"]
FIRST, SECOND = date(2026, 11, 29), date(2026, 11, 30)


@pytest.fixture
def today(monkeypatch):
    """Set the clock of everything that asks for the day."""

    def today(day):
        class Clock(date):
            @classmethod
            def today(cls):
                return day

        for module in ("trl_cdr.config", "trl_cdr.scoring.encoding", "trl_cdr.annotation.passes"):
            monkeypatch.setattr(f"{module}.date", Clock)

    return today


@pytest.fixture(scope="module")
def dated(tmp_path_factory):
    """Folders of a pair whose template writes the date."""
    tokenizer = byte_tokenizer(template=DATED)
    folders = {}
    for seed, role in enumerate(("strong", "weak")):
        folders[role] = str(tmp_path_factory.mktemp("dated") / role)
        llama(len(tokenizer), seed=seed).save_pretrained(folders[role])
        tokenizer.save_pretrained(folders[role])
    return folders


@pytest.fixture
def make_config(dated):
    return lambda **options: CDRConfig(dated["strong"], dated["weak"], cdr_gate="none", **options)


def values(scorer):
    return [score.value for score in scorer.score(PROMPTS, SAID)]


def on(dated, day):
    return values(DensityRatioScorer(**dated, gate="none", date=str(day)))


def test_scorer_keeps_its_date_over_midnight(dated, today):
    today(FIRST)
    scorer = DensityRatioScorer(**dated, gate="none")
    expected = on(dated, FIRST)
    assert values(scorer) == expected
    assert scorer.describe()["date"] == "2026-11-29"
    today(SECOND)
    assert values(scorer) == expected
    scorer.unload()
    assert values(scorer) == expected
    assert values(pickle.loads(pickle.dumps(scorer))) == expected
    assert values(DensityRatioScorer(**dated, gate="none")) == on(dated, SECOND) != expected


def test_scorer_without_dated_template_records_none(checkpoints):
    assert DensityRatioScorer(**checkpoints, date="2026-11-29").describe()["date"] is None


@pytest.mark.parametrize("value", ["yesterday", "30.11.2026", "2026-13-01", ""])
def test_config_date_raises(value):
    with pytest.raises(ConfigError, match="cdr_date is .* Use a date such as"):
        CDRConfig("a", "b", cdr_date=value)


def score(arguments, config):
    data = Dataset.from_dict({"prompt": PROMPTS, "completion": SAID})
    return score_file(arguments, config, data=data)


def test_score_file_keeps_the_date_of_its_first_shard(dated, make_config, today, tmp_path):
    for day, shard in ((FIRST, "0/2"), (SECOND, "1/2")):
        today(day)
        summary = score(ScoreArguments("rows", str(tmp_path), shard_size=2, shard=shard), make_config())
    assert summary["value"]["mean"] == pytest.approx(sum(on(dated, FIRST)) / 4, abs=1e-4)
    options = json.loads((tmp_path / "options.json").read_text())
    assert (options["date"], options["cdr_date"]) == ("2026-11-29", "2026-11-29")


def test_score_file_with_another_date_raises(make_config, tmp_path):
    score(ScoreArguments("rows", str(tmp_path)), make_config(cdr_date="2026-11-29"))
    with pytest.raises(ConfigError, match="the date 2026-11-29, and cdr_date is 2026-11-30. Leave cdr_date out"):
        score(ScoreArguments("rows", str(tmp_path)), make_config(cdr_date="2026-11-30"))
    assert score(ScoreArguments("rows", str(tmp_path)), make_config())["scored"] == 4


def test_score_file_without_dated_template_takes_any_date(checkpoints, today, tmp_path):
    """No score depends on the date: a folder of yesterday is finished today, whatever the option is."""
    for day, shard, option in ((FIRST, "0/2", None), (SECOND, "1/2", None), (SECOND, "0/1", "2026-01-01")):
        today(day)
        config = CDRConfig(checkpoints["strong"], checkpoints["weak"], cdr_gate="none", cdr_date=option)
        summary = score(ScoreArguments("rows", str(tmp_path), shard_size=2, shard=shard), config)
    assert summary["scored"] == 4


def test_annotate_keeps_the_date_of_its_first_shard(make_config, today, tmp_path):
    data = Dataset.from_dict({"prompt": PROMPTS, "completions": [[text, f"{text} fox"] for text in SAID]})
    for folder, days in (("over midnight", (FIRST, SECOND)), ("in a day", (FIRST, FIRST))):
        for shard, day in enumerate(days):
            today(day)
            arguments = AnnotateArguments("rows", str(tmp_path / folder), shard_size=2, shard=f"{shard}/2")
            summary = annotate(arguments, make_config(), data=data)
        assert summary["pairs"] == 4
    files = [sorted((tmp_path / folder / "data").iterdir()) for folder in ("over midnight", "in a day")]
    assert [path.read_bytes() for path in files[0]] == [path.read_bytes() for path in files[1]]


def test_evaluate_makes_tables_of_one_date(make_config, today, tmp_path):
    """Yesterday's table is not read today, and strong and weak have one date."""
    preferences = [
        Preference(str(index), prompt, (text,), (f"{text} fox",), "all", "all")
        for index, (prompt, text) in enumerate(zip(PROMPTS, SAID, strict=True))
    ]
    run = []
    for day in (FIRST, SECOND, SECOND):
        today(day)
        found = evaluate(make_config(), preferences, passes=Passes(tmp_path))
        run.append((found.summary["passes"]["run"], [row["scores_chosen"] for row in found.rows]))
    assert [number for number, _ in run] == [2, 2, 0]
    assert run[0][1] != run[1][1] == run[2][1]
    found = evaluate(make_config(cdr_date="2026-11-29"), preferences, passes=Passes(tmp_path))
    assert found.summary["passes"]["run"] == 0
    assert [row["scores_chosen"] for row in found.rows] == run[0][1]


def test_find_models_without_dated_template_has_no_date(checkpoints, today):
    keys = set()
    for day in (FIRST, SECOND):
        today(day)
        [model] = find_models([(CDRConfig(checkpoints["strong"], checkpoints["weak"]), "strong")])
        assert model.identity["date"] is None
        keys.add(model.key)
    assert len(keys) == 1


@pytest.mark.parametrize("has_callback", [True, False])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is:FutureWarning")
def test_resumed_training_keeps_the_date(has_callback, dated, today, tmp_path):
    tokenizer = byte_tokenizer()  # the policy's prompts have no date

    def train(steps, resume):
        reward = CDRReward(**dated, gate="none")
        options = {"per_device_train_batch_size": 2, "num_generations": 2, "max_completion_length": 4, "beta": 0.0}
        trainer = GRPOTrainer(
            model=llama(len(tokenizer), seed=2),
            reward_funcs=reward,
            args=GRPOConfig(str(tmp_path), max_steps=steps, save_steps=1, **options, **TRAINING),
            train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
            processing_class=tokenizer,
        )
        if has_callback:
            trainer.add_callback(CDRCallback(reward, trainer))
        trainer.train(resume_from_checkpoint=resume)
        return reward

    today(FIRST)
    assert train(1, None).scorer.describe()["date"] == "2026-11-29"
    today(SECOND)
    assert train(2, True).scorer.describe()["date"] == "2026-11-29"
    record = json.loads((tmp_path / "checkpoint-2" / "cdr_labeling.json").read_text())
    assert record["date"] == "2026-11-29"
    assert train(2, None).scorer.describe()["date"] == "2026-11-30"


UNCHANGED = "{% if false %}{{ strftime_now('%Y') }}{% endif %}"


@pytest.mark.parametrize(
    "template",
    [
        UNCHANGED + CHATML,
        "  {% if true %}\n  a{% endif %}\n" + UNCHANGED + "\n{{ messages[0].content }}\n\n",
        "\n\n{%- set day = 1 %}\n" + UNCHANGED + "{{ messages[0].content }}",
        " {{ messages[0].content }}" + UNCHANGED,
    ],
)
def test_render_with_date_changes_nothing_else(template):
    """A macro takes the clock's place: it writes nothing and moves no white space."""
    tokenizer = byte_tokenizer(template=template)
    plain = tokenizer.apply_chat_template(PROMPTS[0], tokenize=False, add_generation_prompt=True)
    found = ChatTemplate(tokenizer, "strong", template, today=FIRST).render(PROMPTS[0])
    assert found == plain


@pytest.mark.parametrize("form", ["%Y-%m-%d", "%d %b %Y", "%A, %-d. %B", "%j %U", "100 %% %y", "%H:%M:%S", "%x"])
def test_render_date_in_any_form(form):
    template = f"{{% set day = strftime_now('{form}') %}}{{{{ day }}}} {{{{ messages[0].content }}}}"
    tokenizer = byte_tokenizer(template=template)
    for day in (FIRST, date(2024, 2, 3)):
        found = ChatTemplate(tokenizer, "strong", template, today=day).render(PROMPTS[0])
        assert found == f"{day.strftime(form)} hello"
