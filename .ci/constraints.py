"""Check that every installed package has the version of tests/constraints.txt; `--renew` writes the file instead.

The exit status is 1 if a package is missing in the file or has another version.
"""

import sys
from importlib.metadata import distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

PATH = Path("tests", "constraints.txt")
HEADER = """\
# The versions that CI tests: every dependency, direct and indirect. Renew: nox -s constraints
# The CUDA packages of torch are missing: torch asks for exact versions of them itself.
"""
TOOLS = {"pip", "setuptools", "wheel", "trl-cdr"}  # the environment's own, and this package
CUDA = ("nvidia-", "cuda-", "triton")


def installed() -> dict[str, str]:
    """Name -> version of each package, without the local part ("+cpu"), which depends on the machine."""
    found = {canonicalize_name(one.metadata["Name"]): Version(one.version).public for one in distributions()}
    return {name: found[name] for name in sorted(found) if name not in TOOLS and not name.startswith(CUDA)}


def main() -> int:
    if sys.argv[1:] == ["--renew"]:
        PATH.write_text(HEADER + "".join(f"{name}=={version}\n" for name, version in installed().items()))
        return 0
    lines = PATH.read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    pinned = {canonicalize_name(pin.name): pin.specifier for pin in pins}
    wrong = []
    for name, version in installed().items():
        if name not in pinned:
            wrong.append(f"{name} {version} is not in {PATH}")
        elif version not in pinned[name]:
            wrong.append(f"{name} is {version}, and {PATH} has {name}{pinned[name]}")
    for line in wrong:
        print(line, file=sys.stderr)
    if wrong:
        print(f"Install with -c {PATH}, or renew the file: nox -s constraints", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
