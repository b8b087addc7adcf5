"""Processes that score together: the same scores, steps and errors as one process has, wherever the pair is."""

import math
from itertools import chain

import pytest
import torch
from ranks import Run, launch
from tiny import llama

from trl_cdr import CDRReward, DensityRatioScorer, ModelError
from trl_cdr.scoring.together import load_together, score_together

TRAINERS = ("online_dpo", "grpo", "online_preference")
NODE = (4, "node", ("online_dpo", "grpo"))


def test_one_process_has_nobody_to_wait_for(checkpoints):
    """With either way to hold the pair; and it is not loaded before there is something to score."""
    plain = DensityRatioScorer(**checkpoints).score(["a", "b"], ["c", "d"], in_trainer=True)
    for replicas in ("rank", "node"):
        scorer = DensityRatioScorer(**checkpoints, replicas=replicas)
        assert score_together(scorer, [], []) == []
        assert scorer._source._pair is None
        assert score_together(scorer, ["a", "b"], ["c", "d"]) == plain
        assert scorer.ranks.node is None
        scorer.unload()
        load_together(scorer)
        assert scorer._source._pair is not None


def test_an_error_is_its_own(checkpoints):
    with pytest.raises(ModelError, match=r"^weak_tokenizer can't be loaded from '/nowhere'"):
        load_together(DensityRatioScorer(checkpoints["strong"], "/nowhere"))


@pytest.fixture(scope="module")
def launched(checkpoints, tokenizer, tmp_path_factory):
    """What four processes score; and three steps of each trainer as one, two and four, and as four of which two hold
    a pair."""
    folder, other = (str(tmp_path_factory.mktemp(name)) for name in ("policy", "other"))
    policy = llama(len(tokenizer), seed=2, eos_token_id=tokenizer.eos_token_id)
    with torch.no_grad():
        policy.lm_head.weight[tokenizer.eos_token_id] *= 2  # completions of many lengths
    policy.save_pretrained(folder)
    llama(len(tokenizer), seed=7).save_pretrained(other)
    for each in (folder, other):
        tokenizer.save_pretrained(each)
    pair = [checkpoints["strong"], checkpoints["weak"]]
    runs = {"scores": Run("ranks_scores.py", [*pair, other], processes=4, nodes=2)}
    for processes, replicas, names in ((1, "rank", TRAINERS), (2, "rank", TRAINERS), (4, "rank", TRAINERS), NODE):
        arguments = [*pair, folder, str(tmp_path_factory.mktemp("out")), replicas, *names]
        nodes = 2 if processes == 4 else 1
        runs[processes, replicas] = Run("ranks_train.py", arguments, processes=processes, nodes=nodes)
    return dict(zip(runs, launch(*runs.values()), strict=True))


@pytest.mark.slow
def test_four_processes(launched, checkpoints):
    """On two machines, under FSDP's RAM-efficient loading: what they score, and what fails on all of them."""
    ranks = launched["scores"]
    prompts = [f"prompt {number // 4}" for number in range(10)]
    completions = [f"hello {'world ' * number}" for number in range(10)]
    reward = CDRReward(**checkpoints)
    expected = [score.value for score in reward.scorer.score(prompts, completions, in_trainer=True)]
    for replicas in ("rank", "node"):
        assert [len(rank[replicas]["scores"]) for rank in ranks] == [3, 0, 6, 1]
        scores = list(chain.from_iterable(rank[replicas]["scores"] for rank in ranks))
        assert [score.value for score in scores] == pytest.approx(expected, abs=1e-4)
        paid = list(chain.from_iterable(rank[replicas]["paid"] for rank in ranks))
        assert all(map(math.isfinite, paid))
    assert [rank["rank"]["holds"] for rank in ranks] == [True] * 4
    assert [rank["node"]["holds"] for rank in ranks] == [True, False, True, False]
    assert ranks[1]["env"] == "true"  # the policy's loading is its own matter
    for number in (0, 2):
        assert ranks[number]["alone"] is None
        kind, said = ranks[number + 1]["alone"]
        assert kind == "ConfigError"
        assert f"this process (rank {number + 1}) holds no pair" in said
    told = [rank["uneven"] for rank in ranks]
    assert told[2:] == [None, None]
    assert [kind for kind, _ in told[:2]] == ["InputError", "InputError"]
    assert told[0][1] == f"rank 1: {told[1][1]}"
    for name, text in (("unpicklable", "pickle"), ("work", "IndexError")):
        told = [rank[name] for rank in ranks]
        assert told[:2] == [None, None]
        assert told[3][0] == "RuntimeError"
        assert told[3][1].startswith("rank 2: ")
        assert text in told[3][1]
    assert [rank["after"] for rank in ranks] == [rank["node"]["scores"] for rank in ranks]
    for rank in ranks:
        assert rank["differs"][0] == "ModelError"
        assert "has other weights on rank 3 than on ranks 0, 1, 2" in rank["differs"][1]
        assert "Its files differ" in rank["differs"][1]
        assert rank["nowhere"][0] == "ModelError"
        assert "from '/nowhere'" in rank["nowhere"][1]
        assert "on ranks 1, 3 than on ranks 0, 2" in rank["objects"][1]
        assert "passed as an object" in rank["objects"][1]
        for name in ("fsdp1", "fsdp2"):
            assert rank[name][0] == "ModelError"
            assert "strong is spread over processes" in rank[name][1]
        assert rank["places"][0] == "ConfigError"
    assert [rank["nowhere"][1].startswith("rank 2: ") for rank in ranks] == [True, True, False, True]


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINERS)
def test_a_run_is_the_same_on_any_number_of_processes(name, launched):
    """The same completions get the same rewards, and the policy learns the same."""
    [one] = launched[1, "rank"]
    assert one[name]["moved"] > 1e-3
    missing = list(chain.from_iterable(one[name]["unscorable"]))
    assert (0 < sum(missing) < len(missing)) is (name == "grpo")
    runs = [run for run in launched if run != "scores" and name in launched[run][0]]
    assert len(runs) == 3 + (name in NODE[2])
    for processes, replicas in runs:
        found = [rank[name] for rank in launched[processes, replicas]]
        assert [each["processes"] for each in found] == [processes] * processes
        held = [True, False] * 2 if replicas == "node" else [True] * processes
        assert [each["holds"] for each in found] == held
        assert found[0]["record"]
        assert found[0]["losses"] == pytest.approx(one[name]["losses"], abs=1e-4)
        for step, call in enumerate(one[name]["calls"]):
            rows = sorted(chain.from_iterable(each["calls"][step] for each in found))
            assert [said for said, _ in rows] == [said for said, _ in sorted(call)]
            assert [paid for _, paid in rows] == pytest.approx([paid for _, paid in sorted(call)], abs=1e-4)
        for key, weight in one[name]["weights"].items():
            torch.testing.assert_close(found[0]["weights"][key], weight, rtol=0, atol=1e-5)
