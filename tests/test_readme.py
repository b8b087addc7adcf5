"""The README tells the truth: its commands are those that CI runs, its code runs, its options are the config's."""

import ast
import dataclasses
import re
from pathlib import Path

import pytest
import yaml
from families import ALL_FAMILIES

from trl_cdr import CDRConfig, Criteria
from trl_cdr.training.environment import read_environment
from trl_cdr.training.train import TrainArguments

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DETAILS = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
RESULTS = (ROOT / "examples" / "RESULTS.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README + DETAILS, flags=re.DOTALL)


def test_readme_commands_are_run_by_ci():
    """Each is a line of a script of CI, but for what the tests hold in small and for what the test extra includes."""
    scripts = [path.read_text(encoding="utf-8") for path in (ROOT / ".ci").iterdir() if path.suffix == ""]
    demo, tests, *_ = blocks("bash")
    for command in re.split(r" && |\n", (demo + tests).strip()):
        if command.startswith("pip install"):
            assert command.startswith("pip install -c tests/constraints.txt ")
        if command not in ("pip install -c tests/constraints.txt -e .", "trl-cdr demo --real"):
            assert any(command in script for script in scripts), command


@pytest.mark.parametrize("code", blocks("python"))
def test_the_code_names_what_exists(code):
    tree = ast.parse(code)
    imports = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert imports
    exec(compile(ast.Module(imports, type_ignores=[]), "README", "exec"), {})


def test_the_scoring_code_runs(checkpoints, capsys):
    [code] = [code for code in blocks("python") if "DensityRatioScorer" in code]
    names = ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-0.5B")
    for name, folder in zip(names, (checkpoints["strong"], checkpoints["weak"]), strict=True):
        code = code.replace(f'"{name}"', repr(folder))
    exec(code, {})
    assert len(ast.literal_eval(capsys.readouterr().out)) == 2


def test_the_criteria_in_the_readme_are_valid():
    [text] = blocks("toml")
    criteria = Criteria.from_toml(text)
    assert list(criteria.domains) == ["chemistry", "chat", "default"]
    assert criteria.resolve("geology") == "default"


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is deprecated:FutureWarning")  # TRL's, see test_train
def test_the_yaml_is_read_to_the_last_key(tmp_path):
    from trl import GRPOConfig, ModelConfig, ScriptArguments, TrlParser
    from trl.scripts.grpo import GRPOScriptArguments

    ours, adapted, several, trls, served = (yaml.safe_load(block) for block in blocks("yaml"))
    assert read_environment(trls.pop("env")) == CDRConfig(ours["cdr_strong"], ours["cdr_weak"])
    path = tmp_path / "run.yaml"
    assert len(several["reward_weights"]) == len(several["cdr_objectives"] + several["reward_funcs"])
    for given, kinds in (
        (ours | several, (ScriptArguments, TrainArguments, CDRConfig)),
        (ours | adapted, (ScriptArguments, TrainArguments, CDRConfig)),
        (served, (ScriptArguments, TrainArguments, CDRConfig)),
        (trls, (GRPOScriptArguments,)),
    ):
        path.write_text(yaml.safe_dump(given))
        parser = TrlParser((GRPOConfig, ModelConfig, *kinds))
        *_, unknown = parser.parse_args_and_config(
            ["--config", str(path), "--use_cpu", "--bf16", "False"], return_remaining_strings=True
        )
        assert not unknown


def test_the_option_table_is_the_config():
    table = re.findall(r"^\| (`.+?) \| (.+?) \|", DETAILS[DETAILS.index("## Options") :], flags=re.MULTILINE)
    listed = {name.strip("` "): default for names, default in table for name in names.split(",")}
    fields = {field.name.removeprefix("cdr_"): field.default for field in dataclasses.fields(CDRConfig)}
    assert set(listed) == set(fields)
    for name, default in listed.items():
        if default != "required":
            assert ast.literal_eval(default.strip("`").replace('"', "'")) == fields[name], name


@pytest.mark.parametrize("document", ["README.md", "examples/README.md", "examples/RESULTS.md"])
def test_what_is_linked_is_there(document):
    folder, text = (ROOT / document).parent, (ROOT / document).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!http)(.+?)\)", text):
        path, _, anchor = target.partition("#")
        linked = folder / path if path else ROOT / document
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(encoding="utf-8"), flags=re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, target


def test_the_table_of_families_is_what_the_tests_see():
    table = dict(re.findall(r"^\| ([^|]+?) \| (packed|padded) \|$", RESULTS, flags=re.MULTILINE))
    listed = {family.strip(): way for names, way in table.items() for family in names.split(";")}
    assert listed == {family: way for family, (*_, way) in ALL_FAMILIES.items()}
