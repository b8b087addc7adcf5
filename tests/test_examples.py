"""The examples run as they stand, on the demo's models, and stay short."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_short(path):
    assert len(path.read_text().splitlines()) <= 80


def run(name, *arguments, cwd):
    script = Path(__file__).parent.parent / "examples" / name
    command = [sys.executable, str(script), "--tiny", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=cwd).stdout


@pytest.mark.slow
def test_score(tmp_path):
    assert "preferred: the answer is 8 ." in run("01_score.py", cwd=tmp_path)


@pytest.mark.slow
def test_criteria(tmp_path):
    out = run("03_criteria.py", "--max_steps", "30", "--output_dir", str(tmp_path / "policy"), cwd=tmp_path)
    for name in ("right", "short"):
        [line] = [line for line in out.splitlines() if line.startswith(f"{name}: mean reward")]
        first, last = (float(word.rstrip(",")) for word in line.split() if word[:1] in "+-")
        assert last > first


@pytest.mark.slow
def test_online_dpo(tmp_path):
    out = run("02_online_dpo.py", "--max_steps", "30", "--output_dir", str(tmp_path / "policy"), cwd=tmp_path)
    first, last = (float(word.rstrip(",;")) for word in out.split() if word[:1] in "+-")
    assert last > first
    assert (tmp_path / "policy" / "model.safetensors").exists()


@pytest.mark.slow
def test_judge(tmp_path):
    out = run("04_judge.py", cwd=tmp_path)
    assert [line.split(";")[0] for line in out.splitlines() if "better:" in line] == ["  better: 0", "  better: 1"]
    assert "best first: the answer is 8 . | " in out
