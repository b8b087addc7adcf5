"""What a folder of scores refuses: other weights or options, a second process; and what is written whole."""

import json
import shutil
from dataclasses import fields

import pyarrow.parquet as pq
import pytest
from lora import save_adapter
from tiny import chat, llama

from trl_cdr import CDRConfig, ConfigError
from trl_cdr.annotation import score_folder
from trl_cdr.annotation.score_file import ScoreArguments, score_file
from trl_cdr.annotation.score_folder import WITHOUT_EFFECT, check_options, write_json
from trl_cdr.scoring.scorer import DensityRatioScorer

ROWS = [
    {"prompt": chat(prompt), "completion": completion, "noise": float("nan")}
    for prompt in ("hello", "what is this")
    for completion in ("world", "that is a lazy dog", "and this")
]


@pytest.fixture
def pair(tmp_path, checkpoints):
    """Copies that a test may change."""
    return {role: shutil.copytree(checkpoints[role], tmp_path / role) for role in ("strong", "weak")}


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def score(tmp_path, pair, out):
    def score(shard="0/1", *, batch_size=2, **options):
        """The shards that are there when it is done; of two, `"0/2"` writes the first."""
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
        arguments = ScoreArguments(
            str(tmp_path / "rows.jsonl"), str(out), batch_size=batch_size, shard_size=3, shard=shard
        )
        models = {f"cdr_{role}": str(folder) for role, folder in pair.items()}
        score_file(arguments, CDRConfig(**models | options))
        return read(out)

    return score


def read(out):
    return [path.read_bytes() for path in sorted(out.glob("data/*"))]


def test_a_run_that_was_stopped_goes_on(score, out):
    whole = score()
    (out / "data" / "train-000001.parquet").unlink()
    assert score() == whole


def test_what_is_done_is_not_scored_again(score, monkeypatch):
    whole = score()
    monkeypatch.setattr(DensityRatioScorer, "load", None)
    monkeypatch.setattr(DensityRatioScorer, "describe", None)
    assert score() == whole


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_options_that_can_not_be_read(content, score, out):
    score()
    (out / "options.json").write_text(content)
    with pytest.raises(ConfigError, match="options.json' says what .* can't be read: .* Pass another output_dir"):
        score()


def test_options_are_written_whole_or_not_at_all(score, out, monkeypatch):
    def killed(source, target):
        assert json.loads(source.read_text())["cdr_reduction"] == "sum"  # whole before it takes the name
        raise KeyboardInterrupt

    monkeypatch.setattr(score_folder.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        score()
    assert not (out / "options.json").exists()
    assert not (out / "data").exists()
    monkeypatch.undo()
    score()


def test_an_output_dir_that_is_a_file(score, out):
    out.write_text("")
    with pytest.raises(ConfigError, match="output_dir is .*out', which can't be written or locked: .*File exists"):
        score()


@pytest.mark.parametrize(
    ("role", "name"),
    [("strong", "model.safetensors"), ("weak", "config.json"), ("weak", "tokenizer_config.json")],
)
def test_other_weights_under_the_same_path(role, name, score, pair, tokenizer, out):
    """Trained on: the same architecture, sizes and headers."""
    before = score("0/2")
    if name == "model.safetensors":
        size = (pair[role] / name).stat().st_size
        llama(len(tokenizer), seed=5).save_pretrained(pair[role])
        assert (pair[role] / name).stat().st_size == size
    else:
        changed = json.loads((pair[role] / name).read_text()) | {"changed": 1}
        (pair[role] / name).write_text(json.dumps(changed))
    with pytest.raises(ConfigError, match=f"holds scores by other weights of {role}: .* was sha256 .* is sha256 "):
        score()
    assert read(out) == before


def test_another_adapter_under_the_same_path(score, pair, tmp_path):
    adapter = save_adapter(tmp_path / "adapter", pair["strong"])
    first = score("0/2", cdr_strong_adapter=adapter)
    assert score("0/2", cdr_strong_adapter=str(shutil.move(adapter, tmp_path / "moved"))) == first
    save_adapter(tmp_path / "moved", pair["strong"], seed=1)
    for other in ({"cdr_strong_adapter": str(tmp_path / "moved")}, {}):
        with pytest.raises(ConfigError, match=r"by other weights of strong: .* was sha256 .* with adapter sha256"):
            score(**other)


def test_a_folder_that_was_moved_goes_on(score, pair, tmp_path):
    first = score("0/2")
    moved = shutil.move(pair["strong"], tmp_path / "moved")
    assert score(cdr_strong=str(moved))[:1] == first


def test_the_remedy_of_a_branch_that_moved(out):
    out.mkdir()
    write_json(out / "options.json", {"cdr_strong": "a/b", "strong_weights": "commit 123"})
    with pytest.raises(ConfigError, match="Pass cdr_strong_revision='123' to go on with those, or another output_dir"):
        check_options(out, {"cdr_strong": "a/b", "strong_weights": "commit 456"})


@pytest.mark.parametrize(
    ("then", "message"),
    [
        ({}, "out' holds scores, and does not say which weights of strong they are by: .* Pass another output_dir"),
        ({"strong_weights": "commit None"}, "was commit None, and 'a/b' is commit 456. Pass another output_dir"),
        ({"strong_weights": "sha256 123"}, "was sha256 123, and 'a/b' is commit 456. Pass another output_dir"),
    ],
)
def test_weights_that_no_revision_names(then, message, out):
    out.mkdir()
    write_json(out / "options.json", {"cdr_strong": "a/b"} | then)
    with pytest.raises(ConfigError, match=message):
        check_options(out, {"cdr_strong": "a/b", "strong_weights": "commit 456"})


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"cdr_reduction": "mean"}, "cdr_reduction='sum', and now it is 'mean'"),
        ({"cdr_dtype": "bfloat16"}, "strong_dtype='float32', and now it is 'bfloat16'"),
        ({"cdr_max_length": 100}, "cdr_max_length=None, and now it is 100"),
        ({"cdr_criteria": "safety"}, "criteria_sha256=None"),
    ],
)
def test_an_option_that_changes_scores_is_refused(option, message, score):
    score("0/2")
    with pytest.raises(ConfigError, match=message):
        score(**option)


def test_a_template_that_changed_under_its_path(score, tmp_path, tokenizer):
    path = tmp_path / "template.jinja"
    path.write_text(tokenizer.chat_template)
    score("0/2", cdr_chat_template=str(path))
    path.write_text(tokenizer.chat_template + " ")
    with pytest.raises(ConfigError, match="chat_template_sha256="):
        score(cdr_chat_template=str(path))


def test_an_option_that_changes_no_score_is_not(score, checkpoints):
    score("0/2")
    score(
        cdr_token_budget=4096,
        cdr_device="cpu",
        cdr_dtype="float32",
        cdr_name="pair",
        cdr_prefix_cache_tokens=0,
        cdr_on_unscorable="none",
        cdr_on_gaming="off",
        cdr_policy_tokenizer=checkpoints["weak"],
    )
    known = {field.name for field in fields(CDRConfig)}
    assert {name for name in WITHOUT_EFFECT if name.startswith("cdr_")} <= known


def test_a_token_is_neither_written_nor_compared(score, out, tmp_path):
    """Nor where the models are kept."""
    local = {"token": "hf_secret", "cache_dir": str(tmp_path / "cache"), "local_files_only": True}
    whole = score(cdr_model_init_kwargs=local, cdr_gate="none")
    text = (out / "options.json").read_text()
    assert not [name for name in ('"token"', "cache_dir", "local_files_only", "hf_secret", "Infinity") if name in text]
    assert score(cdr_gate="none") == whole
    assert score(cdr_model_init_kwargs={"token": "hf_rotated"}, cdr_gate="none") == whole
    with pytest.raises(ConfigError, match="cdr_model_init_kwargs=None, and now it is {'attn_implementation': 'eager'}"):
        score(cdr_model_init_kwargs={"token": "hf_rotated", "attn_implementation": "eager"}, cdr_gate="none")


def test_a_second_process_is_refused(score, out, monkeypatch):
    real = DensityRatioScorer.score

    def while_another_starts(self, *args, **kwargs):
        monkeypatch.undo()
        with pytest.raises(ConfigError, match="out' is in use by another process"):
            score()
        return real(self, *args, **kwargs)

    monkeypatch.setattr(DensityRatioScorer, "score", while_another_starts)
    score()
    score()


def test_what_the_gate_found_is_written_and_another_gate_is_refused(score, out):
    score("0/2", cdr_gate="surprise")
    rows = pq.read_table(out / "data" / "train-000000.parquet")["score"].to_pylist()
    assert all(row["surprise"] > 0 and row["survival"] >= 0 and row["typicality"] is None for row in rows)
    with pytest.raises(ConfigError, match="holds scores with cdr_gate='surprise', and now it is 'typicality'"):
        score(cdr_gate="typicality")


def test_weights_that_are_no_model_s(out):
    """TRL's `loss_weights`, say."""
    out.mkdir()
    write_json(out / "options.json", {"loss_weights": [1.0]})
    with pytest.raises(ConfigError, match="holds scores with loss_weights=.1.0., and now it is .2.0."):
        check_options(out, {"loss_weights": [2.0]})
