"""CI tests what README installs, each command is written once, and the canary's verdict is true."""

import json
import os
import re
import shutil
import subprocess
import time
import tomllib
from pathlib import Path

import canary
import canary_warnings
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def pins():
    lines = (ROOT / "tests" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = [Requirement(line) for line in lines if not line.startswith("#")]
    return {canonicalize_name(pin.name): pin for pin in found}


def test_constraints_pin_every_dependency_within_its_range():
    extras = [line for lines in PROJECT["optional-dependencies"].values() for line in lines]
    for asked in map(Requirement, [*PROJECT["dependencies"], *extras]):
        pin = pins()[canonicalize_name(asked.name)]
        [exact] = pin.specifier
        assert exact.operator == "=="
        assert exact.version in asked.specifier, asked


def test_constraints_name_no_machine():
    for name, pin in pins().items():
        assert pin.url is None, name
        assert "+" not in str(pin.specifier), name


def test_dependencies_have_open_ranges():
    for asked in map(Requirement, PROJECT["dependencies"]):
        assert {each.operator for each in asked.specifier} <= {">=", "<"}, asked


def steps(path):
    jobs = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]
    return [(name, step["run"]) for name, job in jobs.items() for step in job["steps"] if "run" in step]


def test_workflows_call_the_scripts_of_ci():
    commands = dict.fromkeys(command for path in WORKFLOWS for _, command in steps(path))
    for command in commands:
        for word in re.findall(r"\.ci/\w+", command):
            assert (ROOT / word).stat().st_mode & 0o100, word
    for written_once in ("ruff", "mypy", "pytest"):
        assert not any(written_once in command for command in commands), written_once
    run = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for script in (".ci/install", ".ci/lint", ".ci/tests", ".ci/slow", "nox --envdir"):
        assert script in run
        assert any(script.split(" --")[0] in command for command in commands), script


def test_workflow_matrix_is_that_of_nox():
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))["jobs"]
    text = (ROOT / "noxfile.py").read_text(encoding="utf-8")
    table = text[text.index("VERSIONS = {") : text.index("\n}\n", text.index("VERSIONS = {"))]
    assert jobs["compat"]["strategy"]["matrix"]["versions"] == re.findall(r'^    "([\w.-]+)": \[', table, re.MULTILINE)
    assert jobs["tests"]["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13"]


def write(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["#!/usr/bin/env bash", *lines, ""]), encoding="utf-8")
    path.chmod(0o755)


@pytest.fixture
def run_ci(tmp_path):
    """Run `.ci/run` with stubs for everything that it calls."""
    shutil.copytree(ROOT / ".ci", tmp_path / ".ci")
    for name in ("install", "lint", "slow", "tests"):
        write(tmp_path / ".ci" / name, f"echo {name} ran")
    write(tmp_path / "bin" / "python3", 'mkdir -p "$3/bin"; touch "$3/bin/activate"')
    write(tmp_path / "bin" / "trl-cdr", 'echo "trl-cdr $1 ran"')
    canary = ['mkdir -p "${!#}"', 'echo "canary: red (speed)" >"${!#}/report.txt"', "exit 1"]
    write(tmp_path / "bin" / "nox", "echo nox ran", 'if [[ "$*" == *"-s canary"* ]]; then', *canary, "fi")
    environment = {
        **os.environ,
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "TMPDIR": str(tmp_path / "scratch"),
    }
    (tmp_path / "scratch").mkdir()

    def run():
        command = ["bash", str(tmp_path / ".ci" / "run")]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    yield run
    assert [*(tmp_path / "scratch").iterdir()] == []


def test_ci_run_begins_with_a_red_canary_and_passes(run_ci):
    run = run_ci()
    lines = run.communicate()[0].splitlines()
    assert run.returncode == 0
    assert lines[0] == "canary: red (speed)"
    done = [line for line in lines if line.endswith("ran")]
    assert done == ["install ran", "lint ran", "trl-cdr demo ran", "slow ran", "tests ran", "nox ran", "nox ran"]


def test_ci_run_whose_canary_breaks_passes(run_ci, tmp_path):
    write(tmp_path / "bin" / "nox", '[[ "$*" != *"-s canary"* ]]')
    run = run_ci()
    assert run.communicate()[0].splitlines()[0] == "canary: red (it did not finish)"
    assert run.returncode == 0


@pytest.mark.parametrize("step", ["install", "lint", "slow", "tests"])
def test_ci_run_fails_if_a_step_fails(step, run_ci, tmp_path):
    write(tmp_path / ".ci" / step, f"echo {step} failed", "exit 3")
    run = run_ci()
    lines = run.communicate()[0].splitlines()
    assert run.returncode == 3
    assert lines[0] == "canary: not run"
    assert lines[-1] == f"{step} failed"


def test_ci_run_that_is_stopped_prints_its_output(run_ci, tmp_path):
    write(tmp_path / ".ci" / "lint", "echo lint began", f"touch {tmp_path / 'began'}", "sleep 600")
    run = run_ci()
    while not (tmp_path / "began").exists():
        time.sleep(0.05)
    run.terminate()
    lines = run.communicate()[0].splitlines()
    assert run.returncode == 143
    assert lines[0] == "canary: not run"
    assert "lint began" in lines


@pytest.mark.parametrize("is_open", [False, True])
@pytest.mark.parametrize("has_report", [False, True])
def test_canary_workflow_opens_one_issue(has_report, is_open, tmp_path):
    [step] = [command for _, command in steps(ROOT / ".github" / "workflows" / "canary.yml") if "gh issue" in command]
    write(
        tmp_path / "bin" / "gh",
        f'echo "$@" >>{tmp_path}/calls',
        f'if [ "$2" = list ]; then echo "{"7" if is_open else ""}"; else cat "${{!#}}"; fi',
    )
    if has_report:
        write(tmp_path / "canary" / "report.txt", "canary: red (speed)")
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "RUNNER_TEMP": str(tmp_path), "RUN": "https://run"}
    run = subprocess.run(["bash", "-e", "-c", step], env=environment, capture_output=True, text=True, check=True)
    calls = (tmp_path / "calls").read_text(encoding="utf-8").splitlines()
    assert calls[-1].startswith("issue comment 7 " if is_open else "issue create --title The canary is red: ")
    assert ("canary: red (speed)" if has_report else "canary: red (it did not finish)") in run.stdout
    assert run.stdout.splitlines()[-1] == "https://run"


def report(*parts, warned=()):
    return canary.write_report(list(parts), [*warned]).splitlines()


def test_canary_report_begins_with_the_verdict():
    good = canary.Part("families", True, "23 of 23", ("hidden",))
    bad = canary.Part("speed", False, "packed is 0.9 times faster", ("strong runs padded, not packed: " + "why " * 40,))
    assert report(good)[0] == "canary: green"
    lines = report(good, bad, warned=["transformers"])
    assert lines[0] == "canary: red (speed)"
    assert max(map(len, lines)) <= 80
    text = " ".join(" ".join(lines).split())
    assert "speed RED: packed is 0.9 times faster" in text
    assert "not packed: why why" in text
    assert "hidden" not in text
    assert lines[-1] == "transformers"
    assert report(good)[-1] == "No deprecations."


def test_canary_part_that_breaks_is_red(tmp_path):
    def broken(folder):
        raise AttributeError("module 'trl' has no attribute\n'GRPOTrainer'")

    part = canary.run_part(broken, tmp_path)
    assert not part.is_green
    assert part.line == "AttributeError: module 'trl' has no attribute 'GRPOTrainer'"


def test_canary_fails_a_family_in_another_way(tmp_path, monkeypatch):
    assert canary.check_families(tmp_path).is_green
    monkeypatch.setattr("trl_cdr.scoring.causal_lm.missing_input", lambda decoder: "its forward ignores position_ids")
    part = canary.check_families(tmp_path)
    assert not part.is_green
    assert part.line.startswith("0 of ")
    assert "Llama runs padded: its forward ignores position_ids" in part.details


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is deprecated:FutureWarning")  # TRL's, see test_train
def test_canary_trains_every_trainer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    part = canary.train(tmp_path)
    assert part.is_green, part.details
    for name in canary.TRAINERS:
        assert (tmp_path / name / "model.safetensors").exists()


LIBRARY = """
import warnings

def old(kind):
    warnings.warn("`old` is deprecated.\\nUse `new`.", kind, stacklevel=2)
"""


@pytest.fixture
def recorder(monkeypatch):
    """A recorder that is installed, and put away after the test."""
    warn = canary_warnings.warnings.warn
    found = canary_warnings.Recorder()
    found.install()
    yield found
    canary_warnings.warnings.warn = warn
    for name in canary_warnings.LOGGERS:
        canary_warnings.logging.getLogger(name).removeHandler(found)


@pytest.mark.filterwarnings("ignore")
def test_canary_records_deprecations_with_our_place(recorder, tmp_path):
    scope = {"__name__": "some_library.part"}
    exec(compile(LIBRARY, "/elsewhere/some_library/part.py", "exec"), scope)
    for kind in (FutureWarning, DeprecationWarning, UserWarning):
        for _ in range(2):
            scope["old"](kind)
    canary_warnings.logging.getLogger("transformers.utils").warning("`x` is deprecated. Use `y`.")
    canary_warnings.logging.getLogger("transformers.utils").warning("All is well.")
    recorder.write(tmp_path)
    [path] = tmp_path.glob("warnings-*.json")
    rows = json.loads(path.read_text(encoding="utf-8"))
    found = {(row["package"], row["kind"], row["message"], row["count"]) for row in rows}
    assert found == {
        ("some_library", "FutureWarning", "`old` is deprecated.", 2),
        ("some_library", "DeprecationWarning", "`old` is deprecated.", 2),
        ("transformers", "log", "`x` is deprecated. Use `y`.", 1),
    }
    assert {row["place"].split(":")[0] for row in rows} == {"tests/test_ci.py"}
    lines = canary.read_warnings(tmp_path)
    assert lines[:2] == ["some_library", "  DeprecationWarning: `old` is deprecated."]
    assert lines[2].startswith("      tests/test_ci.py:")
    assert lines[2].endswith("(2 times)")


def test_canary_places_the_package_before_a_test(recorder):
    """The innermost frame of the package, if there is one: that is the code to change."""
    from trl_cdr import _compat

    class Trainer:
        def _prepare_inputs(self, batch):
            return canary_warnings.place_of(canary_warnings.sys._getframe())

    assert _compat.prepare_inputs(Trainer(), None).startswith("trl_cdr/_compat.py:")
