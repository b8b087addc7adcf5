"""`trl-cdr train`: each trainer from YAML alone, and what is refused before a model is loaded."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from datasets import Dataset, DatasetDict
from lora import save_adapter
from safetensors.torch import load_file
from tiny import TRAINING, answer, chat, llama
from transformers import Trainer
from trl import GRPOTrainer, ModelConfig, ScriptArguments

from trl_cdr import ConfigError, InputError
from trl_cdr.cli import _OFTEN, main
from trl_cdr.training.prompts import load_prompts
from trl_cdr.training.train import TrainArguments

pytestmark = [
    # TRL's configs set gradient_checkpointing, which transformers 5 renamed; drop when TRL follows
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is deprecated:FutureWarning"),
]
WORDS = ["hello", "what is this", "the quick brown fox", "a lazy dog"]
TRAINERS = {
    "grpo": {"max_completion_length": 8, "num_generations": 2},
    "rloo": {"max_completion_length": 8, "num_generations": 2},
    "online_dpo": {"max_new_tokens": 8},
    "online_preference": {"max_completion_length": 8, "num_generations": 2, "preference_loss": "dpo"},
}


@pytest.fixture(scope="module")
def policy(tmp_path_factory, tokenizer):
    folder = str(tmp_path_factory.mktemp("policy") / "policy")
    model = llama(len(tokenizer), seed=2)
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


@pytest.fixture
def options(tmp_path, checkpoints, policy):
    """What a YAML holds, but for the trainer's own."""
    return {
        "model_name_or_path": policy,
        "dataset_name": write_rows(tmp_path / "data" / "prompts.jsonl", [{"prompt": chat(word)} for word in WORDS * 4]),
        "output_dir": str(tmp_path / "out"),
        "cdr_strong": checkpoints["strong"],
        "cdr_weak": checkpoints["weak"],
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        **TRAINING,
        "save_strategy": "no",
        "logging_steps": 1,
    }


@pytest.fixture
def run(tmp_path):
    def run(options, *arguments):
        config = tmp_path / "run.yaml"
        config.write_text(yaml.safe_dump(options))
        main(["train", "--config", str(config), *arguments])
        folder = Path(options["output_dir"])
        state = json.loads((folder / "trainer_state.json").read_text())
        return folder, state["global_step"], {key for entry in state["log_history"] for key in entry}

    return run


@pytest.fixture
def refused(run, capsys):
    def refused(options, *arguments):
        with pytest.raises(SystemExit) as stop:
            run(options, *arguments)
        assert stop.value.code == 2
        return capsys.readouterr().err

    return refused


@pytest.mark.parametrize("name", TRAINERS)
def test_each_trainer_from_yaml(name, options, run, policy, caplog, capsys):
    options |= {"trainer": name, "cdr_name": "pair", "cdr_gate": "none", **TRAINERS[name]}
    kwargs = {} if name == "online_dpo" else {"chat_template_kwargs": {"enable_thinking": False}}
    folder, steps, logged = run({**options, **kwargs})
    said = capsys.readouterr()
    assert said.err.index("loading the pair: strong ") < said.err.index(f"loading the policy: {policy} (0.2 MB)")
    closing = said.out[said.out.index(f"2 steps of {name} in 0:00:") :]
    rows = {line[:20].strip(): line[20:].split() for line in closing.splitlines()[1:] if line}
    assert [len(rows[label]) for label in ("reward", "gated", "tokens a completion")] == [2, 2, 2]
    assert str(folder / "trainer_state.json") in closing
    assert steps == 2
    own = "objective/scores" if name == "online_dpo" else "rewards/pair_reward/mean"
    assert {own, "pair/gated", "pair/step_share"} <= logged
    before, after = (load_file(Path(at) / "model.safetensors") for at in (policy, folder))
    assert any(not before[key].equal(after[key]) for key in before)
    assert not [record for record in caplog.records if record.name.startswith("trl_cdr")]  # the tokenizer is known


def test_the_command_line_goes_before_yaml(options, run):
    arguments = ["--trainer", "rloo", "--max_steps", "1", "--cdr_chat_template_kwargs", '{"enable_thinking": false}']
    arguments += ["--no_dataloader_pin_memory"]
    _, steps, logged = run({**options, "trainer": "online_dpo", **TRAINERS["rloo"]}, *arguments)
    assert steps == 1
    assert "rewards/cdr_reward/mean" in logged


def test_a_resumed_run_equals_an_uninterrupted_one(options, run, tmp_path, capsys):
    options |= {**TRAINERS["grpo"], "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole, *_ = run(options)
    resumed, steps, _ = run(
        {**options, "output_dir": str(tmp_path / "resumed"), "resume_from_checkpoint": f"{whole}/checkpoint-2"}
    )
    assert steps == 4
    first, second = (load_file(folder / "model.safetensors") for folder in (whole, resumed))
    assert all(first[key].equal(second[key]) for key in first)
    (whole / "checkpoint-4" / "trainer_state.json").unlink()  # the job was killed while it saved
    (whole / "checkpoint-best").mkdir()
    (whole / "checkpoint-best" / "trainer_state.json").write_text("{}")
    (whole / "checkpoint-9").mkdir()
    (whole / "checkpoint-9" / "trainer_state.json").write_text('{"global_step": 9, "log_his')  # and here
    capsys.readouterr()
    assert run(options, "--resume_from_checkpoint", "true")[1] == 4
    assert f"resuming from {whole}/checkpoint-2\n" in capsys.readouterr().err
    third = load_file(whole / "model.safetensors")
    assert all(first[key].equal(third[key]) for key in first)


def test_a_job_that_may_be_stopped_starts_anew_where_no_checkpoint_is(options, run, capsys):
    _, steps, _ = run({**options, **TRAINERS["grpo"], "max_steps": 1, "resume_from_checkpoint": True})
    assert steps == 1
    assert f"no checkpoint in {options['output_dir']}: starting anew" in capsys.readouterr().err


@pytest.mark.compat
@pytest.mark.parametrize("name", TRAINERS)
def test_several_rewards_from_yaml(name, options, run, tmp_path, monkeypatch, capsys):
    """Two objectives that share the pair, one of TRL's own, and one of the user's, found from the working directory."""
    (tmp_path / "my_own_rewards.py").write_text("def brief(completions, **_):\n    return [1.0 for _ in completions]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    objectives = [{"name": "plain", "gate": "none"}, {"name": "safe", "criteria": "safety"}]
    *_, logged = run(
        {
            **options,
            **TRAINERS[name],
            "trainer": name,
            "max_steps": 1,
            "cdr_max_length": 250,
            "cdr_objectives": objectives,
            "reward_funcs": ["think_format_reward", "my_own_rewards.brief"],
            "reward_weights": [1.0, 0.5, 0.25, 1000.0],
        }
    )
    assert {"plain/gated", "safe/gated", "plain/step_share", "safe/step_share"} <= logged
    out = capsys.readouterr().out
    [total] = [float(line.split()[-1]) for line in out.splitlines() if line.startswith("reward ")]
    assert total > 500  # the weight of the last
    if name != "online_dpo":
        assert [f"rewards/{each}/mean" in logged for each in ("plain_reward", "think_format_reward", "brief")] == [
            True
        ] * 3


def test_evaluation(options, run, tmp_path):
    write_rows(tmp_path / "data" / "test.jsonl", [{"prompt": chat(word)} for word in WORDS])
    Path(options["dataset_name"]).rename(tmp_path / "data" / "train.jsonl")
    options |= {**TRAINERS["grpo"], "dataset_name": str(tmp_path / "data"), "per_device_eval_batch_size": 4}
    *_, logged = run({**options, "eval_strategy": "steps", "eval_steps": 2})
    assert {"eval_rewards/cdr_reward/mean", "eval_cdr/gated"} <= logged


@pytest.mark.slow  # peft alone takes its time
@pytest.mark.parametrize("name", TRAINERS)
def test_lora(name, options, run):
    pytest.importorskip("peft")
    folder, *_ = run(
        {**options, **TRAINERS[name], "trainer": name, "use_peft": True, "lora_target_modules": ["q_proj", "v_proj"]}
    )
    assert (folder / "adapter_model.safetensors").is_file()
    assert not (folder / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINERS)
def test_a_pair_on_the_policy_s_base(name, options, run, policy, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    pair = {"cdr_strong": save_adapter(tmp_path / "adapter", policy), "cdr_weak": policy, "cdr_share_policy": True}
    pair |= {"use_peft": True, "lora_target_modules": ["q_proj", "v_proj"], "model_init_kwargs": {"dtype": "float32"}}
    loaded = []
    monkeypatch.setattr("trl_cdr.scoring.causal_lm.load_model", lambda *args, **_: loaded.append(args))
    folder, *_ = run({**options, **TRAINERS[name], "trainer": name, **pair})
    assert not loaded
    labelled = json.loads((folder / "cdr_labeling.json").read_text())
    assert labelled["models"]["strong"]["adapter"] == pair["cdr_strong"]
    assert labelled["models"]["weak"]["adapter"] is None
    saved = load_file(folder / "adapter_model.safetensors")
    assert {name.split(".")[-3] for name in saved} == {"q_proj", "v_proj"}  # not the pair's, which has all


OBJECTIVES = [{"name": "a"}, {"name": "b"}]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cdr_strnog": "a"}, "unknown arguments: cdr_strnog (did you mean cdr_strong?). trl-cdr train --help"),
        ({"max_new_tokens": 8}, "unknown arguments: max_new_tokens (of trainer online_dpo, not of grpo)"),
        ({"trainer": "ppo"}, "trainer is 'ppo'. Use one of: grpo, rloo, online_dpo, online_preference"),
        ({"cdr_reduction": "max"}, "cdr_reduction is 'max'"),
        (
            {"cdr_share_policy": True},
            "cdr_share_policy is set and use_peft is not: the pair stands on the policy's base",
        ),
        ({"num_generations": 3}, "num_generations (3)"),
        ({"model_name_or_path": None}, "model_name_or_path is missing"),
        ({"output_dir": f"{__file__}/out"}, "test_train.py' is no folder that can be written"),
        ({"resume_from_checkpoint": "no/such"}, "resume_from_checkpoint is 'no/such', and no such folder exists"),
        ({"cdr_criteria": "no.toml"}, "criteria"),
        ({"cdr_criteria": "safety+chat"}, "criteria has several domains (safety, chat), and nothing selects one"),
        ({"cdr_criteria": "safety", "cdr_router": "no.such"}, "router is 'no.such', which can't be imported"),
        ({"cdr_objectives": "{"}, "cdr_objectives is '{', which is no JSON"),
        ({"cdr_objectives": {"name": "a"}}, "cdr_objectives is {'name': 'a'}. Give a list of mappings."),
        ({"cdr_objectives": [{"name": "a", "crit": "b"}]}, "cdr_objectives[0] has 'crit', which is no option"),
        ({"cdr_objectives": [{"name": "a"}, {}, {}]}, "cdr_objectives[2] is called 'cdr', as another is"),
        ({"cdr_objectives": [{"strong": "b"}]}, "cdr_objectives[0] has 'strong', which is the pair's"),
        ({"cdr_objectives": [{"reduction": "max"}]}, "cdr_objectives[0]: cdr_reduction is 'max'"),
        ({"reward_funcs": [1]}, "reward_funcs is [1]. Give a list of names."),
        ({"reward_funcs": "no_such"}, "reward_funcs has 'no_such', which can't be imported"),
        ({"reward_funcs": ["no.such"]}, "reward_funcs has 'no.such', which can't be imported"),
        ({"reward_weights": [1.0, 2.0]}, "Give a list with one number for each, in this order: cdr_reward."),
        (
            {"reward_weights": [1.0], "cdr_objectives": OBJECTIVES, "reward_funcs": ["think_format_reward"]},
            "there are 3 reward functions. Give a list with one number for each, in this order: a_reward, b_reward, "
            "think_format_reward.",
        ),
        ({}, "cdr_strong is 'no/such/model', whose config can't be loaded"),
    ],
)
def test_what_is_refused_before_anything_is_read(change, message, options, refused):
    missing = {"cdr_strong": "no/such/model", "cdr_weak": "no/such/model", "dataset_name": "no/such/data"}
    options = {**options, **TRAINERS["grpo"], **missing, **change}
    assert message in refused({key: value for key, value in options.items() if value is not None})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model_name_or_path": "no/such/policy"},
            "model_name_or_path is 'no/such/policy', whose config can't be loaded",
        ),
        ({"dataset_name": None}, "dataset_name is missing"),
        ({"dataset_name": "no/such.jsonl"}, "dataset_name is 'no/such.jsonl', which can't be read: no such file"),
        ({"dataset_name": "no-such/data"}, "dataset_name is 'no-such/data', which can't be read"),
        ({"dataset_train_split": "train_sft"}, "has no split 'train_sft', but train. Pass dataset_train_split"),
        ({"eval_strategy": "steps", "eval_steps": 1}, "has no split 'test', but train"),
        ({"cdr_criteria": "safety", "cdr_router": "column:kind"}, "split 'train', has only: prompt"),
        ({}, "strong is "),  # the pair's weights, which are not there
    ],
)
def test_what_is_refused_before_weights_are_loaded(change, message, options, refused, tmp_path):
    """Of the pair and of the policy there is a config and a tokenizer, and no more."""
    for role in ("cdr_strong", "cdr_weak", "model_name_or_path"):
        folder = shutil.copytree(options[role], tmp_path / role)
        (folder / "model.safetensors").unlink()
        options[role] = str(folder)
    options = {**options, **TRAINERS["grpo"], **change}
    assert message in refused({key: value for key, value in options.items() if value is not None})


def test_what_the_trainer_refuses_is_one_line(options, refused, tmp_path):
    folder = shutil.copytree(options["model_name_or_path"], tmp_path / "policy")
    (folder / "model.safetensors").unlink()
    err = refused({**options, **TRAINERS["grpo"], "model_name_or_path": str(folder)})
    assert "trl-cdr train: trainer grpo can't be made: " in err.splitlines()[-1]
    assert "model.safetensors" in err.splitlines()[-1]


def test_a_pair_without_a_tokenizer(options, refused, tmp_path):
    folder = shutil.copytree(options["cdr_weak"], tmp_path / "weak")
    for path in folder.glob("*token*"):
        path.unlink()
    options |= {**TRAINERS["grpo"], "cdr_weak": str(folder), "dataset_name": "no/such.jsonl"}
    assert "the tokenizer of cdr_weak can't be loaded from " in refused(options)


def test_the_policys_init_kwargs_say_where_it_is(options, run, tmp_path):
    """Before it is loaded, when it is, and for its tokenizer, which is ours to load for online DPO."""
    shutil.copytree(options["model_name_or_path"], tmp_path / "policies" / "first")
    options |= {"trainer": "online_dpo", **TRAINERS["online_dpo"], "max_steps": 1}
    options |= {"model_name_or_path": str(tmp_path / "policies"), "model_init_kwargs": {"subfolder": "first"}}
    _, steps, _ = run(options)
    assert steps == 1


def test_the_push_comes_before_the_summary(options, run, tmp_path, monkeypatch):
    """And names no data set that is a file here."""
    done = []
    monkeypatch.setattr(Trainer, "init_hf_repo", lambda self, token=None: None)
    monkeypatch.setattr(GRPOTrainer, "push_to_hub", lambda self, **kwargs: done.append(kwargs))
    monkeypatch.setattr("trl_cdr.training.train.print_summary", lambda trainer, kind: done.append(kind))
    monkeypatch.setenv("HOME", str(tmp_path))
    options |= {"push_to_hub": True, "dataset_name": "~/data/prompts.jsonl", "max_steps": 1, **TRAINERS["grpo"]}
    run(options)
    *before, last = done
    assert (before[-1], last) == ({"dataset_name": None}, "grpo")
    assert "grpo" not in before


def test_online_dpo_can_not_train_on_a_stream(options, refused):
    options |= {**TRAINERS["online_dpo"], "trainer": "online_dpo", "dataset_streaming": True}
    assert "dataset_streaming is set, and TRL's OnlineDPOTrainer can't train on a stream" in refused(options)


def test_online_dpo_can_not_evaluate(options, refused):
    options |= {**TRAINERS["online_dpo"], "trainer": "online_dpo", "eval_strategy": "steps", "eval_steps": 1}
    assert "eval_strategy is 'steps', and TRL's OnlineDPOTrainer can't evaluate" in refused(options)


@pytest.mark.compat
@pytest.mark.parametrize("command", ["train", "score"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [\n", "--config: while parsing"),
        (b"\xff\xfe\xff", "--config: "),
        (b"", "which is empty. Write lines such as"),
        (b"- a\n", "which holds no names with values"),
        (b"1: a\n", "which holds no names with values"),
        (b"env: [a]\n", "whose env is ['a']. Give it names with values."),
    ],
)
def test_a_config_that_can_not_be_read(command, content, message, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    for arguments in (["--config", str(path)], [f"--config={path}"]):
        with pytest.raises(SystemExit) as stop:
            main([command, *arguments])
        assert stop.value.code == 2
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith(f"trl-cdr {command}: --config")
        assert message in line


def test_a_config_that_is_not_there(tmp_path, capsys):
    for arguments, message in (
        (["--config"], "--config names no file"),
        (["--config", str(tmp_path / "no.yaml")], "No such file"),
        (["--config", str(tmp_path)], "Is a directory"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["train", *arguments])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


def helped(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main(["train", *arguments])
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_help_is_what_a_newcomer_reads(capsys, monkeypatch):
    """Ours first, then the trainer's, the model's and the data set's; examples last; three screens."""
    monkeypatch.setenv("COLUMNS", "100")
    printed = helped(capsys, "--help")
    order = ["--config FILE", "--trainer grpo|", "--cdr_objectives", "--cdr_strong", "trainer grpo (GRPOConfig)"]
    order += ["--output_dir", "--learning_rate", "--model_name_or_path", "--dataset_name", "examples:"]
    assert [printed.index(word) for word in order] == sorted(printed.index(word) for word in order)
    assert printed[printed.index("examples:") :].count("trl-cdr train") + printed.count("-m trl_cdr train") == 3
    assert len(printed.splitlines()) < 180
    assert "--adam_beta1" not in printed
    assert max(map(len, printed.splitlines())) <= 100


def test_help_speaks_of_the_trainer_asked_for(capsys, tmp_path):
    (tmp_path / "run.yaml").write_text("trainer: online_dpo\n")
    for arguments, its_own in (
        ([], "--num_iterations"),
        (["--config", str(tmp_path / "run.yaml")], "--max_new_tokens"),
        (["--trainer", "online_preference"], "--gamma_beta_ratio"),
    ):
        printed = helped(capsys, *arguments, "--help_all")
        assert all(
            f"  {word} " in printed for word in (its_own, "--trainer", "--cdr_strong", "--lora_r", "--adam_beta1")
        )


def test_help_shows_nothing_that_no_trainer_has():
    kinds = [ModelConfig, ScriptArguments, *(TrainArguments(name).config_class for name in TRAINERS)]
    known = {field.name for kind in kinds for field in fields(kind)}
    assert set(_OFTEN) <= known


def prompts(rows, tmp_path, **arguments):
    name = write_rows(tmp_path / "rows.jsonl", rows)
    [data] = load_prompts(ScriptArguments(dataset_name=name, **arguments), splits=["train"])
    return data


def test_prompts_of_a_preference_data_set(tmp_path):
    turns = {"chosen": chat("hello") + answer("good"), "rejected": chat("hello") + answer("bad"), "domain": "chat"}
    for extra in ({}, {"prompt": "hello"}):  # some data sets repeat the prompt as text
        data = prompts([turns | extra] * 2, tmp_path)
        assert data[:] == {"prompt": [chat("hello")] * 2, "domain": ["chat"] * 2}
    data = prompts([{"prompt": "hello", "chosen": "good", "rejected": "bad"}], tmp_path)
    assert data[:] == {"prompt": ["hello"]}


@pytest.mark.parametrize("streaming", [False, True])
def test_prompts_of_conversations(tmp_path, streaming):
    rows = [{"messages": chat("system:be brief", "a", "b", "c", "d")}, {"messages": chat("system:be brief", "a")}]
    data = prompts(rows, tmp_path, dataset_streaming=streaming)
    assert [row["prompt"] for row in data] == [chat("system:be brief", "a", "b", "c"), chat("system:be brief", "a")]
    assert all(set(row) == {"prompt"} for row in data)


def test_data_sets_that_were_saved(tmp_path):
    data = Dataset.from_dict({"prompt": WORDS})
    for saved in (data, DatasetDict(train=data)):
        saved.save_to_disk(str(tmp_path / "saved"))
        [loaded] = load_prompts(ScriptArguments(dataset_name=str(tmp_path / "saved")), splits=["train"])
        assert loaded["prompt"][:] == WORDS


def test_what_has_no_prompts(tmp_path):
    with pytest.raises(InputError, match="has no column prompt, .* its columns are: question, answer"):
        prompts([{"question": "a", "answer": "b"}], tmp_path)
    (tmp_path / "broken.jsonl").write_text("{")
    with pytest.raises(InputError, match="broken.jsonl', which can't be read"):
        load_prompts(ScriptArguments(dataset_name=str(tmp_path / "broken.jsonl")), splits=["train"])
    with pytest.raises(ConfigError, match="dataset_name is missing"):
        load_prompts(ScriptArguments(), splits=["train"])


def launch(command, tmp_path, settings):
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(settings))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CDR_")}
    run = subprocess.run(
        [sys.executable, "-m", *command, "--config", str(config)],
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return run.stdout + run.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grpo", "rloo"])
def test_trls_own_command(name, options, tmp_path):
    """The reward by its dotted path, its options in the YAML's `env`."""
    given = {key: options.pop(key) for key in ("cdr_strong", "cdr_weak")}
    options["dataset_name"] = str(Path(options["dataset_name"]).parent)  # this command takes no single file
    environment = {key.upper(): value for key, value in given.items()} | {"CDR_NAME": "pair"}
    environment["CDR_GATE"] = "none"
    settings = options | TRAINERS[name] | {"reward_funcs": ["trl_cdr.cdr_reward"], "env": environment}
    printed = launch(["trl.cli.main", name], tmp_path, settings)
    assert "rewards/pair_reward/mean" in printed
    assert "pair/gated" in printed
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grpo", "online_dpo", "online_preference"])
def test_under_accelerate_launch(name, options, tmp_path):
    """Two processes, each with the pair and its share of the prompts."""
    settings = options | TRAINERS[name] | {"trainer": name}
    accelerate = ["accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
    accelerate += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m", "trl_cdr", "train"]
    printed = launch(accelerate, tmp_path, settings)
    assert printed.count(f"2 steps of {name}") == 1
