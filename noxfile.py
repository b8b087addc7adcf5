"""The versions that trl-cdr promises, each in an environment of its own: `nox` runs all, `nox -s "compat(oldest)"` one.

The tests marked `compat` run on each; the whole suite runs on the newest, by `.ci/run`.
"""

import nox

nox.options.reuse_existing_virtualenvs = True

TORCH = "torch==2.13.0"
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
    "newest": [TORCH, "trl"],
    "torch-floor": ["torch==2.6.0", "trl==1.0.0", "transformers==4.56.2", "requests"],
}


@nox.session(python="3.11")
@nox.parametrize("versions", [nox.param(name, id=name) for name in VERSIONS])
def compat(session: nox.Session, versions: str) -> None:
    """The tests of what differs between versions."""
    session.install(*VERSIONS[versions], "-e", ".[test]")
    session.run("python", "-m", "pytest", "-q", "-m", "compat and not slow and not gpu", *session.posargs)
