"""The base of a policy as the pair's: what is shared, what is refused, and that nothing of the policy is touched."""

import gc
import json
import pickle
import shutil

import pytest
import torch
from lora import COMPLETIONS, CRITERIA, PROMPTS, adapt, save_adapter
from transformers import AutoModelForCausalLM

from trl_cdr import ConfigError, DensityRatioScorer, ModelError
from trl_cdr.scoring.memory import measured_bytes

# peft 0.21 reads what transformers 5 deprecates
pytestmark = [
    pytest.mark.compat,
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is deprecated:FutureWarning"),
]


@pytest.fixture(scope="module")
def base(checkpoints):
    return checkpoints["strong"]


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    return save_adapter(tmp_path_factory.mktemp("adapter") / "a", base)


def policy_of(base, **config):
    """A policy in training, as a trainer has it."""
    return adapt(AutoModelForCausalLM.from_pretrained(base), seed=7, **config).train()


def shared(policy, base, adapter, **options):
    scorer = DensityRatioScorer(base, base, strong_adapter=adapter, share_policy=True, **options)
    scorer.use_policy(policy)
    return scorer


POLICIES = {
    "LoRA": {},
    "DoRA": {"use_dora": True},
    "modules trained beside it": {"modules_to_save": ["embed_tokens", "lm_head", "norm"]},
    "on embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "IA3": {"kind": "IA3Config", "target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
}


@pytest.mark.parametrize("kind", POLICIES)
def test_a_pair_on_the_policy_s_base_is_the_pair(kind, base, adapter):
    """To the bit: the same weights in the same order, whatever the policy trains."""
    policy = policy_of(base, **POLICIES[kind])
    for options in ({}, {"criteria": CRITERIA}):
        scorer = shared(policy, base, adapter, **options)
        expected = DensityRatioScorer(base, base, strong_adapter=adapter, **options).score(PROMPTS, COMPLETIONS)
        assert scorer.score(PROMPTS, COMPLETIONS) == expected
        assert scorer.score(PROMPTS, COMPLETIONS) == expected
    pair = scorer._source.get()
    models = [pair.strong.lm.model, pair.weak.lm.model]
    own = sum(p.numel() * 4 for n, p in models[0].named_parameters() if "lora_" in n)
    assert measured_bytes(policy, *models) == measured_bytes(policy) + own
    assert scorer.describe()["weak"]["weights"].startswith("sha256 ")


def test_hooks_and_forwards_that_a_trainer_hung_on_the_policy_are_not_run(base, adapter):
    policy = policy_of(base)
    inner = policy.get_base_model()
    for module in inner.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = True
    inner.enable_input_require_grads()
    inner.model.layers[0].mlp.register_forward_hook(lambda *_: 1 / 0)
    inner.forward = lambda *args, **kwargs: 1 / 0
    expected = DensityRatioScorer(base, base, strong_adapter=adapter).score(PROMPTS, COMPLETIONS)
    assert shared(policy, base, adapter).score(PROMPTS, COMPLETIONS) == expected


@pytest.mark.parametrize("change", ["another rounding", "merged and out again"])
def test_a_prefix_of_other_weights_is_never_used(change, base, adapter):
    """Trainers merge the adapter into the base for vLLM, and take it out again: what is left is rounded."""
    policy = policy_of(base)
    scorer = shared(policy, base, adapter, criteria=CRITERIA)
    scorer.score(PROMPTS, COMPLETIONS)
    lm = scorer._source.get().weak.lm
    assert lm.keeps_prefixes
    assert scorer.score(PROMPTS, COMPLETIONS)
    assert lm.keeps_prefixes
    if change == "merged and out again":
        policy.merge_adapter()
        policy.unmerge_adapter()
    else:
        with torch.no_grad():
            policy.get_base_model().model.embed_tokens.weight.mul_(1.5)
    after = scorer.score(PROMPTS, COMPLETIONS)
    assert scorer._source.get().weak.lm is lm
    lm.drop_prefixes()
    assert scorer.score(PROMPTS, COMPLETIONS) == after


def test_another_policy_is_another_base(base, adapter, checkpoints, tmp_path):
    first, second = policy_of(base), policy_of(base)
    scorer = shared(first, base, adapter)
    expected = scorer.score(PROMPTS, COMPLETIONS)
    model = scorer._source.get().weak.lm.model
    scorer.use_policy(first)
    assert scorer._source.get().weak.lm.model is model
    scorer.use_policy(second)
    assert scorer.score(PROMPTS, COMPLETIONS) == expected
    assert scorer._source.get().weak.lm.model is not model
    scorer.unload()
    assert scorer.score(PROMPTS, COMPLETIONS) == expected
    del second
    gc.collect()
    with pytest.raises(ConfigError, match="no policy is known"):
        scorer.score(PROMPTS, COMPLETIONS)


def test_without_a_policy(base, adapter):
    scorer = shared(policy_of(base), base, adapter)
    for lonely in (DensityRatioScorer(base, base, strong_adapter=adapter, share_policy=True), scorer):
        with pytest.raises(ConfigError, match=r"no policy is known. Pass CDRCallback\(reward, trainer\).*attach"):
            pickle.loads(pickle.dumps(lonely)).load()


def test_policies_that_can_not_be_shared(base, adapter):
    def refuse(policy, message, error=ConfigError, **options):
        with pytest.raises(error, match=message):
            shared(policy, base, adapter, **options).load()

    refuse(AutoModelForCausalLM.from_pretrained(base), r"the policy \(LlamaForCausalLM\) has no adapter: its own")
    policy = policy_of(base)
    policy.get_base_model().model.norm.weight.requires_grad_(True)
    refuse(policy, r"the policy trains 1 weights of its base \(model.norm.weight, ...\)")
    policy = policy_of(base)
    policy.merge_adapter()
    refuse(policy, "the policy's adapter is merged into its base.*unmerge_adapter")
    policy = policy_of(base)
    refuse(policy, "cdr_dtype is 'bfloat16', and the policy's base is float32", dtype="bfloat16")
    refuse(policy, "cdr_device is 'meta', and the policy is on cpu", device="meta")
    arguments = {"attn_implementation": "eager"}
    refuse(policy, "cdr_model_init_kwargs has 'attn_implementation': the base is", model_init_kwargs=arguments)
    policy.get_base_model().is_quantized = True
    refuse(policy, "the policy's base is quantised")
    policy = policy_of(base)
    policy.get_base_model().model.norm.weight.data = torch.empty(0)  # as ZeRO-3 leaves it
    refuse(policy, r"the policy is spread over processes \(FSDP, ZeRO-3\)")


def test_a_policy_that_is_merged_during_training_is_seen(base, adapter):
    policy = policy_of(base)
    scorer = shared(policy, base, adapter)
    before = scorer.score(PROMPTS, COMPLETIONS)
    policy.merge_adapter()
    with pytest.raises(ConfigError, match="merged into its base"):
        scorer.score(PROMPTS, COMPLETIONS)
    policy.unmerge_adapter()
    after = scorer.score(PROMPTS, COMPLETIONS)
    assert [score.value for score in after] == pytest.approx([score.value for score in before], abs=1e-3)


def test_a_base_that_is_not_the_named_one(base, adapter, checkpoints, tmp_path):
    """Another revision, say: every weight differs, and one is enough."""
    policy = policy_of(checkpoints["weak"])
    with pytest.raises(ModelError, match=r"the policy's base is not .*: model.embed_tokens.weight has other values"):
        shared(policy, base, adapter).load()
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.model.norm.weight[3] += 1
    policy = adapt(model)
    with pytest.raises(ModelError, match=r"model.norm.weight has other values. Name the base that the policy"):
        shared(policy, base, adapter).load()
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(330, mean_resizing=False)
    policy = adapt(model)
    with pytest.raises(ModelError, match=r"has the shape \(330, 32\), and there \(322, 32\)"):
        shared(policy, base, adapter).load()
    scorer = DensityRatioScorer(base, checkpoints["weak"], share_policy=True)
    policy = policy_of(base)
    scorer.use_policy(policy)
    with pytest.raises(ConfigError, match=r"strong and weak have two bases"):
        scorer.load()


def test_a_policy_in_another_type_has_the_checkpoint_s_weights(base, adapter):
    policy = adapt(AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16))
    scorer = shared(policy, base, adapter)
    assert scorer.describe()["weak"]["dtype"] == "bfloat16"
    expected = DensityRatioScorer(base, base, strong_adapter=adapter, dtype="bfloat16").score(PROMPTS, COMPLETIONS)
    assert scorer.score(PROMPTS, COMPLETIONS) == expected


def test_a_checkpoint_without_the_weights_here(base, adapter, tmp_path):
    """The policy came from elsewhere, and of the base nothing but its config is on this machine."""
    bare = tmp_path / "base"
    shutil.copytree(base, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    scorer = DensityRatioScorer(str(bare), str(bare), share_policy=True)
    policy = policy_of(base)
    scorer.use_policy(policy)
    with pytest.raises(ModelError, match=r"of [\d,]+ numbers 0 can be found under their names in"):
        scorer.load()
    assert json.loads((bare / "config.json").read_text())["model_type"] == "llama"


def test_a_model_that_the_caller_holds_is_no_pair_on_the_policy(strong, tokenizer, base):
    with pytest.raises(ConfigError, match="strong is a loaded LlamaForCausalLM, and share_policy is set"):
        DensityRatioScorer(strong, base, strong_tokenizer=tokenizer, share_policy=True)
