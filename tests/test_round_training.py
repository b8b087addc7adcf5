"""What a round's training reads and writes beside TRL's trainer; what it trains is in `test_rounds`."""

import errno
import json

import pytest
from datasets import Dataset
from tiny import BRACKETS, CHATML, answer, byte_tokenizer, chat

from trl_cdr import ConfigError
from trl_cdr.rounds.round_training import (
    PAIRS,
    check_saved,
    leave_out_long,
    load_pairs,
    load_policy_tokenizer,
    on_a_full_disk,
    read_log,
)


def test_the_log(tmp_path):
    (tmp_path / "training").mkdir()
    history = [{"loss": 1.0, "rewards/accuracies": 0.5}, {"loss": 0.5, "rewards/accuracies": 0.75}]

    def read(*entries):
        state = {"global_step": 4, "log_history": [*entries, {"train_loss": 0.125}]}  # of a resumed run: of its rest
        (tmp_path / "training" / "trainer_state.json").write_text(json.dumps(state))
        return read_log(tmp_path)

    nothing = dict.fromkeys(("accuracy", "eval_loss", "eval_accuracy"))
    assert read(*history) == {**nothing, "steps": 4, "loss": 0.75, "accuracy": 0.75}
    assert read() == {**nothing, "steps": 4, "loss": None}
    found = read(*history, *({"eval_loss": loss, "eval_rewards/accuracies": loss / 2} for loss in (0.5, 0.25)))
    assert (found["eval_loss"], found["eval_accuracy"]) == (0.25, 0.125)
    (tmp_path / "training" / "trainer_state.json").unlink()  # by somebody who needed the room
    assert read_log(tmp_path) == {**nothing, "steps": None, "loss": None}


def test_pairs_with_the_template_s_variables(tmp_path):
    row = {"prompt": chat("hello"), "chosen": answer("a"), "rejected": answer("b"), "margin": 1.0}
    folder = tmp_path / "runs[1]"  # no pattern of names
    for number, rows in enumerate(([row], [row] * 2)):
        (folder / PAIRS / "data").mkdir(parents=True, exist_ok=True)
        Dataset.from_list(rows).to_parquet(folder / PAIRS / "data" / f"train-{number:06d}.parquet")
    assert load_pairs(folder, PAIRS).column_names == ["prompt", "chosen", "rejected"]
    given = {"enable_thinking": False}
    assert len(load_pairs(folder, PAIRS)) == 3
    assert load_pairs(folder, PAIRS, given)[2] == {
        "prompt": chat("hello"),
        "chosen": answer("a"),
        "rejected": answer("b"),
        "chat_template_kwargs": given,
    }


def test_pairs_that_would_be_cut_are_left_out(capsys):
    tokenizer = byte_tokenizer(template=CHATML)
    texts = ["a", "hello world", "the quick brown fox jumps over a lazy dog"]
    rows = Dataset.from_list([{"prompt": chat("b"), "chosen": answer(text), "rejected": answer("c")} for text in texts])
    lengths = [
        len(tokenizer.apply_chat_template(chat("b") + answer(text), return_dict=True).input_ids) for text in texts
    ]
    assert len(leave_out_long(rows, tokenizer, None)) == 3
    assert len(leave_out_long(rows, tokenizer, lengths[2] + 2)) == 3
    assert "left out" not in capsys.readouterr().err
    kept = leave_out_long(rows, tokenizer, lengths[2] + 1)  # with what TRL puts around it, one too many
    assert kept["chosen"][:] == rows["chosen"][:2]
    assert f"1 of 3 pairs are longer than max_length ({lengths[2] + 1}) and left out" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="max_length is 3 tokens of a prompt and its completion, and all of 3 pairs"):
        leave_out_long(rows, tokenizer, 3)


def test_a_policy_without_weights_is_none(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="saved no weights .* fsdp_state_dict_type: FULL_STATE_DICT"):
        check_saved(tmp_path)
    (tmp_path / "model-00001-of-00002.safetensors").write_text("")
    check_saved(tmp_path)


def test_other_trouble_than_the_disk_s_is_not_called_so(tmp_path):
    with pytest.raises(ConnectionError, match="nobody there"), on_a_full_disk(tmp_path):
        raise ConnectionError("nobody there")
    with pytest.raises(ConfigError, match="can't be written"), on_a_full_disk(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_tokenizer_with_a_template(tmp_path):
    byte_tokenizer(template=CHATML).save_pretrained(tmp_path / "chat")
    byte_tokenizer(template=None).save_pretrained(tmp_path / "base")
    assert load_policy_tokenizer(str(tmp_path / "chat"), {}, BRACKETS).chat_template == CHATML
    assert load_policy_tokenizer(str(tmp_path / "base"), {}, BRACKETS).chat_template == BRACKETS
    with pytest.raises(ConfigError, match="base', and neither it nor cdr_strong has a chat template"):
        load_policy_tokenizer(str(tmp_path / "base"), {}, None)
    with pytest.raises(ConfigError, match="none', whose tokenizer can't be loaded"):
        load_policy_tokenizer(str(tmp_path / "none"), {}, None)
