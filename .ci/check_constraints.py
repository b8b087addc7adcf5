"""Check that every installed package has the version of tests/constraints.txt. Exit status 1 if not."""

import sys
from importlib.metadata import distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

TOOLS = {"pip", "setuptools", "wheel", "trl-cdr"}  # the environment's own, and this package


def main() -> int:
    lines = Path("tests/constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    pinned = {canonicalize_name(pin.name): pin.specifier for pin in pins}
    wrong = []
    for found in distributions():
        name = canonicalize_name(found.metadata["Name"])
        # The CUDA packages of torch: torch itself asks for exact versions of them.
        if name in TOOLS or name.startswith(("nvidia-", "cuda-")) or name == "triton":
            continue
        if name not in pinned:
            wrong.append(f"{name} {found.version} is not in tests/constraints.txt")
        elif Version(found.version).public not in pinned[name]:
            wrong.append(f"{name} is {found.version}, and tests/constraints.txt has {name}{pinned[name]}")
    for line in sorted(wrong):
        print(line, file=sys.stderr)
    if wrong:
        print("Install with -c tests/constraints.txt, or renew the file: nox -s constraints", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
