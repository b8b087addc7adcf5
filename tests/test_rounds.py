"""Rounds by a real pair, tiny as it is: what each leaves, what a run that was stopped ends with, what is refused."""

import json
import math
import resource
import shutil
import signal
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from datasets import Dataset
from ranks import Run, launch
from safetensors.torch import load_file
from tiny import TRAINING, chat
from transformers import AutoTokenizer, PreTrainedTokenizerBase, TrainerState
from trl import ModelConfig

from trl_cdr import CDRConfig, ConfigError
from trl_cdr.annotation import annotate
from trl_cdr.annotation.annotate import AnnotateArguments
from trl_cdr.annotation.score_folder import hold
from trl_cdr.cli import main
from trl_cdr.rounds import rounds as module
from trl_cdr.rounds.rounds import run_rounds
from trl_cdr.rounds.rounds_arguments import PairsArguments, RoundsArguments

pytestmark = [
    # TRL's configs set gradient_checkpointing, which transformers 5 renamed; drop when TRL follows
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is deprecated:FutureWarning"),
]
PROMPTS = ["hello", "what is this", "and that?", "the quick brown fox", "jumps over", "a lazy dog", "this and that"]


@pytest.fixture(scope="module")
def options(tmp_path_factory, checkpoints, quick):
    """What a YAML holds."""
    folder = tmp_path_factory.mktemp("rounds")
    path = folder / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": chat(prompt)}) for prompt in PROMPTS))
    return {
        "input": str(path),
        "output_dir": str(folder / "whole"),
        "num_rounds": 2,
        "num_generations": 3,
        "max_completion_length": 12,
        "shard_size": 2,
        "batch_size": 2,
        "cdr_strong": checkpoints["strong"],
        "cdr_weak": checkpoints["weak"],
        "cdr_gate": "none",
        "model_name_or_path": quick,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 2,
        "save_steps": 1,
        "logging_steps": 1,
        **TRAINING,
    }


def run(options, *arguments):
    folder = Path(options["output_dir"])
    config = folder.with_name(f"{folder.name}.yaml")
    config.write_text(yaml.safe_dump({name: value for name, value in options.items() if value is not None}))
    main(["rounds", "--config", str(config), *arguments])
    return folder


@pytest.fixture(scope="module")
def whole(options):
    """A run that nobody stopped."""
    return run(options)


@pytest.fixture
def refused(capsys):
    def refused(options, *arguments):
        with pytest.raises(SystemExit) as stop:
            run(options, *arguments)
        assert stop.value.code == 2
        return capsys.readouterr().err

    return refused


def pairs(folder, number, name="pairs"):
    """What a round trained on."""
    files = sorted(folder.glob(f"round-{number}/{name}/data/*"))
    return [row for path in files for row in pq.read_table(path).to_pylist()]


def results(folder, rounds=2):
    """All that a run ends with."""
    policies = [folder / f"round-{number}" / "policy" for number in range(1, rounds + 1)]
    found = [
        (pairs(folder, 1 + place), (path / "model.safetensors").read_bytes()) for place, path in enumerate(policies)
    ]
    return found, json.loads((folder / "summary.json").read_text())["rounds"]


@pytest.mark.compat
def test_what_is_written(options, whole, quick):
    (first, second), summary = results(whole)
    assert [row["prompt"][0]["content"] for row in first[0]] == PROMPTS[::2]
    assert [row["prompt"][0]["content"] for row in second[0]] == PROMPTS[1::2]
    made = [json.loads((whole / f"round-{number}" / "pairs" / "options.json").read_text()) for number in (1, 2)]
    assert [one["policy"] for one in made] == [quick, str(whole / "round-1" / "policy")]
    assert [one["seed"] for one in made] == [42, 43]
    start = (Path(quick) / "model.safetensors").read_bytes()
    assert len({start, first[1], second[1]}) == 3
    assert AutoTokenizer.from_pretrained(whole / "round-2" / "policy").chat_template
    assert not list(whole.glob("round-*/training/.cache"))
    for number, one in enumerate(summary, start=1):
        rows = pairs(whole, number)
        rewards = [reward for row in rows for reward in row["rewards"]]
        assert (one["round"], one["rows"], one["pairs"], one["ties"], one["gated"]) == (
            number,
            len(rows),
            len(rows),
            0,
            0,
        )
        assert one["reward"] == pytest.approx(sum(rewards) / len(rewards))
        assert one["margin"] == pytest.approx(sum(row["margin"] for row in rows) / len(rows))
        log = json.loads((whole / f"round-{number}" / "training" / "trainer_state.json").read_text())["log_history"]
        losses = [entry["loss"] for entry in log if "loss" in entry]
        assert one["steps"] == len(losses) == 2  # an epoch
        assert one["loss"] == pytest.approx(sum(losses) / len(losses))


def test_a_round_s_completions_are_of_the_policy_before(options, whole, tmp_path, checkpoints):
    """As `annotate` makes them with that policy."""
    arguments = AnnotateArguments(
        options["input"],
        str(tmp_path),
        policy=str(whole / "round-1" / "policy"),
        seed=43,
        **{name: options[name] for name in ("num_generations", "max_completion_length", "shard_size", "batch_size")},
    )
    prompts = Dataset.from_list([{"prompt": chat(prompt)} for prompt in PROMPTS[1::2]])
    annotate.annotate(
        arguments,
        CDRConfig(**{f"cdr_{role}": name for role, name in checkpoints.items()}, cdr_gate="none"),
        data=prompts,
    )
    expected = [row for path in sorted(tmp_path.glob("data/*")) for row in pq.read_table(path).to_pylist()]
    assert pairs(whole, 2) == expected


class Stopped(Exception):
    """What stops a run, in the place of a signal."""


def stop_at(monkeypatch, owner, name, call, *, after=False):
    """Have a function stop the run at its so-many-th call, counted from 1."""
    real, calls = getattr(owner, name), []

    def stopping(*args, **kwargs):
        calls.append(args)
        if len(calls) == call and not after:
            raise Stopped
        found = real(*args, **kwargs)
        if len(calls) == call:
            raise Stopped
        return found

    monkeypatch.setattr(owner, name, stopping)


def test_a_stopped_run_ends_as_one_that_was_not(options, whole, tmp_path, monkeypatch, capsys):
    """Stopped in the first completions, in a checkpoint, in the policy, between the rounds, in the second's pairs."""
    options = {**options, "output_dir": str(tmp_path / "out")}
    for owner, name, call, after in (
        (annotate, "label_rows", 2, False),
        (TrainerState, "save_to_json", 2, False),  # the last file of the second checkpoint
        (PreTrainedTokenizerBase, "save_pretrained", 2, False),  # of the policy: its weights are written
        (module, "train_round", 1, True),
        (annotate, "label_rows", 2, False),
    ):
        with monkeypatch.context() as patch:
            stop_at(patch, owner, name, call, after=after)
            with pytest.raises(Stopped):
                run(options)
        if owner is TrainerState:
            assert (tmp_path / "out" / "round-1" / "training" / "checkpoint-2").is_dir()
        if owner is PreTrainedTokenizerBase:
            assert (tmp_path / "out" / "round-1" / ".policy.partial" / "model.safetensors").exists()
    out = run(options)
    assert f"resuming from {out / 'round-1' / 'training' / 'checkpoint-1'}\n" in capsys.readouterr().err
    assert results(out) == results(whole)


def test_what_is_done_is_taken_as_it_is(options, whole, monkeypatch, capsys):
    monkeypatch.setattr(module, "run", None)
    monkeypatch.setattr(module, "train_round", None)
    before = results(whole)
    run(options)
    assert results(whole) == before
    printed = capsys.readouterr().out
    assert str(whole / "round-2" / "policy") in printed


def test_a_disk_that_is_full(options, whole, tmp_path, monkeypatch, refused):
    """The kernel refuses what goes beyond so many bytes of a file: of the pairs as arrays, a model, an optimizer."""
    options = {**options, "output_dir": str(tmp_path / "out")}
    real, limit = module.train_round, resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (900, 60_000, 200_000):

        def filling(*args, size=size, **kwargs):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
            real(*args, **kwargs)

        try:
            monkeypatch.setattr(module, "train_round", filling)
            err = refused(options)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        assert "can't be written: " in err
        assert "What is finished stays there: make room and run the same command again." in err
    monkeypatch.setattr(module, "train_round", real)
    assert results(run(options)) == results(whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 2e-2}, "learning_rate=0.01, and now it is 0.02"),
        ({"simpo_gamma": 0.5}, "simpo_gamma=1.0, and now it is 0.5"),
        ({"num_generations": 4}, "num_generations=3, and now it is 4"),
        ({"seed": 1}, "seed=42, and now it is 1"),
        ({"num_rounds": 3}, "num_rounds=2, and now it is 3"),
        ({"use_peft": True}, "use_peft=False, and now it is True"),
        ({"trainer": "dpo"}, "holds scores with "),
        ({"round_prompts": "all"}, "holds scores with "),
        ({"model_name_or_path": "strong"}, "policy_identity='sha256 "),
        ({"cdr_strong": "weak"}, "holds scores by other weights of strong"),
    ],
)
def test_a_run_that_changed_is_refused(change, message, options, whole, refused, checkpoints, monkeypatch):
    monkeypatch.setattr(module, "train_round", None)
    change = {name: checkpoints.get(value, value) for name, value in change.items()}
    before = results(whole)
    assert message in refused({**options, **change})
    assert results(whole) == before


def test_another_input_is_refused(options, whole, tmp_path, refused):
    path = tmp_path / "prompts.jsonl"
    path.write_text(Path(options["input"]).read_text().replace("hello", "hallo"))
    assert "holds the scores of another input" in refused({**options, "input": str(path)})


def test_what_has_no_effect_may_change(options, whole, monkeypatch):
    monkeypatch.setattr(module, "train_round", None)
    run({**options, "logging_steps": 7, "save_steps": 9, "batch_size": 1, "report_to": ["none"], "run_name": "b"})


def test_what_chooses_the_best_may_not(options, tmp_path, refused, monkeypatch):
    def stop(*args, **kwargs):
        raise ConfigError("stopped")

    monkeypatch.setattr(module._Rounds, "run", stop)
    (tmp_path / "input").mkdir()
    for split in ("train", "test"):
        rows = [json.dumps({"prompt": chat(f"{prompt} {split}")}) for prompt in PROMPTS[:2]]
        (tmp_path / "input" / f"{split}.jsonl").write_text("\n".join(rows))
    changed = {"input": str(tmp_path / "input"), "eval_split": "test", "output_dir": str(tmp_path / "out")}
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1, "save_steps": 2}
    assert "stopped" in refused({**options, **changed, **best})
    assert "save_steps=2, and now it is 3" in refused({**options, **changed, **best, "save_steps": 3})
    assert "eval_steps=1, and now it is 2" in refused({**options, **changed, **best, "eval_steps": 2})
    assert "stopped" in refused({**options, **changed, **best, "logging_steps": 3})


@pytest.mark.parametrize(
    ("rows", "processes", "most", "size"), [(5000, 8, 512, 313), (5000, 1, 512, 500), (7, 2, 512, 4), (3, 8, 2, 1)]
)
def test_processes_that_wait_for_each_other_have_equal_shards(rows, processes, most, size):
    assert module.even_shards(rows, processes, most) == size
    shards = math.ceil(rows / size)
    assert size <= most
    assert shards <= processes * math.ceil(rows / processes / most)


@pytest.mark.compat
def test_dpo_with_all_prompts_in_python(options, checkpoints, quick, tmp_path):
    """The reference is the policy that a round finds; a finished run gets a round more; a policy without template."""
    policy = shutil.copytree(quick, tmp_path / "policy")
    tokenizer = AutoTokenizer.from_pretrained(policy)
    template, tokenizer.chat_template = tokenizer.chat_template, None
    (policy / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(policy)
    names = ("num_generations", "max_completion_length", "shard_size", "batch_size")
    training = {name: options[name] for name in (*TRAINING, "per_device_train_batch_size", "logging_steps")}

    rows = Dataset.from_list([{"prompt": chat(prompt)} for prompt in PROMPTS])

    def train(count):
        arguments = RoundsArguments(num_rounds=count, round_prompts="all", trainer="dpo", eval_split="test")
        return run_rounds(
            arguments,
            pairs_args=PairsArguments("mine", **{name: options[name] for name in names}),
            training_args=arguments.config_class(
                str(tmp_path / "out"), learning_rate=1e-3, eval_strategy="epoch", save_strategy="no", **training
            ),
            model_args=ModelConfig(str(policy)),
            cdr_args=CDRConfig(checkpoints["strong"], checkpoints["weak"], cdr_gate="none"),
            data={"train": rows.select(range(4)), "test": rows.select(range(4, 6))},
        )

    first = train(1)
    stamp = (tmp_path / "out" / "round-1" / "policy" / "model.safetensors").stat().st_mtime_ns
    second = train(2)
    assert (tmp_path / "out" / "round-1" / "policy" / "model.safetensors").stat().st_mtime_ns == stamp
    assert second["rounds"][:1] == first["rounds"]
    assert [one["rows"] for one in second["rounds"]] == [4, 4]
    for number, one in enumerate(second["rounds"], start=1):
        held_out = pairs(tmp_path / "out", number, "eval-pairs")
        assert [row["prompt"] for row in held_out] == rows["prompt"][4:6]
        assert one["eval_reward"] == pytest.approx(sum(reward for row in held_out for reward in row["rewards"]) / 6)
        assert one["eval_loss"] > 0
        assert 0 <= one["eval_accuracy"] <= 1
    draws = [[row["scores"] for row in pairs(tmp_path / "out", number)] for number in (1, 2)]
    assert draws[0] != draws[1]
    assert AutoTokenizer.from_pretrained(second["policy"]).chat_template == template
    for number in (1, 2):
        state = json.loads((tmp_path / "out" / f"round-{number}" / "training" / "trainer_state.json").read_text())
        margins = [entry["rewards/margins"] for entry in state["log_history"] if "rewards/margins" in entry]
        assert margins[0] == pytest.approx(0, abs=1e-4)
        assert abs(margins[1]) > 1e-3


def test_no_secret_is_kept(options, tmp_path, refused, monkeypatch):
    monkeypatch.setattr(module, "train_round", None)
    kwargs = {"token": "hf_SECRET", "attn_implementation": "eager"}
    changed = {
        **options,
        "output_dir": str(tmp_path / "out"),
        "min_margin": 1e6,
        "model_init_kwargs": json.dumps(kwargs),
    }
    refused(changed)
    kept = json.loads((tmp_path / "out" / "options.json").read_text())
    assert kept["model_init_kwargs"] == {"attn_implementation": "eager"}


def test_a_round_without_a_pair(options, tmp_path, refused, monkeypatch):
    monkeypatch.setattr(module, "train_round", None)
    err = refused({**options, "output_dir": str(tmp_path / "out"), "min_margin": 1e6})
    assert (
        "round 1 has no pair in pairs, of 4 prompts (min_margin: 4). Use a smaller min_margin (it is 1000000.0)" in err
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_name_or_path": None}, "model_name_or_path is missing"),
        ({"model_name_or_path": "no/such/policy"}, "model_name_or_path is 'no/such/policy', whose config can't be"),
        ({"cdr_strong": "no/such/model"}, "cdr_strong is 'no/such/model', whose config can't be loaded"),
        ({"cdr_strnog": "a"}, "unknown arguments: cdr_strnog (did you mean cdr_strong?). trl-cdr rounds --help"),
        ({"simpo_gama": 1}, "unknown arguments: simpo_gama (did you mean simpo_gamma?)"),
        ({"ld_alpha": 0.5}, "unknown arguments: ld_alpha (of trainer dpo, not of cpo)"),
        ({"resume_from_checkpoint": True}, "resume_from_checkpoint (a run always goes on where it was)"),
        ({"push_to_hub": True}, "push_to_hub (nothing is pushed"),
        ({"policy": "a"}, "policy (the policy is model_name_or_path"),
        ({"trainer": "grpo"}, "trainer is 'grpo'. Use one of: cpo, dpo"),
        ({"num_rounds": 0}, "num_rounds is 0: it counts rounds"),
        ({"num_rounds": 8}, "which has 7 rows, and each of 8 rounds needs its share"),
        ({"round_prompts": "some"}, "round_prompts is 'some'. Use one of: split, all"),
        ({"loss_type": "simpa"}, "loss_type is 'simpa', which trainer cpo does not know. Use one of: sigmoid, "),
        (
            {"trainer": "dpo", "loss_type": ["sigmoid", "simpo"]},
            "loss_type is 'simpo', which trainer dpo does not know",
        ),
        ({"num_generations": 1}, "num_generations is 1: a pair needs two"),
        ({"max_length": 12}, "max_length is 12 tokens of a prompt and its completion in training, and"),
        ({"save_only_model": True}, "save_only_model is set: a training that is stopped could not go on"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"eval_strategy": "epoch"}, "eval_strategy is 'epoch', and eval_split is missing"),
        ({"eval_split": "test"}, "eval_split is 'test', and split is 'train': of "),
        ({"cdr_share_policy": True}, "cdr_share_policy is set, and the pair labels when no policy is in training"),
        ({"input": "no/such.jsonl"}, "input is 'no/such.jsonl', which can't be read"),
        ({"output_dir": f"{__file__}/out"}, "test_rounds.py' is no folder that can be written"),
        ({"cdr_criteria": "safety", "cdr_router": "column:kind"}, "router is 'column:kind', and "),
    ],
)
def test_what_is_refused_before_anything_is_written(change, message, options, tmp_path, refused, monkeypatch):
    monkeypatch.setattr(module, "hold", None)
    output = {"output_dir": str(tmp_path / "out")}
    if "output_dir" in change:  # the YAML has to lie somewhere
        with pytest.raises(SystemExit):
            main(
                [
                    "rounds",
                    *(part for name in ("input", "cdr_strong", "cdr_weak") for part in (f"--{name}", options[name])),
                    "--output_dir",
                    change["output_dir"],
                ]
            )
        return
    assert message in refused({**options, **output, **change})
    assert not (tmp_path / "out").exists()


def test_a_bad_row_of_a_later_round(options, tmp_path, refused, monkeypatch):
    """Found before the first round; or left out and listed."""
    lines = Path(options["input"]).read_text().splitlines()
    lines[1] = json.dumps({"prompt": chat("a"), "completions": ["b", "c"]})
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(lines))
    changed = {**options, "input": str(path), "output_dir": str(tmp_path / "out")}
    err = refused(changed)
    assert "prompts.jsonl:2 has completions, and here the policy of each round writes them" in err
    assert not (tmp_path / "out").exists()
    stop_at(monkeypatch, module, "train_round", 1)
    with pytest.raises(Stopped):
        run({**changed, "num_rounds": 1, "on_bad_row": "skip"})
    left_out = json.loads((tmp_path / "out" / "round-1" / "pairs" / "summary.json").read_text())["bad_rows"]
    assert [row["index"] for row in left_out["first"]] == [1]


def test_a_folder_that_is_not_ours(options, tmp_path, refused, whole):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("a")
    assert "which holds 'thesis.tex' and no options.json" in refused({**options, "output_dir": str(tmp_path / "out")})
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]
    place = whole / "round-1" / "pairs"
    assert "holds scores with " in refused({**options, "output_dir": str(place)})


def test_a_folder_that_is_in_use(options, tmp_path, refused):
    with hold(tmp_path / "out", "-rounds-0"):
        assert "is in use by another process" in refused({**options, "output_dir": str(tmp_path / "out")})


def test_a_training_config_of_another_trainer(options, checkpoints, quick, tmp_path):
    arguments = RoundsArguments(trainer="dpo")
    with pytest.raises(ConfigError, match="training_args is a RoundCPOConfig, and trainer is 'dpo'"):
        run_rounds(
            arguments,
            pairs_args=PairsArguments(options["input"]),
            training_args=RoundsArguments().config_class(str(tmp_path / "out"), **TRAINING),
            model_args=ModelConfig(quick),
            cdr_args=CDRConfig(checkpoints["strong"], checkpoints["weak"]),
        )


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["cpo", "dpo"])
def test_lora(trainer, options, tmp_path, monkeypatch):
    """
    Each round's adapter is merged into the policy that the next one finds. Its first weights do not depend on what was
    drawn before, so that a run that was stopped ends as one that was not.
    """
    pytest.importorskip("peft")
    lora = {"use_peft": True, "lora_target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.0, "trainer": trainer}
    lora |= {"simpo_gamma": None, "output_dir": str(tmp_path / "out")}
    out = run({**options, **lora})
    if trainer == "cpo":
        again = {**options, **lora, "output_dir": str(tmp_path / "again")}
        with monkeypatch.context() as patch:
            stop_at(patch, annotate, "label_rows", 3)  # the first round's are two
            with pytest.raises(Stopped):
                run(again)
        torch.manual_seed(7)
        assert results(run(again)) == results(out)
    for number, before in ((1, options["model_name_or_path"]), (2, str(out / "round-1" / "policy"))):
        place = out / f"round-{number}"
        config = json.loads((place / "training" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == before
        adapter = load_file(place / "training" / "adapter_model.safetensors")
        old, new = (load_file(Path(folder) / "model.safetensors") for folder in (before, place / "policy"))
        changed = 0
        for name, tensor in new.items():
            key = f"base_model.model.{name.removesuffix('.weight')}.lora_{{}}.weight"
            if key.format("A") in adapter:
                delta = adapter[key.format("B")] @ adapter[key.format("A")] * config["lora_alpha"] / config["r"]
                assert tensor.allclose(old[name] + delta, atol=1e-5)
                changed += not tensor.equal(old[name])
            else:
                assert tensor.equal(old[name])
        assert changed == 4
        if trainer == "dpo":
            log = json.loads((place / "training" / "trainer_state.json").read_text())["log_history"]
            assert log[0]["rewards/margins"] == pytest.approx(0, abs=1e-4)


@pytest.mark.slow
def test_kill_minus_nine_and_two_processes(options, whole, tmp_path, refused):
    """What was killed five times ends with the pairs and weights of what was not; so do two processes, but rounding."""
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(options))
    halves = tmp_path / "halves.yaml"
    halves.write_text(yaml.safe_dump({**options, "per_device_train_batch_size": 1}))
    killed, shared = (
        Run("ranks_rounds.py", [str(path), str(tmp_path / out)], processes)
        for path, out, processes in ((config, "killed", 1), (halves, "shared", 2))
    )
    [[signals], _] = launch(killed, shared)
    assert signals == [signal.SIGKILL] * 5
    assert results(tmp_path / "killed") == results(whole)
    assert pairs(tmp_path / "shared", 1) == pairs(whole, 1)
    assert len(pairs(tmp_path / "shared", 2)) == len(pairs(whole, 2))
    found, expected = (
        load_file(folder / "round-1" / "policy" / "model.safetensors") for folder in (tmp_path / "shared", whole)
    )
    assert all(found[name].allclose(expected[name], atol=1e-3) for name in expected)
    alone = {**options, "per_device_train_batch_size": 1, "output_dir": str(tmp_path / "shared")}
    assert "processes=2, and now it is 1" in refused(alone)
