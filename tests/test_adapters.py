"""One base held once, adapters on it: the scores of merged, separate models, in the memory of one."""

import copy
import json
from pathlib import Path

import pytest
import torch
from lora import COMPLETIONS, CRITERIA, PROMPTS, adapt, save_adapter, save_merged
from safetensors.torch import load_file, save_file
from tiny import llama

from trl_cdr import ConfigError, DensityRatioScorer, ModelError
from trl_cdr.config import CDRConfig
from trl_cdr.scoring.adapters import view
from trl_cdr.scoring.causal_lm import CausalLM
from trl_cdr.scoring.memory import measured_bytes
from trl_cdr.scoring.sources import find_source

pytestmark = pytest.mark.compat


@pytest.fixture(scope="module")
def base(checkpoints):
    return checkpoints["strong"]


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    return save_adapter(tmp_path_factory.mktemp("adapter") / "a", base)


def per_token(scorer, **kwargs):
    """Log-probabilities of strong and of weak, per token, as far as a score tells them."""
    scores = scorer.score(PROMPTS, COMPLETIONS, **kwargs)
    assert all(score.error is None for score in scores)
    return [(s.strong_logps / s.n_tokens, s.weak_logps / s.n_tokens) for s in scores]


def assert_as_merged(base, folders, tokenizer, tmp_path, *, way="packed", **options):
    """Adapters on one base score as their merged models do, warm as cold, with criteria and without."""
    merged = {
        role: base if folder is None else save_merged(tmp_path / role, base, folder, tokenizer)
        for role, folder in folders.items()
    }
    given = {f"{role}_adapter": folder for role, folder in folders.items() if folder is not None}
    for criteria in (None, CRITERIA):
        more = {"criteria": criteria, "gate": "none", **options} if criteria else {"gate": "none", **options}
        ours, theirs = DensityRatioScorer(base, base, **given, **more), DensityRatioScorer(**merged, **more)
        expected = torch.tensor(per_token(theirs))
        cold, warm = torch.tensor(per_token(ours)), torch.tensor(per_token(ours))
        torch.testing.assert_close(cold, expected, rtol=0, atol=1e-5)
        assert torch.equal(cold, warm)
        pair = ours._source.get()
        assert pair.strong.lm.way()[0] == way
    assert float((expected[:, 0] - expected[:, 1]).abs().max()) > 0.1  # the adapter does something
    return pair


SLOW = pytest.mark.slow
KINDS = {
    "LoRA": {},
    "LoRA, rank 9": {"r": 9, "lora_alpha": 3},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "LoRA, ranks by pattern": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 5}},
    "LoRA on all linear layers": {"target_modules": "all-linear"},
    "LoRA on embeddings and head": {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "LoRA, norms trained": {"modules_to_save": ["norm", "input_layernorm"]},
    "LoRA, embeddings and head trained": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "LoHa": {"kind": "LoHaConfig", "scale": 0.3},
    "LoKr": {"kind": "LoKrConfig"},
    "IA3": {
        "kind": "IA3Config",
        "target_modules": ["k_proj", "v_proj", "down_proj"],
        "feedforward_modules": ["down_proj"],
    },
}


@pytest.mark.parametrize(
    "kind",
    [kind if kind in ("LoRA", "DoRA", "LoRA, norms trained") else pytest.param(kind, marks=SLOW) for kind in KINDS],
)
def test_an_adapter_on_its_base_scores_as_merged(kind, base, tokenizer, tmp_path):
    folder = save_adapter(tmp_path / "a", base, **KINDS[kind])
    pair = assert_as_merged(base, {"strong": folder, "weak": None}, tokenizer, tmp_path)
    own = sum(p.numel() for p in pair.strong.lm.model.parameters()) - sum(p.numel() for p in llama(322).parameters())
    assert own > 0
    held = measured_bytes(pair.strong.lm.model, pair.weak.lm.model)
    assert held - measured_bytes(pair.weak.lm.model) == 4 * own


@pytest.mark.parametrize("which", ["two adapters", "on the weak one"])
def test_either_model_may_have_an_adapter(which, base, adapter, tokenizer, tmp_path):
    other = save_adapter(tmp_path / "b", base, seed=1, r=2, target_modules=["q_proj", "down_proj"])
    folders = {"strong": adapter if which == "two adapters" else None, "weak": other}
    assert_as_merged(base, folders, tokenizer, tmp_path)


def test_the_padded_way_has_the_adapter_too(base, adapter, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("trl_cdr.scoring.packed.VERIFIED", frozenset())
    assert_as_merged(base, {"strong": adapter, "weak": None}, tokenizer, tmp_path, way="padded")


def test_a_base_is_loaded_once_and_never_changed(base, adapter, monkeypatch):
    from trl_cdr.scoring import causal_lm

    loaded = []
    load = causal_lm.load_model
    monkeypatch.setattr(causal_lm, "load_model", lambda *args, **kw: loaded.append(load(*args, **kw)) or loaded[-1])
    state = torch.random.get_rng_state()
    scorer = DensityRatioScorer(base, base, strong_adapter=adapter)
    before = scorer.score(PROMPTS, COMPLETIONS)
    assert torch.equal(torch.random.get_rng_state(), state)
    [model] = loaded
    pair = scorer._source.get()
    assert pair.weak.lm.model is model
    theirs, ours = dict(model.named_parameters()), pair.strong.lm.model
    shared = {name.replace(".base_layer", ""): p for name, p in ours.named_parameters() if "lora_" not in name}
    assert shared.keys() == theirs.keys()
    assert all(shared[name] is theirs[name] for name in theirs)
    assert not any(p.requires_grad for each in (model, ours) for p in each.parameters())
    assert not any("lora" in name for name, _ in model.named_modules())
    for name, tensor in load_file(Path(base) / "model.safetensors").items():
        assert torch.equal(theirs[name], tensor)
    scorer.unload()
    assert scorer.score(PROMPTS, COMPLETIONS) == before


def test_a_base_in_8_bits_is_loaded_for_each(base, adapter, monkeypatch, caplog):
    """The modules that first run such weights keep the scales, which are on the weights for nobody else then."""
    from trl_cdr.scoring import causal_lm

    loaded = []
    load = causal_lm.load_model

    def load_8bit(*args, **kwargs):
        loaded.append(load(*args, **kwargs))
        loaded[-1].is_loaded_in_8bit = True
        return loaded[-1]

    plain = DensityRatioScorer(base, base, weak_adapter=adapter).score(PROMPTS, COMPLETIONS)
    monkeypatch.setattr(causal_lm, "load_model", load_8bit)
    assert DensityRatioScorer(base, base, weak_adapter=adapter).score(PROMPTS, COMPLETIONS) == plain
    one, other = loaded
    assert not {p.data_ptr() for p in one.parameters()} & {p.data_ptr() for p in other.parameters()}
    assert "weak stands on a base in 8 bits, which no two models can share" in caplog.text


def test_a_kept_prefix_belongs_to_an_adapter(base, adapter, tmp_path):
    """Both models have the same weights to the eye, and the same criteria before every prompt."""
    other = save_adapter(tmp_path / "b", base, seed=1)
    options = {"criteria": CRITERIA, "gate": "none"}
    both = DensityRatioScorer(base, base, strong_adapter=adapter, weak_adapter=other, **options)
    each = [DensityRatioScorer(base, base, strong_adapter=one, **options) for one in (adapter, other)]
    for _ in range(2):
        strong, weak = (torch.tensor(per_token(scorer))[:, 0] for scorer in each)
        assert torch.equal(torch.tensor(per_token(both)), torch.stack([strong, weak], dim=1))
    pair = both._source.get()
    kept = [member.lm._packed._kept._states for member in (pair.strong, pair.weak)]
    assert kept[0].keys() == kept[1].keys() != set()


def test_an_adapter_s_folder_is_a_model(base, adapter, tokenizer, tmp_path):
    """It names its base, and has the tokenizer that it was trained with, if one was saved."""
    named = DensityRatioScorer(base, base, strong_adapter=adapter).score(PROMPTS, COMPLETIONS)
    alone = DensityRatioScorer(adapter, base)
    assert alone.score(PROMPTS, COMPLETIONS) == named
    pair = alone._source.get()
    assert pair.strong.lm.base is pair.weak.lm.base
    described = alone.describe()
    assert described["strong"]["adapter"] == adapter
    assert described["strong"]["adapter_weights"].startswith("sha256 ")
    assert described["strong"]["name"] == described["weak"]["name"] == base
    assert described["weak"]["adapter"] is described["weak"]["adapter_weights"] is None
    ours = described["strong"]["weights_mb"] + described["weak"]["weights_mb"]
    assert described["weights_mb"] < 0.7 * ours  # the adapter of a model this tiny is large
    other = copy.deepcopy(tokenizer)
    other.chat_template = "{% for m in messages %}{{ m.content }}!{% endfor %}"
    other.save_pretrained(adapter + "/")
    try:
        [score] = DensityRatioScorer(adapter, base).score(PROMPTS[:1], COMPLETIONS[:1])
    finally:
        for path in Path(adapter).glob("*"):
            path.unlink() if not path.name.startswith("adapter") else None
    assert abs(score.strong_logps - named[0].strong_logps) > 0.1
    assert score.weak_logps == pytest.approx(named[0].weak_logps, abs=1e-4)


def test_the_weights_of_embeddings_that_peft_saves_along_are_the_base_s(base, tmp_path):
    folder = save_adapter(tmp_path / "a", base, target_modules=["embed_tokens", "q_proj"])
    path = tmp_path / "a" / "adapter_model.safetensors"
    weights = load_file(path)
    [name] = [name for name in weights if "embed_tokens" in name and "lora" not in name]
    CausalLM.load(base, "strong", adapter=found(base, folder))
    save_file(weights | {name: weights[name] + 1}, path)
    with pytest.raises(ModelError, match=f"{name} with other values than the base's"):
        CausalLM.load(base, "strong", adapter=found(base, folder))
    save_file(weights | {name: torch.cat([weights[name], weights[name][:4]])}, path)
    with pytest.raises(ModelError, match="the base's is .*its embeddings were resized. Merge"):
        CausalLM.load(base, "strong", adapter=found(base, folder))


def found(base, adapter):
    return find_source(CDRConfig(base, base, cdr_strong_adapter=adapter), "strong").adapter


@pytest.mark.parametrize("change", ["fewer layers", "more layers", "another width", "no such modules"])
def test_an_adapter_that_does_not_fit(change, base, tokenizer, tmp_path):
    config = {"fewer layers": {"num_hidden_layers": 1}, "more layers": {"num_hidden_layers": 3}}
    model = llama(len(tokenizer), **config.get(change, {"hidden_size": 64}))
    model.save_pretrained(tmp_path / "other")
    folder = save_adapter(tmp_path / "a", tmp_path / "other", names_base=False)
    message = {
        "fewer layers": r"it lacks 14 of the weights that the base has a place for \(.*layers.1.*\.\.\.\)",
        "more layers": r"it has 14 weights that the base has no place for \(.*layers.2.*\.\.\.\)",
        "another width": r"its .* has the shape \(.*\), and the base wants \(.*\)",
        "no such modules": "Target modules .* not found in the base model",
    }
    if change == "no such modules":
        edit(folder, target_modules=["c_attn"])
    with pytest.raises(ModelError, match=f"the adapter of strong .* does not fit its base: .*{message[change]}"):
        DensityRatioScorer(base, base, strong_adapter=folder).load()


def edit(folder, **config):
    path = Path(folder) / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


def test_what_would_change_the_base_is_seen(base, adapter, monkeypatch):
    """A net below the one in `sources`: a way to begin an adapter that nobody has heard of yet."""
    import peft

    begin = peft.PeftModel

    class Careless(begin):
        def __init__(self, model, *args, **kwargs):
            model.model.norm.weight.data.add_(1)
            super().__init__(model, *args, **kwargs)

    monkeypatch.setattr(peft, "PeftModel", Careless)
    with pytest.raises(ModelError, match="changes the weights of its base"):
        DensityRatioScorer(base, base, strong_adapter=adapter).load()


def test_without_peft_the_extra_is_named(base, adapter, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ConfigError, match=r"strong has the adapter .* Run: pip install 'trl-cdr\[peft\]'"):
        DensityRatioScorer(base, base, strong_adapter=adapter).load()
    DensityRatioScorer(base, base).load()


def test_an_adapter_is_not_put_on_a_model_that_the_caller_holds(strong, tokenizer, base, adapter):
    with pytest.raises(ConfigError, match="strong is a loaded LlamaForCausalLM, and strong_adapter is"):
        DensityRatioScorer(strong, base, strong_tokenizer=tokenizer, strong_adapter=adapter)


def test_a_view_is_apart_but_for_its_tensors(strong):
    strong.train()
    mine = view(strong)
    assert [id(p) for p in mine.parameters()] == [id(p) for p in strong.parameters()]
    assert not {id(m) for m in mine.modules()} & {id(m) for m in strong.modules()}
    assert mine.config is not strong.config
    mine.eval()
    assert strong.training
    assert measured_bytes(strong, mine) == measured_bytes(strong)
    strong.eval()


@pytest.mark.parametrize("kind", ["LoRA", "DoRA", "LoRA, embeddings and head trained", "IA3"])
def test_a_peft_model_that_the_caller_holds_is_packed(kind, base, tokenizer, weak):
    """It runs as it is, and through its own forward at load."""
    from transformers import AutoModelForCausalLM

    held = adapt(AutoModelForCausalLM.from_pretrained(base), **KINDS[kind])
    scorer = DensityRatioScorer(held, weak, strong_tokenizer=tokenizer, weak_tokenizer=tokenizer)
    cold = per_token(scorer)
    assert scorer._source.get().strong.lm.way() == ("packed", "")
    merged = copy.deepcopy(held).merge_and_unload()
    other = DensityRatioScorer(merged, weak, strong_tokenizer=tokenizer, weak_tokenizer=tokenizer)
    torch.testing.assert_close(torch.tensor(cold), torch.tensor(per_token(other)), rtol=0, atol=1e-5)
    with held.disable_adapter():
        bare = per_token(scorer)
    assert max(abs(x[0] - y[0]) for x, y in zip(bare, cold, strict=True)) > 0.1


def test_an_adapter_that_acts_through_its_prompt_runs_row_by_row(base, tokenizer, weak):
    """The base inside of it does not have it: the check at load finds out."""
    import peft
    from lora import _quiet
    from transformers import AutoModelForCausalLM

    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    held = _quiet(peft.get_peft_model, AutoModelForCausalLM.from_pretrained(base), config).eval()
    way, reason = CausalLM(held, "strong").way()
    assert way == "row by row"
    assert "differ" in reason or "fails" in reason
