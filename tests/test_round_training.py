"""What a round's training reads and writes beside TRL's trainer; what it trains is in `test_rounds`."""

import json

import pytest
from datasets import Dataset
from tiny import BRACKETS, CHATML, answer, byte_tokenizer, chat

from trl_cdr import ConfigError
from trl_cdr.rounds.round_training import PAIRS, load_pairs, load_policy_tokenizer, read_log


def test_the_log(tmp_path):
    (tmp_path / "training").mkdir()
    history = [{"loss": 1.0, "rewards/accuracies": 0.5}, {"loss": 0.5, "rewards/accuracies": 0.75}]

    def read(*entries):
        state = {"global_step": 4, "log_history": [*entries, {"train_loss": 0.125}]}  # of a resumed run: of its rest
        (tmp_path / "training" / "trainer_state.json").write_text(json.dumps(state))
        return read_log(tmp_path)

    nothing = dict.fromkeys(("accuracy", "eval_loss", "eval_accuracy"))
    assert read(*history) == {**nothing, "steps": 4, "loss": 0.75, "accuracy": 0.75}
    assert read() == {**nothing, "steps": 4, "loss": 0.125}
    found = read(*history, *({"eval_loss": loss, "eval_rewards/accuracies": loss / 2} for loss in (0.5, 0.25)))
    assert (found["eval_loss"], found["eval_accuracy"]) == (0.25, 0.125)


def test_pairs_with_the_template_s_variables(tmp_path):
    row = {"prompt": chat("hello"), "chosen": answer("a"), "rejected": answer("b"), "margin": 1.0}
    (tmp_path / "pairs").mkdir()
    Dataset.from_list([row] * 2).to_parquet(tmp_path / "pairs" / "train.parquet")
    assert load_pairs(tmp_path, PAIRS).column_names == ["prompt", "chosen", "rejected"]
    given = {"enable_thinking": False}
    assert load_pairs(tmp_path, PAIRS, given)[1] == {
        "prompt": chat("hello"),
        "chosen": answer("a"),
        "rejected": answer("b"),
        "chat_template_kwargs": given,
    }


def test_a_tokenizer_with_a_template(tmp_path):
    byte_tokenizer(template=CHATML).save_pretrained(tmp_path / "chat")
    byte_tokenizer(template=None).save_pretrained(tmp_path / "base")
    assert load_policy_tokenizer(str(tmp_path / "chat"), {}, BRACKETS).chat_template == CHATML
    assert load_policy_tokenizer(str(tmp_path / "base"), {}, BRACKETS).chat_template == BRACKETS
    with pytest.raises(ConfigError, match="base', and neither it nor cdr_strong has a chat template"):
        load_policy_tokenizer(str(tmp_path / "base"), {}, None)
    with pytest.raises(ConfigError, match="none', whose tokenizer can't be loaded"):
        load_policy_tokenizer(str(tmp_path / "none"), {}, None)
