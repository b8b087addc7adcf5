"""The table that closes a run says what was logged; test_train sees it printed by each trainer."""

from trl_cdr.training.summary import changes, places

HISTORY = [
    {"reward": -1.0, "rewards/a_reward/mean": -2.0, "a/gated": 0.5, "completions/mean_length": 10.0, "a/tokens": 9.0},
    {"eval_reward": 0.25},
    {"reward": 0.5, "rewards/a_reward/mean": 0.5, "a/gated": 0.125, "completions/mean_length": 20.0, "a/tokens": 19.0},
    {"train_runtime": 3.0},
]


def test_one_reward():
    assert changes(HISTORY, rewards=["a_reward"], objectives=["a"]) == [
        ("reward", "-1.000", "+0.500"),
        ("reward, held out", "", "+0.250"),
        ("gated", "50.0%", "12.5%"),
        ("tokens a completion", "10.0", "20.0"),
    ]


def test_several_rewards():
    rows = changes(HISTORY, rewards=["a_reward", "b_reward"], objectives=["a", "b"])
    assert [label for label, *_ in rows] == [
        "reward",
        "  a_reward",
        "reward, held out",
        "gated, a",
        "tokens a completion",
    ]


def test_online_dpo_and_a_run_without_logs():
    history = [{"objective/scores": 1.0, "a/tokens": 9.0}]
    assert changes(history, rewards=["a_reward"], objectives=["a"]) == [
        ("reward", "", "+1.000"),
        ("tokens a completion", "", "9.0"),
    ]
    assert changes([], rewards=["a_reward"], objectives=["a"]) == []


def test_intervals_without_a_value():
    """TRL logs None where no reward was a number, and a run may have no other."""
    nothing = {"reward": None, "rewards/a_reward/mean": None, "rewards/b_reward/mean": None, "eval_reward": None}
    names = {"rewards": ["a_reward", "b_reward"], "objectives": ["a"]}
    assert changes([nothing, *HISTORY, nothing], **names) == changes(HISTORY, **names)
    assert changes([nothing], **names) == []


def test_places(tmp_path):
    assert places(tmp_path) == [("model", str(tmp_path)), ("log", f"{tmp_path}/trainer_state.json")]
    for name in ("checkpoint-9", "checkpoint-10", "completions"):
        (tmp_path / name).mkdir()
    assert places(tmp_path, ["wandb"])[1:] == [
        ("checkpoints", f"2, the last {tmp_path}/checkpoint-10"),
        ("completions", f"{tmp_path}/completions"),
        ("log", f"{tmp_path}/trainer_state.json, wandb"),
    ]
