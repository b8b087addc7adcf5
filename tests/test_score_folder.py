"""What a folder of scores refuses: other weights or options, lines that are no scores, a second process."""

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import fields

import pytest
from lora import save_adapter
from tiny import chat, llama

from trl_cdr import CDRConfig, ConfigError
from trl_cdr.annotation import score_folder
from trl_cdr.annotation.score_file import ScoreArguments, score_file
from trl_cdr.annotation.score_folder import WITHOUT_EFFECT, check_options, write_json
from trl_cdr.scoring.scorer import DensityRatioScorer

ROWS = [
    {"prompt": chat(prompt), "completion": completion, "noise": float("nan")}  # a NaN is not equal to itself
    for prompt in ("hello", "what is this", "the quick brown fox")
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
    def score(rows=ROWS, *, batch_size=4, **options):
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        arguments = ScoreArguments(str(tmp_path / "rows.jsonl"), str(out), batch_size)
        models = {f"cdr_{role}": str(folder) for role, folder in pair.items()}
        score_file(arguments, CDRConfig(**models | options))
        return (out / "scores.jsonl").read_bytes()

    return score


def test_a_killed_run_ends_with_the_bytes_of_an_uninterrupted_one(score, out):
    """Wherever the file was torn: at the end of a line, inside of one, inside of a batch."""
    whole = score()
    ends = [index + 1 for index, byte in enumerate(whole) if byte == ord("\n")]
    for cut in (5, ends[0] + 7, ends[4], len(whole) - 1):
        (out / "scores.jsonl").write_bytes(whole[:cut])
        assert score() == whole, cut


def test_what_is_done_is_not_scored_again(score, out, monkeypatch):
    whole = score()
    monkeypatch.setattr(DensityRatioScorer, "load", None)
    monkeypatch.setattr(DensityRatioScorer, "describe", None)
    assert score() == whole


@pytest.mark.parametrize("content", [None, "", "{", "[]"])
def test_options_that_are_not_there(content, score, out):
    score()
    (out / "options.json").unlink()
    if content is not None:
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
    assert not (out / "scores.jsonl").exists()
    monkeypatch.undo()
    score()


@pytest.mark.parametrize("garbage", [b"\0\0\0\n", b"\xff\n", b"7\n", b"\n", b'{"prompt": "a"}\n', b'{"score": {}}\n'])
def test_a_line_that_is_no_score_is_named(garbage, score, out):
    lines = score().splitlines(keepends=True)
    (out / "scores.jsonl").write_bytes(lines[0] + garbage + lines[1])
    with pytest.raises(ConfigError, match="scores.jsonl:2 is no line that trl-cdr score wrote .* Cut the file off"):
        score()
    assert (out / "scores.jsonl").read_bytes() == lines[0] + garbage + lines[1]


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
    score(ROWS[:4])
    before = (out / "scores.jsonl").read_bytes()
    if name == "model.safetensors":
        size = (pair[role] / name).stat().st_size
        llama(len(tokenizer), seed=5).save_pretrained(pair[role])
        assert (pair[role] / name).stat().st_size == size
    else:
        changed = json.loads((pair[role] / name).read_text()) | {"changed": 1}
        (pair[role] / name).write_text(json.dumps(changed))
    with pytest.raises(ConfigError, match=f"holds scores by other weights of {role}: .* was sha256 .* is sha256 "):
        score()
    assert (out / "scores.jsonl").read_bytes() == before


def test_another_adapter_under_the_same_path(score, pair, tmp_path, out):
    adapter = save_adapter(tmp_path / "adapter", pair["strong"])
    whole = score(ROWS[:4], cdr_strong_adapter=adapter)
    assert score(ROWS[:4], cdr_strong_adapter=str(shutil.move(adapter, tmp_path / "moved"))).startswith(whole)
    save_adapter(tmp_path / "moved", pair["strong"], seed=1)
    for other in ({"cdr_strong_adapter": str(tmp_path / "moved")}, {}):
        with pytest.raises(ConfigError, match=r"by other weights of strong: .* was sha256 .* with adapter sha256"):
            score(**other)


def test_a_folder_that_was_moved_goes_on(score, pair, tmp_path):
    whole = score(ROWS[:4])
    moved = shutil.move(pair["strong"], tmp_path / "moved")
    assert score(cdr_strong=str(moved)).startswith(whole)


def test_the_remedy_of_a_branch_that_moved(out):
    out.mkdir()
    (out / "scores.jsonl").write_text("{}\n")
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
    (out / "scores.jsonl").write_text("{}\n")
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
    score(ROWS[:4])
    with pytest.raises(ConfigError, match=message):
        score(**option)


def test_a_template_that_changed_under_its_path(score, tmp_path, tokenizer):
    path = tmp_path / "template.jinja"
    path.write_text(tokenizer.chat_template)
    score(ROWS[:4], cdr_chat_template=str(path))
    path.write_text(tokenizer.chat_template + " ")
    with pytest.raises(ConfigError, match="chat_template_sha256="):
        score(cdr_chat_template=str(path))


def test_an_option_that_changes_no_score_is_not(score, checkpoints):
    score(ROWS[:4])
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
    assert {field.name for field in fields(CDRConfig)} >= WITHOUT_EFFECT


def test_a_token_is_neither_written_nor_compared(score, out, tmp_path):
    """Nor where the models are kept; a folder of an earlier version may hold them, and infinity as JSON has it not."""
    local = {"token": "hf_secret", "cache_dir": str(tmp_path / "cache"), "local_files_only": True}
    whole = score(cdr_model_init_kwargs=local, cdr_gate="none")
    text = (out / "options.json").read_text()
    assert not [name for name in ('"token"', "cache_dir", "local_files_only", "hf_secret", "Infinity") if name in text]
    assert score(cdr_gate="none") == whole
    before = json.loads(text) | {"cdr_model_init_kwargs": local, "cdr_gate": "none"}
    write_json(out / "options.json", before)
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


# `trl-cdr` with a process that is killed when it comes to its third batch.
KILLED = """
import os, signal
from trl_cdr.cli import main
from trl_cdr.scoring.scorer import DensityRatioScorer

real, batches = DensityRatioScorer.score, []

def score(self, *args, **kwargs):
    batches.append(args)
    if len(batches) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, *args, **kwargs)

DensityRatioScorer.score = score
main()
"""


@pytest.mark.slow
def test_kill_minus_nine(score, out, tmp_path, pair):
    """A lock and half a file that a killed process leaves behind stop nobody."""
    whole = score()
    (out / "scores.jsonl").unlink()
    command = [sys.executable, "-c", KILLED, "score", "--input", tmp_path / "rows.jsonl", "--output_dir", out]
    command += ["--batch_size", "4", "--cdr_strong", pair["strong"], "--cdr_weak", pair["weak"]]
    assert subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL
    assert (out / "scores.jsonl").read_bytes() == b"".join(whole.splitlines(keepends=True)[:8])
    assert score() == whole


def test_what_the_gate_found_is_written_and_another_gate_is_refused(score):
    rows = [json.loads(line)["score"] for line in score(cdr_gate="surprise").splitlines()]
    assert all(row["surprise"] > 0 and row["survival"] >= 0 and row["typicality"] is None for row in rows)
    with pytest.raises(ConfigError, match="holds scores with cdr_gate='surprise', and now it is 'typicality'"):
        score(cdr_gate="typicality")
