"""What `--help` prints of dataclasses, and what is said of a name that none of them has."""

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from trl_cdr.arguments import Group, explain_unknown, write_help


@dataclass
class Options:
    name: str = field(metadata={"help": "Who. It is 100%% needed."})
    kind: Literal["a", "b"] = field(default="a", metadata={"help": "Which `kind`. And more."})
    weights: list[float] | None = field(default=None, metadata={"help": "The default is none."})
    extra: dict[str, Any] | str | None = field(default=None, metadata={"help": "word " * 40})
    entries: list[dict[str, Any]] | str | None = None
    a_name_that_is_longer_than_its_column: int = 3
    flag: bool = False
    inner: int = field(default=0, init=False)


@pytest.fixture(autouse=True)
def _width(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


def test_help():
    lines = write_help("go", "Go.", [Group("options", Options)], examples=["trl-cdr go"]).splitlines()
    assert lines[:3] == ["usage: trl-cdr go [--config FILE] [--ARGUMENT VALUE ...]", "", "Go."]
    assert lines[4].startswith("  --config FILE ")
    assert lines[lines.index("options:") + 1 :] == [
        "  --name TEXT                   Who. It is 100% needed. (required)",
        "  --kind a|b                    Which `kind`. And more. (default: a)",
        "  --weights NUMBER ...          The default is none.",
        "  --extra JSON                  word word word word word word word word word",
        *[" " * 32 + ("word " * 9).strip()] * 3,
        " " * 32 + "word word word word",
        "  --entries JSON",
        "  --a_name_that_is_longer_than_its_column INT",
        " " * 32 + "(default: 3)",
        "  --flag BOOL",
        "",
        "examples:",
        "  trl-cdr go",
    ]


def test_help_of_what_is_asked_for_often():
    group = Group("options", Options, {"kind": "", "not_of_this_class": "", "name": "Your name."})
    text = write_help("go", "Go.", [group])
    assert text.splitlines()[-3:] == [
        "  --kind a|b                    Which `kind`. (default: a)",
        "  --name TEXT                   Your name. (required)",
        "  and 5 more: --help_all",
    ]
    assert "--flag" in write_help("go", "Go.", [group], everything=True)
    assert "more:" not in write_help("go", "Go.", [group], everything=True)


def test_unknown_names():
    known = {"num_generations", "max_steps"}
    assert explain_unknown(["max_steps", "num_generations"], known) is None
    assert explain_unknown(["num_generatons"], known) == "num_generatons (did you mean num_generations?)"
    assert explain_unknown(["max-steps", "zzz", "zzz"], known) == "max-steps (did you mean max_steps?), zzz"
    found = explain_unknown(["num_generaton", "b"], known, elsewhere={"num_generaton": "of another"}.get)
    assert found == "num_generaton (of another), b"
