"""What a policy converges to: weights that turn one model's samples into another's, and a run that goes there."""

import json
import math

import pytest
import torch

from trl_cdr.cli import main
from trl_cdr.demo import models, optimum, world
from trl_cdr.demo.gaming import make_settings


def test_weights_give_the_optimum_of_a_world_that_can_be_counted():
    """One prompt, three completions: everything is a sum of three terms."""
    reference, strong, weak = (torch.tensor(p) for p in ([0.5, 0.3, 0.2], [0.7, 0.2, 0.1], [0.4, 0.2, 0.4]))
    samples = torch.tensor([0] * 50 + [1] * 30 + [2] * 20)  # as often as the reference says
    log_ratio = (strong / weak).log()[samples][None]
    for beta in (2.0, 1.0, 0.5, 0.1):
        expected = reference * (strong / weak) ** (1 / beta)
        weights = optimum.weigh(log_ratio, beta=beta)[0]
        shares = torch.stack([weights[samples == one].sum() for one in range(3)])
        assert torch.allclose(shares, expected / expected.sum(), atol=1e-5)


def test_each_prompt_has_its_own_weights():
    log_ratio = torch.tensor([[0.0, 1.0], [50.0, 50.0]])
    assert torch.allclose(optimum.weigh(log_ratio, beta=1.0).sum(dim=1), torch.ones(2))
    assert torch.equal(optimum.weigh(log_ratio, beta=math.inf), torch.full((2, 2), 0.5))


def test_effective_samples():
    weights = torch.tensor([[0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0]])
    assert optimum.effective(weights).tolist() == [4.0, 1.0, 2.0]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Folders of a model of a few steps, and of the same model after a few more on brief completions alone."""

    def draw(rng):
        return world.draw_row(rng, share_right=0.5)

    def draw_brief(rng):
        return next(row for row in iter(lambda: draw(rng), None) if len(row[1].split()) <= 9)

    folder, tokenizer, model = tmp_path_factory.mktemp("pair"), models.build_tokenizer(), models._new_model(0)
    for recipe in (
        models.Recipe("weak", draw, 60, 1e-2, seed=0),
        models.Recipe("strong", draw_brief, 10, 3e-3, seed=0),
    ):
        with models.one_thread(), models.quiet():
            models._train(model, tokenizer, recipe=recipe, advance=lambda: None)
            model.save_pretrained(folder / recipe.name)
        tokenizer.save_pretrained(folder / recipe.name)
    return {"strong": folder / "strong", "weak": folder / "weak"}


def words(samples):
    return torch.tensor([[float(len(one.text.split())) for one in group] for group in samples.groups])


def test_at_beta_1_the_weak_models_samples_become_the_strong_models(pair, monkeypatch):
    monkeypatch.setattr(world, "HELD_OUT", world.HELD_OUT[::30])
    weak, strong = (optimum.draw(pair[name], per_prompt=100, seed=seed) for name, seed in (("weak", 0), ("strong", 1)))
    weights = optimum.weigh(weak.log_ratio(**pair), beta=1.0)
    weighted = (weights * words(weak)).sum(dim=1).mean()
    assert words(weak).mean() > words(strong).mean() + 2
    assert weighted.item() == pytest.approx(words(strong).mean().item(), abs=0.7)
    assert 10 < optimum.effective(weights).mean() < 90


RESULT = {
    "weighted": {
        "weak": {"inf": {"gold": 0.51, "effective": 256.0, "fewest": 256.0}},
        "policy": {"inf": {"gold": 0.5, "effective": 256.0, "fewest": 1.2}},
    },
    "strong": 0.8,
    "runs": [
        {"label": "RLOO", "start": "weak", "beta": 0.05, "seeds": [{"gold": 0.7, "log_ratio": 0.2, "kl": 0.4}] * 2},
    ],
    "steps": 128,
}


def test_the_tables(capsys, monkeypatch):
    monkeypatch.setattr(optimum, "run_optimum", lambda: RESULT)
    main(["bench", "--workload", "optimum"])
    assert capsys.readouterr().out.splitlines() == [
        "| beta | gold, from weak | effective samples (fewest) | gold, from policy | effective samples (fewest) |",
        "|---|---|---|---|---|",
        "| inf | 0.51 | 256 (256.0) | 0.50 | 256 (1.2) |",
        "",
        "The strong model's own samples: 0.80",
        "",
        "| trained for 128 steps | from | beta | gold | log-ratio | KL from the start | log-ratio - beta x KL |",
        "|---|---|---|---|---|---|---|",
        "| RLOO | weak | 0.05 | 0.70 0.70 | 0.20 0.20 | 0.40 0.40 | 0.18 0.18 |",
    ]
    main(["bench", "--workload", "optimum", "--json"])
    assert json.loads(capsys.readouterr().out) == RESULT


@pytest.mark.slow
def test_the_strong_model_is_what_the_weak_one_converges_to():
    """With beta 1 from the weak model: weighted samples agree with the strong model, and GRPO goes there."""
    with models.one_thread(), models.quiet():
        setting = make_settings()["dpo"]
        found = optimum.measure_weighted(setting, setting.weak, betas=(1.0, 0.1), per_prompt=64)
        before = -optimum.draw(setting.weak, per_prompt=16, seed=3).log_ratio(setting.strong, setting.weak).mean()
        strong = optimum.draw(setting.strong, per_prompt=16, seed=3).gold().mean()
        after = optimum.train(setting, optimum.RUNS[0], seed=0)
    assert found[1.0]["gold"] == pytest.approx(strong.item(), abs=0.05)
    assert found[1.0]["gold"] > found[math.inf]["gold"] + 0.2
    assert found[0.1]["gold"] < found[1.0]["gold"] - 0.05  # extrapolated, the optimum is gamed
    assert after["kl"] - after["log_ratio"] < 0.5 * before  # nats from the strong model
    assert after["gold"] > found[math.inf]["gold"] + 0.15
