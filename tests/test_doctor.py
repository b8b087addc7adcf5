"""What the doctor prints before anything is loaded, and beside what was."""

import json
import shutil
from pathlib import Path

import pytest
from lora import save_adapter
from test_cli import fails
from tiny import CHATML, DATED, OPEN, THINKING, byte_tokenizer, chat, llama
from transformers import AutoTokenizer, BloomConfig, BloomForCausalLM, LlamaConfig

from trl_cdr import CDRConfig, ConfigError, DensityRatioScorer
from trl_cdr.cli import main
from trl_cdr.doctor import DoctorArguments, examine, examine_memory, missed_requirement, print_memory
from trl_cdr.scoring import loading


def arguments(checkpoints, *more):
    return ["doctor", "--cdr_strong", checkpoints["strong"], "--cdr_weak", checkpoints["weak"], *more]


def test_without_loading_only_configs_are_read(tmp_path, capsys, monkeypatch):
    config = LlamaConfig(hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    for role in ("strong", "weak"):
        config.save_pretrained(tmp_path / role)  # and neither weights nor a tokenizer
    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", None)
    folders = {role: str(tmp_path / role) for role in ("strong", "weak")}
    main(arguments(folders, "--no_load", "--memory", "24GB", "--cdr_device", "cuda"))
    printed = capsys.readouterr().out
    assert "two copies *" in printed
    assert "It does not fit" in printed
    assert "measured" not in printed
    for option in ("cdr_offload=cpu", "cdr_strong_adapter", "cdr_share_policy", "load_in_8bit"):
        assert option in printed
    found = examine_memory(CDRConfig(folders["strong"], folders["weak"], cdr_device="cuda"), 24 * 10**9)
    assert found["strong"]["itemsize"] == 2  # the checkpoint's type, which a CPU would not take
    assert examine_memory(CDRConfig(folders["strong"], folders["weak"], cdr_device="cpu"), 1)["strong"]["itemsize"] == 4


def test_what_was_loaded_stands_beside_the_arithmetic(checkpoints, capsys):
    main(arguments(checkpoints, "--memory", "1GiB"))
    printed = capsys.readouterr().out
    assert "measured" in printed
    assert "It fits" in printed
    found = examine(CDRConfig(checkpoints["strong"], checkpoints["weak"]), DoctorArguments(memory="1GiB"))
    counted = found["memory"]["ways"][0]["weight_bytes"]
    measured = sum(found["pair"][role]["weights_mb"] for role in ("strong", "weak")) * 2**20
    assert counted <= measured < counted + 1000  # and the buffers
    assert found["memory"]["memory_bytes"] == 2**30


def test_require_packed_exits_with_status_1(checkpoints, tmp_path, capsys):
    main(arguments(checkpoints, "--require", "packed"))
    assert "trl-cdr doctor" not in capsys.readouterr().err
    bloom = tmp_path / "bloom"
    tokenizer = AutoTokenizer.from_pretrained(checkpoints["weak"])
    tokenizer.save_pretrained(bloom)
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "n_layer": 2, "n_head": 4}
    BloomForCausalLM(BloomConfig(**sizes)).save_pretrained(bloom)
    with pytest.raises(SystemExit) as stop:
        main(arguments({**checkpoints, "weak": str(bloom)}, "--require", "packed"))
    assert stop.value.code == 1
    printed = capsys.readouterr()
    assert "runs padded (its positions are distances in the sequence (ALiBi))" in printed.out
    assert printed.err.endswith(
        f"trl-cdr doctor: --require is packed, and weak ({bloom}) runs padded: its positions are distances in the "
        "sequence (ALiBi).\n"
    )


def test_require_is_checked_against_loaded_models(checkpoints, capsys):
    assert "no_load is set" in fails(capsys, arguments(checkpoints, "--require", "packed", "--no_load"))
    assert "require" in fails(capsys, arguments(checkpoints, "--require", "fast"))
    found = {"pair": {"strong": {"name": "s", "servers": ["http://s"]}, "weak": {"name": "w", "way": "packed"}}}
    missed = missed_requirement(found, DoctorArguments(require="packed"))
    assert missed == "--require is packed, and strong (s) is on a server."
    assert missed_requirement(found, DoctorArguments()) is None


@pytest.mark.parametrize("offload", ["none", "disk"])
def test_a_base_of_both_counts_once(offload, checkpoints, tmp_path, capsys):
    """An adapter's folder alone, as strong, names its base."""
    base, adapter = checkpoints["weak"], save_adapter(tmp_path / "a", checkpoints["weak"])
    config = CDRConfig.from_options(strong=adapter, weak=base, offload=offload)
    found = examine(config, DoctorArguments(memory="1GiB"))
    own = (tmp_path / "a" / "adapter_model.safetensors").stat().st_size
    weak = found["pair"]["weak"]["weights_mb"] * 2**20
    assert weak < found["pair"]["weights_mb"] * 2**20 < weak + own
    assert found["pair"]["weights_mb"] == found["pair"]["strong"]["weights_mb"]
    way = next(way for way in found["memory"]["ways"] if way["name"] == found["memory"]["current"])
    assert way["option"] == ("cdr_strong_adapter" if offload == "none" else "cdr_offload=disk")
    print_memory(found["memory"], found["pair"])
    [line] = [line for line in capsys.readouterr().out.splitlines() if f"{way['name']} *" in line]
    assert f"{found['pair']['weights_mb'] * 2**20 / 10**9:.3g}" in line
    ways = {way["option"]: way for way in found["memory"]["ways"]}
    assert ways["cdr_offload=cpu"]["host_bytes"] == found["memory"]["weak"]["parameters"] * 4  # one copy
    assert ways["cdr_offload=cpu"]["weight_bytes"] == ways["cdr_strong_adapter"]["weight_bytes"]


def test_a_pair_on_the_policys_base_is_counted_and_not_loaded(checkpoints, tmp_path):
    base, adapter = checkpoints["weak"], save_adapter(tmp_path / "a", checkpoints["weak"])
    config = CDRConfig.from_options(strong=adapter, weak=base, share_policy=True)
    found = examine(config, DoctorArguments(no_load=True))["memory"]
    assert found["current"].startswith("on the policy's base")
    with pytest.raises(ConfigError, match="doctor has no policy that the pair could stand on. Pass --no_load"):
        examine(config)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "two copies"),
        ({"offload": "cpu"}, "asleep between calls, on the host"),
        ({"offload": "disk"}, "asleep between calls, on disk"),
        ({"model_init_kwargs": '{"quantization_config": {"load_in_8bit": true}}'}, "two copies in 8 bits"),
        ({"model_init_kwargs": {"quantization_config": {"load_in_4bit": True}}}, "two copies in 4 bits"),
    ],
)
def test_the_way_that_is_asked_for_is_marked(checkpoints, options, name, capsys):
    found = examine_memory(CDRConfig.from_options(**checkpoints, **options), None)
    assert found["current"] == name
    print_memory(found)
    assert f"{name} *" in capsys.readouterr().out


def test_criteria_are_what_keeps_prefixes(checkpoints):
    plain, criteria = (
        examine_memory(CDRConfig.from_options(**checkpoints, **options), None)["strong"]["prefix_bytes"]
        for options in ({}, {"criteria": "safety", "prefix_cache_tokens": 10})
    )
    assert plain == 0
    assert criteria == 10 * 2 * 2 * 2 * 8 * 4


def test_bad_input(checkpoints, tmp_path, capsys):
    unknown = {**checkpoints, "weak": str(tmp_path / "none")}
    assert "weak is " in (err := fails(capsys, arguments(unknown, "--no_load")))
    assert "config can't be loaded" in err
    assert "config can't be loaded" in fails(capsys, arguments({**checkpoints, "strong": "no/such"}, "--no_load"))
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text(json.dumps({"model_type": "unheard_of"}))
    odd = {**checkpoints, "strong": str(tmp_path / "odd")}
    assert "config can't be loaded" in fails(capsys, arguments(odd, "--no_load"))
    (tmp_path / "odd" / "config.json").write_text(json.dumps({"model_type": "vit"}))
    assert "strong is a vit, of which no causal language" in fails(capsys, arguments(odd, "--no_load"))
    for memory in ("24", "GB", "0GB", "24 TB", "-3GB"):
        with pytest.raises(ConfigError, match="Give a size, such as 24GB"):
            DoctorArguments(memory=memory)
    assert DoctorArguments(memory="1.5 GB").memory_bytes == 1_500_000_000
    assert "Leave out one" in fails(capsys, arguments(checkpoints, "--no_load", "--probe"))
    assert "Pass --probe too" in fails(capsys, arguments(checkpoints, "--input", "rows.jsonl"))


def test_probe_prints_what_turns(checkpoints, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    completions = ["world", "a lazy dog", "fox jumps", "what is this and that"]
    rows.write_text("\n".join(json.dumps({"prompt": "hello", "completion": text}) for text in completions))
    main(arguments(checkpoints, "--probe", "--input", str(rows), "--cdr_dtype", "bfloat16"))
    printed = capsys.readouterr().out
    assert "Beside the pair in float32, on 4 rows: of 6 preferences" in printed
    assert "the pair has it: float32, not quantised" in fails(capsys, arguments(checkpoints, "--probe"))
    stored = Path(shutil.copytree(checkpoints["strong"], tmp_path / "stored"))
    config = json.loads((stored / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (stored / "config.json").write_text(json.dumps(config))
    quantised = {**checkpoints, "strong": str(stored)}
    assert "is stored quantised" in fails(capsys, arguments(quantised, "--probe"))


def save_pair(tmp_path, template):
    """Folders of a tiny pair with a chat template."""
    tokenizer = byte_tokenizer(template=template)
    folders = {}
    for seed, role in enumerate(("strong", "weak")):
        folders[role] = str(tmp_path / role)
        llama(len(tokenizer), seed=seed).save_pretrained(folders[role])
        tokenizer.save_pretrained(folders[role])
    return folders


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, "thoughts: none; date in prompts: none"),
        (THINKING, "thoughts: <think> ... </think>; date in prompts: none"),
        (OPEN, "thoughts: the prompt opens <think>; an answer without </think> is read as one without thoughts"),
        (DATED, "date in prompts: 2026-11-29"),
    ],
)
def test_print_examination_of_templates(template, expected, tmp_path, capsys):
    main(arguments(save_pair(tmp_path, template), "--cdr_date", "2026-11-29"))
    printed = capsys.readouterr().out
    assert printed.count(expected) == 2
    assert "string prompts outside trainers: a user's turn" in printed


SWITCHED = OPEN.replace("<think>\n{% endif %}", "{% if enable_thinking is not false %}<think>\n{% endif %}{% endif %}")


@pytest.mark.parametrize(
    ("template", "remedy"),
    [(SWITCHED, "set cdr_chat_template_kwargs={'enable_thinking': false}"), (OPEN, "set cdr_chat_template.")],
)
def test_load_pair_warns_of_open_thoughts(template, remedy, tmp_path, caplog):
    folders = save_pair(tmp_path, template)
    scorer = DensityRatioScorer(**folders)
    for _ in range(2):
        scorer.score([chat("hello")], ["what"])
    told = [record.getMessage() for record in caplog.records if "opens a thought (<think>)" in record.getMessage()]
    assert [text.split(" (")[0] for text in told] == [f"The generation prompt of {role}" for role in folders]
    assert all(remedy in text for text in told)
    caplog.clear()
    if template == SWITCHED:
        DensityRatioScorer(**folders, chat_template_kwargs={"enable_thinking": False}).load()
        assert "opens a thought" not in caplog.text
