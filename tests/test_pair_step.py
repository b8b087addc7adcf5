"""The benchmark of a pair's step: equal losses on equal rows, and no more memory than TRL's own trainers take."""

import pytest

from trl_cdr.bench import pair_step, workloads

pytestmark = [
    pytest.mark.compat,
    # TRL's configs set gradient_checkpointing, which transformers 5 renamed; drop when TRL follows
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is deprecated:FutureWarning"),
]
SMALL = {
    "vocab_size": 8192,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ours_takes_no_more_memory_than_trls(dtype, monkeypatch, capsys):
    monkeypatch.setitem(workloads.MODELS, "small", SMALL)
    monkeypatch.setattr("trl_cdr.training.losses._LOGITS_PER_CHUNK", 2**17)  # as small beside these logits
    found = pair_step.run_pair_step("small", None, dtype=dtype, attention="sdpa", runs=1)
    simpo, cpo, ours, dpo = found["cases"]
    assert [case["label"].split(",")[0] for case in found["cases"]] == ["SimPO", "SimPO", "DPO", "DPO"]
    for mine, trls in ((simpo, cpo), (ours, dpo)):
        assert mine["loss"] == pytest.approx(
            trls["loss"], abs=1e-5 if dtype == "float32" else 5e-2
        )  # TRL adds up in bfloat16
        assert 0 < mine["peak_mb"] < trls["peak_mb"]
    pair_step.print_pair_step(found)
    printed = capsys.readouterr().out
    assert f"{simpo['peak_mb']:,.0f}" in printed
    assert "TRL's CPOTrainer" in printed
