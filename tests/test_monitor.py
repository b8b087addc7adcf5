"""The rule that tells a policy that games its reward, on series that were made up; test_demo_alarms has real ones."""

import json
import random

import pytest

from trl_cdr.training.monitor import Monitor, names_in, read_entry


def entry(step, cost, gain, *, tokens=10.0, name="cdr"):
    """A log of completions that cost the strong model so much and gain so much, nats a token."""
    logps = {"strong_logps": -cost * tokens, "weak_logps": -(cost + gain) * tokens, "tokens": tokens}
    metrics = {"strong_logps_per_token": -cost, **logps}
    return {"step": step, "loss": 0.5, **{f"{name}/{key}": value for key, value in metrics.items()}}


def history(cost, gain, *, logs=100, noise=0.0, every=1, seed=0):
    """Logs `every` so many steps; `cost` and `gain` are functions of the step."""
    rng = random.Random(seed)
    steps = [every * number for number in range(1, logs + 1)]
    return [entry(step, cost(step) + rng.gauss(0, noise), gain(step)) for step in steps]


def watch(entries, name="cdr"):
    monitor = Monitor(name)
    said = [one["step"] for one in entries if monitor.read(one)]
    assert said == ([] if monitor.alarm is None else [monitor.alarm.step])
    return monitor


def ramp(start, end, *, begin=10, until=60):
    """From one value to another, between two steps."""
    return lambda step: start + (end - start) * min(1, max(0, (step - begin) / (until - begin)))


COLLAPSE = {"cost": ramp(0.5, 2.5), "gain": ramp(-0.1, 0.2)}
HEALTHY = {
    "text that the strong model likes better": {"cost": ramp(0.6, 0.2), "gain": ramp(-0.1, 0.1)},
    "good text that is rarer than bad": {"cost": ramp(0.2, 0.5), "gain": ramp(0.0, 0.2)},
    "nothing at all": {"cost": ramp(1.5, 1.5), "gain": ramp(0.0, 0.0)},
    "a change that is none": {"cost": ramp(0.5, 0.6), "gain": ramp(0.0, 0.0)},
}


@pytest.mark.parametrize("every", [1, 5, 10])
@pytest.mark.parametrize("kind", HEALTHY)
def test_healthy_runs(kind, every):
    for noise in (0.0, 0.03, 0.5):  # large batches, and small ones
        for seed in range(10):
            monitor = watch(history(**HEALTHY[kind], noise=noise, every=every, logs=300 // every, seed=seed))
            assert monitor.alarm is None, (noise, seed)
            assert monitor.is_judged


@pytest.mark.parametrize(("every", "most"), [(1, 0), (10, 1)])
def test_a_long_run_in_which_nothing_happens(every, most):
    """Of 60, with the noise of small batches, which is in the first steps too."""
    runs = (history(**HEALTHY["nothing at all"], noise=0.5, every=every, logs=300, seed=seed) for seed in range(60))
    assert sum(watch(run).alarm is not None for run in runs) <= most


@pytest.mark.parametrize("every", [1, 5, 10])
@pytest.mark.parametrize("noise", [0.0, 0.1, 0.3])
def test_a_collapse(noise, every):
    """Whose reward rises all the while."""
    monitor = watch(history(**COLLAPSE, noise=noise, every=every))
    assert 10 < monitor.alarm.step <= {1: 50, 5: 75, 10: 150}[every]
    assert monitor.alarm.last.cost > monitor.alarm.first.cost + 0.1
    assert f"costs the strong model {monitor.alarm.last.cost:.2f} nats" in monitor.alarm.reason
    assert f"({monitor.alarm.first.cost:.2f} in the first steps)" in monitor.alarm.reason


def test_the_price_decides():
    """The same rise of what text costs the strong model, and what it buys."""
    paid = history(cost=ramp(0.5, 1.5), gain=ramp(0.0, 1.0), noise=0.05)
    given_away = history(cost=ramp(0.5, 1.5), gain=ramp(0.0, 0.5), noise=0.05)
    assert watch(paid).alarm is None
    assert watch(given_away).alarm is not None


@pytest.mark.parametrize("wild", [5.0, 1e6, 1e300])
def test_one_wild_step_is_no_alarm(wild):
    entries = history(**HEALTHY["nothing at all"], noise=0.05, logs=200)
    for step in (30, 90, 150):
        entries[step] = entry(step + 1, wild, 0.0)
    assert watch(entries).alarm is None
    # And does not blind the rule.
    entries = history(**COLLAPSE, noise=0.05)
    entries[11] = entry(12, wild, 0.0)
    assert watch(entries).alarm.step <= 50


@pytest.mark.parametrize(
    "broken",
    [
        {"cdr/strong_logps": float("nan")},
        {"cdr/weak_logps": float("-inf")},
        {"cdr/strong_logps": None},
        {"cdr/tokens": "ten"},
        {"cdr/tokens": 0.0, "cdr/strong_logps": 0.0, "cdr/weak_logps": 0.0},  # nothing was scored
        {"step": None},
    ],
)
def test_what_is_no_number_changes_nothing(broken):
    entries = history(**COLLAPSE, noise=0.1)
    expected = watch(entries).alarm
    among = [one for entry_ in entries for one in ({**entry_, **broken}, entry_, {"step": entry_["step"], "loss": 1.0})]
    assert watch(among).alarm == expected
    assert watch(among).n_readings == len(entries)
    nothing = watch([{**one, **broken} for one in entries])
    assert (nothing.n_readings, nothing.is_judged, nothing.first, nothing.last) == (0, False, None, None)


def test_lengths_are_not_looked_at():
    entries = history(**HEALTHY["text that the strong model likes better"], noise=0.05)
    longer = [entry(one["step"], *_read(one), tokens=10 + 3 * one["step"]) for one in entries]
    assert watch(longer).alarm is None
    collapse = history(**COLLAPSE, noise=0.05)
    longer = [entry(one["step"], *_read(one), tokens=10 + 3 * one["step"]) for one in collapse]
    assert watch(longer).alarm.step == watch(collapse).alarm.step


def test_a_short_run_is_not_judged():
    entries = history(**COLLAPSE)
    assert not watch(entries[:12]).is_judged  # ten first steps; two logs can't be an alarm
    assert watch(entries[:13]).is_judged
    fast = history(cost=lambda step: 0.5 if step <= 10 else 5.0, gain=lambda step: 0.0)
    assert watch(fast[:12]).alarm is None
    assert watch(fast).alarm.step == 13
    sparse = history(cost=lambda step: 0.5 if step <= 30 else 5.0, gain=lambda step: 0.0, every=10)
    assert not watch(sparse[:5]).is_judged  # three first logs, where ten steps are fewer
    assert watch(sparse).alarm.step == 60


def test_a_resumed_run_goes_on():
    """What was logged is all there is to know: a monitor that reads it goes on like the one that saw it happen."""
    entries = history(**COLLAPSE, noise=0.2)
    whole = watch(entries)
    before = json.loads(json.dumps(entries[: whole.alarm.step - 3]))
    resumed = Monitor("cdr")
    assert not any(resumed.read(one) for one in before)
    assert [one["step"] for one in entries[len(before) :] if resumed.read(one)] == [whole.alarm.step]
    assert resumed.alarm == whole.alarm


def test_each_reward_has_its_own():
    bad, good = history(**COLLAPSE), history(**HEALTHY["nothing at all"])
    entries = [
        {**one, **{key.replace("cdr", "safe"): value for key, value in other.items()}}
        for one, other in zip(bad, good, strict=True)
    ]
    assert watch(entries).alarm is not None
    assert watch(entries, "safe").alarm is None
    assert watch(entries, "other").n_readings == 0


def test_the_names_in_a_log():
    keys = ("cdr/strong_logps_per_token", "safe/strong_logps_per_token", "eval_safe/strong_logps_per_token")
    entries = [{"step": 1, "loss": 1.0}, *({key: -1.0} for key in keys), {"eval_x/strong_logps_per_token": -1.0}]
    assert names_in(entries) == ["cdr", "safe", "eval_x"]  # the last may be the name of a reward


def _read(one):
    reading = read_entry(one, name="cdr")
    return reading.cost, reading.gain
