"""The real workload: results by part that a stopped run takes up, and, with the model, a demo in small."""

import errno
import json

import pytest
from tiny import chat

from trl_cdr import ConfigError, DensityRatioScorer
from trl_cdr.demo import cache, parts, real, real_models, real_training, real_world
from trl_cdr.demo.parts import Parts


def test_a_part_that_is_there_is_not_run_again(tmp_path):
    calls = []

    def measure():
        calls.append(1)
        return {"value": len(calls)}

    for _ in range(2):
        found = Parts(tmp_path / "out", {"model": "a"}).run("part", measure)
        assert found["value"] == 1
        assert found["seconds"] >= 0


def test_a_part_that_fails_leaves_nothing(tmp_path):
    made = Parts(tmp_path, {"model": "a"})
    with pytest.raises(ZeroDivisionError):
        made.run("part", lambda: {"value": 1 / 0})
    assert [path.name for path in tmp_path.iterdir()] == ["settings.json"]
    assert made.run("part", lambda: {"value": 2})["value"] == 2


def test_results_of_other_settings_are_not_mixed(tmp_path):
    Parts(tmp_path, {"model": "a", "samples": 4})
    with pytest.raises(ConfigError, match=r"of another model, versions \(settings.json\). Pass another folder"):
        Parts(tmp_path, {"model": "b", "samples": 4, "versions": {}})
    made = Parts(tmp_path, {"model": "a", "samples": 4})
    made.keep("strong.json", {"strong": "one"})
    made.keep("strong.json", {"strong": "one"})
    with pytest.raises(ConfigError, match=r"whose results are of another strong \(strong.json\)"):
        made.keep("strong.json", {"strong": "tuned again"})


def test_a_full_disk(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    made = Parts(tmp_path, {"model": "a"})
    monkeypatch.setattr(parts, "write_json", full)
    with pytest.raises(ConfigError, match="can't be written: .*No space left on device. What is finished stays there"):
        made.run("part", lambda: {"value": 1})
    with pytest.raises(ConfigError, match="No space left on device"), cache.saving(tmp_path):
        full()


def test_without_peft_the_command_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ConfigError, match="peft is not installed. Run: pip install peft"):
        real_models.make_lora()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"data is '.*pairs.jsonl', which can't be read: No such file"),
        ('{"prompt": "a", "chosen": "b"}\n', r"data is '.*pairs.jsonl', which has no column rejected"),
        ("", r"data is '.*pairs.jsonl', which is no JSONL: it is empty"),
        ('{"prompt": ', r"data is '.*pairs.jsonl', which is no JSONL: "),
    ],
)
def test_pairs_of_a_file_that_is_none(checkpoints, tmp_path, monkeypatch, content, message):
    monkeypatch.setenv("TRL_CDR_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "pairs.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        real_models.build_strong(checkpoints["weak"], tasks=2, data=str(path))
    assert not [*tmp_path.glob("cache/*")]


def test_a_model_that_writes_no_pair(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_CDR_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ConfigError, match="wrote no pair of a right and a wrong completion"):
        real_models.build_strong(checkpoints["weak"], tasks=1)


def test_a_tokenizer_without_padding_pads_with_its_end(checkpoints, tmp_path, strong):
    tokenizer = real_models.load_tokenizer(checkpoints["strong"])
    assert tokenizer.pad_token == "<|pad|>"
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    bare = real_models.load_tokenizer(tmp_path)
    assert bare.pad_token == bare.eos_token == "<|im_end|>"
    prompts = [chat("hello"), chat("what is this and that")]
    groups = real_models.sample(strong, bare, prompts, per_prompt=2, seed=0)
    assert [len(group) for group in groups] == [2, 2]


@pytest.mark.slow
def test_pairs_of_a_file_make_a_strong_model(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_CDR_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": chat("hello"), "chosen": said("the fox"), "rejected": said("a dog")}] * 12
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = real_models.build_strong(checkpoints["weak"], tasks=2, data=str(path))
    assert json.loads((folder / "tuning.json").read_text())["pairs"] == 12
    scorer = DensityRatioScorer(str(folder), checkpoints["weak"], gate="none")
    better, worse = scorer.score([chat("hello")] * 2, ["the fox", "a dog"])
    assert better.value > worse.value + 0.5
    assert real_models.build_strong(checkpoints["weak"], tasks=2, data=str(path)) == folder


def said(text):
    return [{"role": "assistant", "content": text}]


def few(monkeypatch, count):
    for name in ("TRAIN", "HELD_OUT", "HELD_OUT_AGAIN", "HELD_OUT_MORE", "HELD_OUT_UNSEEN"):
        monkeypatch.setattr(real_world, name, getattr(real_world, name)[:count])


@pytest.mark.real
@pytest.mark.slow
def test_the_demo_in_small(smollm_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRL_CDR_CACHE", str(tmp_path / "cache"))
    few(monkeypatch, 6)
    monkeypatch.setitem(real_models._TUNING, "per_device_train_batch_size", 3)
    summary = real.run_demo(tmp_path / "out", model=str(smollm_folder))
    assert summary["tuning"]["steps"] >= 1
    assert summary["labels"]["seen"]["drawn"]["pairs"] > 0
    assert (tmp_path / "out" / "labels.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary
    assert "| CDR: strong over weak |" in capsys.readouterr().out
    # Again: nothing is sampled, tuned or scored.
    monkeypatch.setattr(real_models, "sample", None)
    assert real.run_demo(tmp_path / "out", model=str(smollm_folder)) == summary


def test_each_policy_is_trained_on_its_reward(lab, monkeypatch):
    rewards = {}

    def keep(_, reward, *, loop, seed, name):
        rewards[loop, name.split(", ")[1], seed] = reward
        return {"held_out": {}}

    monkeypatch.setattr(real_training, "train_policy", keep)
    monkeypatch.setattr(real_training, "evaluate_start", lambda *_, **__: {"held_out": []})
    lab.training()
    assert {*rewards} == {
        (loop, reward, seed) for loop in real_training.LOOPS for reward, seeds in real.REWARDS.items() for seed in seeds
    }
    for (_, name, _), reward in rewards.items():
        if name in ("gold", "random"):
            assert (reward is None) == (name == "gold")
        else:
            assert reward.config.cdr_gate == name


@pytest.fixture
def lab(checkpoints, tmp_path):
    """A lab on a tiny pair."""
    lab = object.__new__(real.Lab)
    lab.weak, lab.strong, lab.parts = checkpoints["weak"], checkpoints["strong"], Parts(tmp_path / "out", {})
    return lab


@pytest.mark.parametrize("reward", [None, lambda **_: [1.0, None, 3.0]], ids=["gold", "another"])
def test_what_is_trained_on_is_watched(reward):
    task = real_world.TRAIN[4]  # rivers, no commas
    steps = []
    watched = real_training.Watched(reward, end_ids=[2], advance=lambda: steps.append(1))
    texts = ["Rivers run.", "Rivers run, and run.", "Rivers run and run and run and run and"]
    rewards = watched([task.prompt] * 3, [said(text) for text in texts], [[5, 6, 2, 2], [5, 7, 6, 2], [5, 6, 7, 6]])
    assert rewards == ([1.0, 0.0, 0.0] if reward is None else [1.0, None, 3.0])
    assert steps == [1]
    assert watched.curve == {
        "gold": [pytest.approx(1 / 3)],
        "tokens": [pytest.approx(11 / 3)],
        "repeats": [pytest.approx(1 / 3)],
        "finished": [pytest.approx(2 / 3)],
        "reward": [pytest.approx(1 / 3 if reward is None else 2.0)],
    }


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize("loop", real_training.LOOPS)
def test_a_policy_is_trained_and_judged(smollm_folder, monkeypatch, loop):
    few(monkeypatch, 2)
    size = {"online_dpo": 2, "online_preference": 4}[loop]
    found = real_training.train_policy(
        smollm_folder, None, loop=loop, seed=0, name=loop, max_steps=2, per_device_train_batch_size=size
    )
    assert len(found["curve"]["gold"]) == 2
    assert found["curve"]["gold"] == found["curve"]["reward"]
    assert {*found["held_out"]} == {"seen", "unseen"}
    assert 0 <= found["held_out"]["seen"]["gold"] <= 1
