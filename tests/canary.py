"""The canary: does the package work, as fast as it should, with the newest version of everything?

`python tests/canary.py FOLDER` runs all parts, writes FOLDER/report.txt and prints it. The report's first line is the
verdict; the exit status is 1 if it is red. FOLDER/compat.txt has the output of the `compat` tests. `nox -s canary`
runs it in an environment without constraints.
"""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections import defaultdict
from collections.abc import Callable
from contextlib import chdir, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ.update(HF_HUB_OFFLINE="1", CI="1", TRL_EXPERIMENTAL_SILENCE="1", TOKENIZERS_PARALLELISM="false")

import canary_warnings
import torch
from families import FAMILIES, build_family
from tiny import byte_tokenizer, chat, llama

from trl_cdr import _compat
from trl_cdr.bench.measure import measure
from trl_cdr.bench.run import TOKEN_BUDGET, load_pair
from trl_cdr.bench.workloads import Shape
from trl_cdr.cli import main
from trl_cdr.scoring.causal_lm import CausalLM
from trl_cdr.scoring.kv_cache import describe_error
from trl_cdr.scoring.packing import Layout

TRAINERS = ("grpo", "rloo", "online_dpo", "online_preference")
ROUNDS = ("cpo", "dpo")
STEPS = 3
LEAST_SPEED = 2.0  # packed over padded on the shape below; about 7 where all is well
SHAPE = Shape(prefix=512, num_generations=8, prompts=2)
WIDTH = 80


@dataclass(frozen=True)
class Part:
    """What one part of the canary found: a line for the report, and more lines if it is red."""

    name: str
    is_green: bool
    line: str
    details: tuple[str, ...] = ()


def run_compat_tests(folder: Path) -> Part:
    """The tests marked `compat`, in processes of their own. Warnings are recorded, not errors."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "--dist", "worksteal", "-p", "canary_warnings"]
    command += ["-m", "compat and not slow and not gpu", "-o", "filterwarnings=default", "--tb=short"]
    environment = {**os.environ, canary_warnings.FOLDER: str(folder)}
    result = subprocess.run(command, capture_output=True, text=True, cwd=canary_warnings.ROOT, env=environment)
    (folder / "compat.txt").write_text(result.stdout + result.stderr, encoding="utf-8")
    lines = result.stdout.strip().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    last = re.sub(r" in [\d.]+s.*|=+", "", lines[-1]).strip() if lines else "no output"
    return Part("compat tests", result.returncode == 0, last, tuple(failed) or tuple(lines[-5:]))


def check_families(_: Path) -> Part:
    """Each family runs in the way that the tests expect of it."""
    expected = {name: way for name, (*_, way) in FAMILIES.items()}
    found = {name: CausalLM(build_family(name), name).way() for name in FAMILIES}
    wrong = [f"{name} runs {way}: {reason}" for name, (way, reason) in found.items() if way != expected[name]]
    packed = sum(way == "packed" for way, _ in found.values())
    line = f"{packed} of {[*expected.values()].count('packed')} families that pack are packed"
    return Part("families", not wrong, line, tuple(wrong))


def train(folder: Path) -> Part:
    """Three steps of each trainer by the command line, and one round of each trainer that learns in rounds."""
    pair = make_models(folder)
    rows = [json.dumps({"prompt": chat(text)}) for text in ("hello", "what is this", "the quick brown fox", "over") * 4]
    (folder / "prompts.jsonl").write_text("\n".join(rows), encoding="utf-8")
    common = ["--cdr_strong", pair["strong"], "--cdr_weak", pair["weak"], "--model_name_or_path", pair["policy"]]
    common += ["--use_cpu", "--bf16", "False", "--gradient_checkpointing", "False", "--report_to", "none"]
    common += ["--disable_tqdm", "True", "--logging_steps", "1", "--max_steps", str(STEPS)]
    data = ["--dataset_name", str(folder / "prompts.jsonl"), "--per_device_train_batch_size", "4"]
    lengths = {"online_dpo": ["--max_new_tokens", "8"]}
    groups = ["--num_generations", "4", "--max_completion_length", "12"]
    wrong = []

    def run(name: str, state: str, *arguments: str) -> None:
        said = io.StringIO()
        try:
            with redirect_stderr(said):
                main([*arguments, *common, "--output_dir", str(folder / name)])
            steps = json.loads((folder / name / state).read_text(encoding="utf-8"))["global_step"]
            if steps != STEPS:
                wrong.append(f"{name}: it trained {steps} steps")
        except SystemExit as error:
            wrong.append(f"{name}: {[f'exit status {error.code}', *said.getvalue().strip().splitlines()][-1]}")
        except Exception as error:
            wrong.append(f"{name}: {describe_error(error)}")

    for name in TRAINERS:
        run(name, "trainer_state.json", "train", "--trainer", name, *data, *lengths.get(name, groups))
    for name in ROUNDS:
        source = ["--input", str(folder / "prompts.jsonl"), "--num_rounds", "1"]
        run(name, "round-1/training/trainer_state.json", "rounds", "--trainer", name, *source, *groups)
    line = f"{STEPS} steps of each: {', '.join(TRAINERS + ROUNDS)}"
    return Part("trainers", not wrong, line, tuple(wrong))


def make_models(folder: Path) -> dict[str, str]:
    """Save a tiny pair and a policy, and return their folders."""
    tokenizer = byte_tokenizer()
    folders = {}
    for role, seed in {"strong": 0, "weak": 1, "policy": 3}.items():
        folders[role] = str(folder / role)
        model = llama(len(tokenizer), seed=seed)
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        if role == "policy":
            with torch.no_grad():  # many completions end soon: rounds leave out those that are cut off
                model.lm_head.weight[tokenizer.eos_token_id] *= 8
        model.save_pretrained(folders[role])
        tokenizer.save_pretrained(folders[role])
    return folders


def compare_speed(_: Path) -> Part:
    """Packed and padded in turn on the same rows, as a ratio: the machine's own speed does not matter."""
    lm = load_pair("llama-58m", None, dtype="float32", attention="sdpa")[0]
    rows = SHAPE.rows(lm.num_embeddings)
    constant = rows[0].prompt_ids[: SHAPE.prefix]
    ways: dict[str, Callable[[], object]] = {
        "packed": lambda: lm.per_token_logps(Layout(rows, constant=constant), token_budget=TOKEN_BUDGET),
        "padded": lambda: lm.per_token_logps(Layout(rows), token_budget=TOKEN_BUDGET, padded=True),
    }
    costs = measure(ways, device=lm.decoder.device.type, runs=3)
    speed = costs["padded"].over(costs["packed"])
    line = f"packed is {speed:.1f} times faster than padded ({SHAPE.label}; at least {LEAST_SPEED:.0f} expected)"
    return Part("speed", speed >= LEAST_SPEED, line, (lm.explain_way(),))


def read_warnings(folder: Path) -> list[str]:
    """All deprecations that were recorded, by package, each with the places in our code."""
    found: dict[str, dict[tuple[str, str], dict[str, int]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(int)))
    for path in sorted(folder.glob("warnings-*.json")):
        for row in json.loads(path.read_text(encoding="utf-8")):
            found[row["package"]][row["kind"], row["message"]][row["place"]] += row["count"]
    lines = []
    for package in sorted(found):
        lines.append(package)
        for (kind, message), places in sorted(found[package].items()):
            lines += wrap(f"{kind}: {message}", indent=2)
            ranked = sorted(places.items(), key=lambda item: (-item[1], item[0]))
            lines += [f"      {place} ({count} times)" for place, count in ranked[:3]]
            lines += [f"      and {len(ranked) - 3} other places"] if len(ranked) > 3 else []
    return lines


def wrap(text: str, *, indent: int) -> list[str]:
    """Lines of at most 80 columns; the second and later ones are indented further."""
    return textwrap.wrap(text, WIDTH, initial_indent=" " * indent, subsequent_indent=" " * (indent + 2))


def write_report(parts: list[Part], warned: list[str]) -> str:
    """The report; its first line is the verdict."""
    red = [part.name for part in parts if not part.is_green]
    installed = {name: number for name, number in _compat.versions().items() if number is not None}
    lines = [f"canary: red ({', '.join(red)})" if red else "canary: green"]
    lines += wrap(", ".join(f"{name} {number}" for name, number in installed.items()), indent=0)
    for part in parts:
        lines += wrap(f"{part.name:<13}{'' if part.is_green else 'RED: '}{part.line}", indent=2)
        for detail in () if part.is_green else part.details:
            lines += wrap(detail, indent=6)
    lines += ["", "Deprecations, by the package that reports them:" if warned else "No deprecations."]
    return "\n".join([*lines, *warned]) + "\n"


def run_part(run: Callable[[Path], Part], folder: Path) -> Part:
    """A part, which is red if it fails in a way that it does not expect."""
    try:
        return run(folder)
    except Exception as error:
        return Part(run.__name__, False, describe_error(error))


def run_all(output: Path) -> int:
    """Run all parts in a folder that is removed, and write report.txt and compat.txt into `output`."""
    output.mkdir(parents=True, exist_ok=True)
    canary_warnings.recorder.install()
    torch.manual_seed(0)
    with TemporaryDirectory() as scratch, chdir(scratch):
        folder = Path(scratch)
        parts = [run_part(run, folder) for run in (check_families, train, compare_speed, run_compat_tests)]
        canary_warnings.recorder.write(folder)
        report = write_report(parts, read_warnings(folder))
        if (folder / "compat.txt").exists():
            shutil.copy(folder / "compat.txt", output)
    (output / "report.txt").write_text(report, encoding="utf-8")
    print(report, end="")
    return int(any(not part.is_green for part in parts))


if __name__ == "__main__":
    sys.exit(run_all(Path(sys.argv[1]).absolute()))
