"""The house: imports point downwards, heavy ones stay in their rooms, and importing the package is cheap and silent."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import trl_cdr
from trl_cdr import _compat

ROOT = Path(trl_cdr.__file__).parent
FLOORS = {
    "errors": 0,
    "config_checks": 1,
    "config": 2,
    "_compat": 2,
    "conditioning": 3,
    "scoring": 4,
    "training": 5,
    "annotation": 5,
    "demo": 6,
    "rounds": 6,
    "bench": 6,
    "doctor": 6,
    "arguments": 6,
    "cli_bench": 7,
    "cli": 8,
    "__main__": 9,
}
# Third-party modules and the rooms that may import them; what is not listed is free.
ROOMS = {
    "trl": {"training", "cli", "demo", "rounds", "bench", "_compat"},
    "datasets": {"training", "annotation", "demo", "rounds", "bench", "cli"},
}
NO_TORCH = {"errors", "config_checks", "config", "conditioning"}


def imports(path):
    """Absolute module names that a file imports, at any depth of its code."""
    package = ["trl_cdr", *path.relative_to(ROOT).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def room(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


FILES = [path for path in sorted(ROOT.rglob("*.py")) if path != ROOT / "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downwards(path):
    here = room(path)
    for name in imports(path):
        top, *rest = name.split(".")
        if top == "trl_cdr" and rest and rest[0] in FLOORS:
            assert rest[0] == here or FLOORS[rest[0]] < FLOORS[here], f"{here} imports {name}"
        assert here in ROOMS.get(top, {here}), f"{here} imports {name}"
        assert not (top == "torch" and here in NO_TORCH), f"{here} imports {name}"


def test_every_room_has_a_floor():
    assert {room(path) for path in FILES} <= set(FLOORS)


def private_parts(tree):
    """
    Private names of other libraries that code uses, by attribute or by `getattr`, and readers of signatures.

    A name that the same file defines is its own, and so is one of `self`, `cls` or a base class.
    """
    own = {*defined_names(tree)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            name, owner = node.attr, ast.unparse(node.value)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr", "setattr"):
            name, owner = getattr(node.args[1], "value", ""), ast.unparse(node.args[0])
        elif isinstance(node, ast.ImportFrom) and node.module == "inspect":
            name, owner = "signature", ""
        else:
            continue
        is_private = isinstance(name, str) and name.startswith("_") and not name.startswith("__")
        is_own = name in own or owner in ("self", "cls", "super()")
        if (is_private and not is_own) or name in ("signature", "getfullargspec"):
            yield f"line {node.lineno}: {owner}.{name}"


def defined_names(tree):
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.attr


def test_only_compat_uses_private_parts():
    found = {str(path.relative_to(ROOT)): [*private_parts(ast.parse(path.read_text("utf-8")))] for path in FILES}
    assert found.pop("_compat.py")
    assert {name: parts for name, parts in found.items() if parts} == {}


def test_inherited_private_parts_of_grpo_are_listed():
    """`self._name` of `OnlinePreferenceTrainer` that no method of its own defines is GRPO's."""
    tree = ast.parse((ROOT / "training" / "online_preference_trainer.py").read_text("utf-8"))
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and ast.unparse(node.value) == "self"
    }
    inherited = used - {*defined_names(tree)}
    assert inherited
    assert inherited <= {*_compat._GRPO_ATTRIBUTES}


def test_imports_below_the_top_level_are_listed():
    """`test_private_parts` looks for each of them in every version."""
    libraries = ("accelerate", "datasets", "peft", "tokenizers", "transformers", "trl")
    found = {}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or node.level or room(path) == "_compat":
                continue
            if node.module.partition(".")[0] in libraries and "." in node.module:
                found.setdefault(node.module, set()).update(alias.name for alias in node.names)
    assert found == {module: set(names) for module, names in _compat.IMPORTS.items()}


def test_importing_is_cheap_and_silent():
    code = (
        "import os, sys; before = dict(os.environ); import trl_cdr; assert dict(os.environ) == before; "
        "heavy = {'torch', 'trl', 'transformers', 'datasets', 'accelerate', 'matplotlib'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    run = subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, capture_output=True)
    assert (run.stdout, run.stderr) == (b"", b"")


def test_the_public_names():
    assert set(trl_cdr.__all__) == {
        "CDRCallback",
        "CDRConfig",
        "CDRError",
        "CDRJudge",
        "CDRReward",
        "ConfigError",
        "Criteria",
        "DensityRatioScorer",
        "DomainCriteria",
        "Exemplar",
        "InputError",
        "ModelError",
        "OnlinePreferenceConfig",
        "OnlinePreferenceTrainer",
        "Score",
        "UnscorableError",
        "__version__",
        "cdr_reward",
    }
    assert all(hasattr(trl_cdr, name) for name in trl_cdr.__all__)
    assert set(dir(trl_cdr)) == set(trl_cdr.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Scorer'"):
        _ = trl_cdr.Scorer
    with pytest.raises(ImportError):
        from trl_cdr import scorer  # noqa: F401


def test_every_module_opens_with_its_job():
    for path in FILES:
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path
