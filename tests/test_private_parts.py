"""Every private part of another library that `_compat` touches is there, and means what it is taken for.

A test that fails here names what a new version has changed. Each runs on every supported version.
"""

import inspect
from importlib import import_module
from importlib.metadata import version

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from datasets import Dataset
from families import V, build_family
from packaging.version import Version
from tiny import TRAINING, llama
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from trl_cdr import ConfigError, OnlinePreferenceConfig, OnlinePreferenceTrainer, _compat
from trl_cdr.scoring.tree_attention import TreeAttention

pytestmark = pytest.mark.compat
TRL = Version(version("trl")).release
TRAINERS = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}


def length(completions, **_):
    return [float(len(each)) for each in completions]


# TRL's configs set gradient_checkpointing, which transformers 5 renamed; drop when TRL follows
def make(kind, config, folder, policy, *, reward=length, **options):
    options = {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 4, **options}
    args = config(str(folder), beta=0.0, max_steps=1, save_strategy="no", **options, **TRAINING)
    return kind(policy, reward, args, train_dataset=Dataset.from_dict({"prompt": ["hello"] * 4}))


checkpointing = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is deprecated:FutureWarning")


@pytest.mark.parametrize("module", _compat.IMPORTS)
def test_imports_below_the_top_level(module):
    missing = [name for name in _compat.IMPORTS[module] if not hasattr(import_module(module), name)]
    assert missing == []


def test_transformers_attention_implementation():
    model = llama(V)
    assert _compat.attention_implementation(model.config) == "sdpa"
    model.set_attn_implementation("eager")
    assert _compat.attention_implementation(model.config) == "eager"


@pytest.mark.filterwarnings("ignore:The `sliding_window_pattern` attribute is deprecated:FutureWarning")
def test_transformers_recurrent_state():
    assert _compat.keeps_recurrent_state(build_family("Mamba"))
    assert not _compat.keeps_recurrent_state(llama(V))


def test_transformers_logits_to_keep():
    with torch.no_grad():
        assert llama(V)(torch.tensor([[1, 2, 3]]), logits_to_keep=2).logits.shape == (1, 2, V)


MEMORY = {
    "torch": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB."),
    "kernel": RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    "cublas": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "host": RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    "python": MemoryError(),
}


@pytest.mark.parametrize("name", MEMORY)
def test_accelerate_out_of_memory(name):
    assert _compat.is_out_of_memory(MEMORY[name])


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes do not match"), RuntimeError(3), TypeError("memory"), KeyError(1)]
)
def test_other_errors_are_no_lack_of_memory(error):
    assert not _compat.is_out_of_memory(error)


def test_transformers_deepspeed_config():
    from transformers.integrations import deepspeed

    held = deepspeed._hf_deepspeed_config_weak_ref
    marker = lambda: None  # noqa: E731 - anything that is called as a weak reference is
    deepspeed._hf_deepspeed_config_weak_ref = marker
    try:
        with _compat.without_deepspeed():
            assert not deepspeed.is_deepspeed_zero3_enabled()
            assert deepspeed._hf_deepspeed_config_weak_ref is not marker
        assert deepspeed._hf_deepspeed_config_weak_ref is marker
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = held


def test_accelerate_hook():
    module = torch.nn.Linear(2, 2)
    assert not _compat.is_dispatched(module)
    add_hook_to_module(module, ModelHook())
    assert _compat.is_dispatched(module)


def test_torch_hooks_and_children():
    module = torch.nn.Sequential(torch.nn.Linear(2, 2))
    assert _compat.children(module) == {"0": module[0]}
    inputs = torch.ones(1, 2)
    expected = module[0](inputs)
    module[0].register_forward_hook(lambda module, args, output: output * 2)
    module[0].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    module[0].forward = lambda inputs: inputs
    assert not torch.equal(module[0](inputs), expected)
    _compat.clear_hooks(module[0])
    assert torch.equal(module[0](inputs), expected)


def test_torch_cpu_attention():
    """Without it packs on a CPU are computed under their mask: right, and up to twice as slow."""
    query = torch.randn(1, 2, 3, 4)
    output, log_sum = _compat.cpu_attention()(query, query, query, is_causal=True)
    expected = torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)
    torch.testing.assert_close(output, expected)
    assert log_sum.shape == (1, 2, 3)
    assert TreeAttention.suits(torch.device("cpu"), torch.float32)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft 0.21 reads it
def test_peft_layers():
    import peft

    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(llama(V), config).get_base_model()
    layer = adapted.model.layers[0].self_attn.q_proj
    assert type(_compat.without_peft(layer)) is torch.nn.Linear
    assert type(_compat.without_peft(adapted.lm_head)) is torch.nn.Linear
    assert _compat.without_peft(adapted.model.norm) is adapted.model.norm
    assert not _compat.is_merged(layer)
    layer.merge()
    assert _compat.is_merged(layer)


def test_trl_methods_of_grpo():
    _compat.check_grpo(GRPOTrainer)
    assert callable(_compat.use_adapter())
    assert (_compat.fused_head() is not None) == (TRL >= (1, 15))


@checkpointing
def test_trl_attributes_of_grpo(tmp_path, quick, monkeypatch):
    trainer = make(OnlinePreferenceTrainer, OnlinePreferenceConfig, tmp_path, quick)
    _compat.check_grpo_attributes(trainer)
    missing = (*_compat._GRPO_ATTRIBUTES, "from_a_later_version")
    monkeypatch.setattr(_compat, "_GRPO_ATTRIBUTES", missing)
    with pytest.raises(ConfigError, match=r"GRPOTrainer has no attribute from_a_later_version. Install a version"):
        make(OnlinePreferenceTrainer, OnlinePreferenceConfig, tmp_path, quick)


@checkpointing
@pytest.mark.parametrize("name", TRAINERS)
def test_trl_calls_a_reward(name, tmp_path, quick):
    """A bound `log_metric` leads to the trainer, which tells its ends, its rewards, and if it skips rows."""
    owners = []

    def reward(completions, log_metric, **_):
        owners.append(_compat.trainer_behind(log_metric))
        return length(completions)

    trainer = make(*TRAINERS[name], tmp_path, quick, reward=reward)
    trainer.train()
    assert set(owners) == {trainer}
    assert _compat.reward_functions(trainer) == [reward]
    assert _compat.skips_missing_rewards(trainer) == (TRL >= (1, 6))
    assert _compat.end_tokens(trainer) >= {trainer.processing_class.eos_token_id}
    assert bool(_compat.generation_ends(trainer)) == (TRL >= (1, 14, 2))
    batch = next(iter(trainer.get_train_dataloader()))
    prepared = _compat.prepare_inputs(trainer, batch)
    assert {"prompt_ids", "completion_ids"} <= prepared.keys()
    assert prepared["completion_ids"].shape[0] == 4


def test_trl_rewards_are_made_where_it_is_looked_for():
    """`skips_missing_rewards` knows GRPO's and RLOO's own classes by the module of the method."""
    for trainer, _ in TRAINERS.values():
        assert "_generate_and_score_completions" in vars(trainer)
        assert trainer.__module__ in ("trl.trainer.grpo_trainer", "trl.trainer.rloo_trainer")


@checkpointing
def test_trl_name_of_online_dpo(tmp_path):
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    assert _compat.is_online_dpo(OnlineDPOConfig(str(tmp_path), **TRAINING))
    assert not _compat.is_online_dpo(GRPOConfig(str(tmp_path), **TRAINING))
    assert not _compat.skips_missing_rewards(OnlineDPOTrainer.__new__(OnlineDPOTrainer))


def test_transformers_trainer_end():
    """`end_training` calls what transformers 5.18 brought."""
    from transformers import Trainer

    assert hasattr(Trainer, "end") == (Version(version("transformers")).release >= (5, 18))
    assert "args" in inspect.signature(TrainerCallback.on_train_begin).parameters


def test_trl_judges(monkeypatch):
    class Judge:
        def judge(self, prompts, completions, shuffle_order=True):
            return [0] * len(prompts)

    _compat.register_pairwise_judge(Judge)
    if TRL < (1, 1):
        from trl.experimental.judges import BasePairwiseJudge

        assert issubclass(Judge, BasePairwiseJudge)
