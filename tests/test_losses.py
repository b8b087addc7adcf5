"""The preference losses by hand, and beside TRL's own loss code on the same pairs."""

import math

import pytest
import torch
from datasets import Dataset
from oracle import completion_logps
from tiny import llama
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer

from trl_cdr.bench.measure import MB, measure
from trl_cdr.training import losses
from trl_cdr.training.losses import dpo_loss, gather_logps, ipo_loss, simpo_loss

pytestmark = [
    pytest.mark.compat,
    # TRL's configs set gradient_checkpointing, which transformers 5 renamed; drop when TRL follows
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is deprecated:FutureWarning"),
]
PAIRS = [("hello", "world", "fox"), ("what is this", "the quick brown fox", "a"), ("a", "that", "lazy dog over this")]
COMMON = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none", "max_length": None}
COMMON |= {"per_device_train_batch_size": len(PAIRS), "disable_tqdm": True}


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_by_hand():
    chosen, rejected = torch.tensor([-0.5, -1.0]), torch.tensor([-1.5, -0.5])
    found = simpo_loss(chosen, rejected, beta=2.0, gamma=0.5)
    assert found.tolist() == pytest.approx([-math.log(sigmoid(1.5)), -math.log(sigmoid(-1.5))])
    smooth = simpo_loss(chosen, rejected, beta=2.0, gamma=0.5, label_smoothing=0.1)
    turned = [-math.log(sigmoid(-1.5)), -math.log(sigmoid(1.5))]
    mixed = [0.9 * right + 0.1 * wrong for right, wrong in zip(found.tolist(), turned, strict=True)]
    assert smooth.tolist() == pytest.approx(mixed)

    reference = {"ref_chosen_logps": torch.tensor([-4.0]), "ref_rejected_logps": torch.tensor([-5.0])}
    logps = torch.tensor([-3.0]), torch.tensor([-7.0])  # one nat up, two down
    assert dpo_loss(*logps, **reference, beta=0.5).item() == pytest.approx(-math.log(sigmoid(1.5)))
    assert ipo_loss(*logps, **reference, beta=0.5).item() == pytest.approx((3 - 1) ** 2)


def test_what_a_policy_that_is_its_reference_pays():
    logps = {name: torch.tensor([-3.0, -4.0]) for name in ("ref_chosen_logps", "ref_rejected_logps")}
    assert dpo_loss(*logps.values(), **logps, beta=0.1).tolist() == pytest.approx([math.log(2)] * 2)
    assert ipo_loss(*logps.values(), **logps, beta=0.1).tolist() == pytest.approx([25.0] * 2)


def naive(logits, ids):
    """Log-probabilities and entropies in float64, with gradients."""
    scores = logits[:, : ids.shape[1]].double().log_softmax(-1)
    terms = torch.where(scores.isfinite(), scores.exp() * scores, 0)
    return scores.gather(2, ids[..., None])[..., 0], -terms.sum(-1)


@pytest.mark.parametrize("chunk", [1, 30, 2**23])  # logits: one position at a time, two, all
@pytest.mark.parametrize("shape", [(1, 1, 2), (3, 5, 11), (2, 7, 13)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logps_of_tokens(dtype, shape, chunk, monkeypatch):
    """Values, entropies and gradients are the naive ones; what follows the last token has no part in them."""
    monkeypatch.setattr(losses, "_LOGITS_PER_CHUNK", chunk)
    rows, length, vocabulary = shape
    draw = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(rows, length + 1, vocabulary, generator=draw)).to(dtype)
    ids = torch.randint(vocabulary, (rows, length), generator=draw)
    logits[0, 0, (ids[0, 0] + 1) % vocabulary] = -torch.inf  # as a model that masks part of its vocabulary
    weights = torch.randn(rows, length, generator=draw)
    before, leaves = logits.clone(), [logits.requires_grad_(), logits.detach().double().requires_grad_()]
    found, (expected, entropies) = gather_logps(leaves[0], ids), naive(leaves[1], ids)
    assert torch.equal(logits, before)
    assert found.logps.dtype == torch.float32
    assert not found.entropies.requires_grad
    torch.testing.assert_close(found.logps.double(), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(found.entropies.double(), entropies.detach(), rtol=0, atol=1e-4)
    (found.logps * weights).sum().backward()
    (expected * weights).sum().backward()
    gradient = leaves[0].grad
    assert gradient.dtype == dtype
    assert not gradient[:, length].any()
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(gradient.double(), leaves[1].grad, rtol=tolerance, atol=tolerance)


def test_no_float32_copy_of_the_logits_is_kept(monkeypatch):
    """Forward and backward together take one gradient in the logits' own type, and a few chunks."""
    monkeypatch.setattr(losses, "_LOGITS_PER_CHUNK", 2**15)
    logits = torch.randn(2, 129, 4096).bfloat16().requires_grad_()
    ids = torch.randint(4096, (2, 128))

    def run():
        gather_logps(logits, ids).logps.sum().backward()

    own = logits.numel() * logits.element_size() / MB
    peak = measure({"run": run}, device="cpu", runs=0)["run"].peak_mb
    assert own < peak < 1.5 * own


@pytest.fixture
def pairs(tokenizer):
    """Prompt, chosen and rejected, ended as TRL's trainers end a string."""
    end = tokenizer.eos_token
    return Dataset.from_list(
        [{"prompt": prompt, "chosen": " " + good + end, "rejected": " " + bad + end} for prompt, good, bad in PAIRS]
    )


def sums_and_counts(model, input_ids, is_completion):
    """Summed log-probabilities (B,) and numbers of tokens (B,) of the completions, each row run on its own."""
    found = []
    for ids, marks in zip(input_ids.tolist(), is_completion.tolist(), strict=True):
        start, end = marks.index(True), len(marks) - marks[::-1].index(True)
        assert all(marks[start:end])
        found.append((completion_logps(model, ids[:start], ids[start:end]).sum().item(), end - start))
    sums, counts = zip(*found, strict=True)
    return torch.tensor(sums), torch.tensor(counts)


@pytest.mark.parametrize(("beta", "gamma", "smoothing"), [(2.0, 1.0, 0.0), (2.5, 0.75, 0.1)])
def test_simpo_is_trls(beta, gamma, smoothing, tmp_path, tokenizer, checkpoints, pairs):
    model = AutoModelForCausalLM.from_pretrained(checkpoints["weak"])
    options = {"loss_type": "simpo", "simpo_gamma": gamma, "beta": beta, "label_smoothing": smoothing, "cpo_alpha": 0.0}
    trainer = CPOTrainer(
        model, args=CPOConfig(str(tmp_path), **options, **COMMON), processing_class=tokenizer, train_dataset=pairs
    )
    [batch] = list(trainer.get_train_dataloader())
    expected, metrics = trainer.get_batch_loss_metrics(trainer.model, batch)
    means = {}
    for name in ("chosen", "rejected"):
        sums, counts = sums_and_counts(model, batch[f"{name}_input_ids"], batch[f"{name}_labels"] != -100)
        means[f"{name}_logps"] = sums / counts
    found = simpo_loss(**means, beta=beta, gamma=gamma, label_smoothing=smoothing)
    assert found.mean().item() == pytest.approx(expected.item(), abs=1e-5)
    assert means["chosen_logps"].mean().item() == pytest.approx(metrics["logps/chosen"], abs=1e-5)


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_dpo_and_ipo_are_trls(loss, tmp_path, tokenizer, checkpoints, pairs):
    model = AutoModelForCausalLM.from_pretrained(checkpoints["weak"])
    reference = llama(len(tokenizer), seed=3)
    trainer = DPOTrainer(
        model,
        ref_model=reference,
        args=DPOConfig(str(tmp_path), loss_type=loss, beta=0.3, **COMMON),
        processing_class=tokenizer,
        train_dataset=pairs,
    )
    [batch] = list(trainer.get_train_dataloader())
    expected = trainer.compute_loss(trainer.model, batch).item()
    found = {}
    for name, scorer in (("", model), ("ref_", reference)):
        sums, counts = sums_and_counts(scorer, batch["input_ids"], batch["completion_mask"].bool())
        values = sums if loss == "sigmoid" else sums / counts
        found[f"{name}chosen_logps"], found[f"{name}rejected_logps"] = values.chunk(2)
    ours = dpo_loss(**found, beta=0.3) if loss == "sigmoid" else ipo_loss(**found, beta=0.3)
    assert ours.mean().item() == pytest.approx(expected, abs=1e-5)
