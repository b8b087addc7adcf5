"""What is known of a checkpoint before its weights are loaded."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import T5Config

from trl_cdr import ModelError
from trl_cdr.scoring.checkpoint import find_folder, identify_weights, read_config, same_weights, weights_mb

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cached(tmp_path, checkpoints):
    """A model of the Hub in a cache of its own; nothing else can be reached."""
    folder = tmp_path / "models--some--model"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    (folder / "snapshots" / COMMIT).mkdir(parents=True)
    with open(f"{checkpoints['strong']}/config.json") as config:
        (folder / "snapshots" / COMMIT / "config.json").write_text(config.read())
    return {"cache_dir": str(tmp_path)}


def test_a_model_of_the_hub_is_its_commit(cached):
    assert identify_weights("some/model", "strong", init_kwargs=cached) == f"commit {COMMIT}"
    assert weights_mb("some/model") is None
    assert read_config("some/model", "strong", init_kwargs=cached).model_type == "llama"
    for ask in (read_config, identify_weights):
        with pytest.raises(ModelError, match="weak is 'some/other', whose config can't be loaded"):
            ask("some/other", "weak", init_kwargs=cached)


def test_an_encoder_decoder(tmp_path):
    T5Config().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="weak is a t5, an encoder-decoder"):
        read_config(str(tmp_path), "weak")


def test_a_folder_is_its_content(tmp_path):
    """Of a large file not every byte is read, but some of every tensor that matters."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    content = bytearray(6 * 2**20)
    seen = set()
    for start, stop in ((0, 0), (0, 1), (3 * 2**20, 3 * 2**20 + 2**16), (len(content) - 1, len(content))):
        content[start:stop] = b"\1" * (stop - start)
        (tmp_path / "model.safetensors").write_bytes(content)
        seen.add(identify_weights(str(tmp_path), "strong"))
    assert len(seen) == 4
    assert all(found.startswith("sha256 ") for found in seen)
    assert weights_mb(str(tmp_path)) == 6
    (tmp_path / "README.md").write_text("words")
    assert identify_weights(str(tmp_path), "strong") in seen
    (tmp_path / "inner").mkdir()
    (tmp_path / "config.json").rename(tmp_path / "inner" / "config.json")
    inner = identify_weights(str(tmp_path), "strong", init_kwargs={"subfolder": "inner"})
    assert inner == identify_weights(str(tmp_path / "inner"), "strong") not in seen


def test_two_folders_with_the_same_weights(tmp_path, checkpoints):
    strong, weak = (Path(checkpoints[role]) for role in ("strong", "weak"))
    copied = shutil.copytree(strong, tmp_path / "copy")
    assert same_weights(strong, strong / ".." / strong.name)
    assert same_weights(strong, copied)
    (copied / "tokenizer_config.json").unlink()  # each model has its own
    assert same_weights(strong, copied)
    assert not same_weights(strong, weak)
    (copied / "generation_config.json").write_text('{"eos_token_id": 7}')  # another end
    assert not same_weights(strong, copied)
    for folder in (copied, tmp_path / "other"):  # configs alone, as of models that are not downloaded yet
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text("{}")
        for path in folder.glob("*.safetensors"):
            path.unlink()
    (copied / "generation_config.json").unlink()
    assert not same_weights(copied, tmp_path / "other")


def test_revisions_of_one_commit_are_one_folder(cached, checkpoints):
    places = {find_folder("some/model", "strong", revision=name, init_kwargs=cached) for name in (None, "main", COMMIT)}
    assert {place.name for place in places} == {COMMIT}
    assert len(places) == 1
    assert find_folder(checkpoints["strong"], "strong") == Path(checkpoints["strong"])
