"""Which base and which adapter the options mean, and what is refused before any weights are read."""

import json
import shutil
from pathlib import Path

import pytest
from lora import save_adapter

from trl_cdr import CDRConfig, ConfigError, DensityRatioScorer, ModelError
from trl_cdr.scoring.sources import Served, find_sources, read_served, share_base

pytestmark = pytest.mark.compat
COMMITS = ["0" * 40, "1" * 40, "2" * 40, "3" * 40]


@pytest.fixture(scope="module")
def saved(checkpoints, tmp_path_factory):
    return save_adapter(tmp_path_factory.mktemp("adapter") / "a", checkpoints["strong"])


@pytest.fixture
def base(checkpoints):
    return checkpoints["strong"]


@pytest.fixture
def adapter(saved, tmp_path):
    return str(shutil.copytree(saved, tmp_path / "adapter"))


def edit(folder, **config):
    path = Path(folder) / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


def put_on_hub(cache, name, **revisions):
    """A repository, each revision a commit and a folder, in a cache of its own; nothing else can be reached."""
    for revision, (commit, source) in revisions.items():
        folder = cache / f"models--{name.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True, exist_ok=True)
        (folder / "refs" / revision).write_text(commit)
        shutil.copytree(source, folder / "snapshots" / commit)
    return {"cache_dir": str(cache)}


def ask(strong, weak, **options):
    return find_sources(CDRConfig.from_options(strong=strong, weak=weak, **options))


def test_a_plain_pair(checkpoints):
    found = ask(**checkpoints)
    assert [(found[role].name, found[role].adapter) for role in found] == [
        (name, None) for name in checkpoints.values()
    ]
    assert not share_base(CDRConfig(*checkpoints.values()), found)


def test_a_base_and_an_adapter(base, adapter):
    found = ask(base, base, strong_adapter=adapter)
    assert found["strong"].adapter.base == base
    assert found["strong"].identify("strong") == f"{found['weak'].identify('weak')} with adapter " + (
        found["strong"].adapter.weights
    )
    alone = ask(adapter, base)
    assert alone == found
    assert share_base(CDRConfig(adapter, base), alone)


def test_names_on_the_hub_with_revisions(checkpoints, adapter, tmp_path):
    edit(adapter, base_model_name_or_path="some/base", revision="older")
    kwargs = put_on_hub(
        tmp_path / "hub", "some/base", main=(COMMITS[0], checkpoints["weak"]), older=(COMMITS[1], checkpoints["strong"])
    )
    put_on_hub(tmp_path / "hub", "some/adapter", main=(COMMITS[2], adapter), v2=(COMMITS[3], adapter))
    options = {"model_init_kwargs": kwargs}
    alone = ask("some/adapter", "some/base", strong_revision="v2", weak_revision="older", **options)
    assert (alone["strong"].name, alone["strong"].revision) == ("some/base", "older")
    assert alone["strong"].adapter.weights == f"commit {COMMITS[3]}"
    named = ask("some/base", "some/base", strong_adapter="some/adapter", weak_revision="older", **options)
    assert (named["strong"].revision, named["strong"].adapter.weights) == ("older", f"commit {COMMITS[2]}")
    other = ask(
        "some/base",
        "some/base",
        strong_adapter="some/adapter",
        strong_adapter_revision="v2",
        weak_revision=COMMITS[1],  # the same by another name
        **options,
    )
    assert other["strong"].adapter.weights == f"commit {COMMITS[3]}"
    with pytest.raises(ConfigError, match="the base 'some/base' is named with two revisions, 'older' for .* None for"):
        ask("some/base", "some/base", strong_adapter="some/adapter", **options)
    with pytest.raises(ModelError, match="names the base 'some/base' at 'older', and strong is 'some/base' at 'main'"):
        ask("some/base", "some/base", strong_adapter="some/adapter", strong_revision="main", **options)


def test_an_adapter_of_another_base(checkpoints, base, adapter, tmp_path, caplog):
    with pytest.raises(
        ModelError, match=r"strong_adapter is .*whose config names the base .* with other weights. Pass"
    ):
        ask(checkpoints["weak"], base, strong_adapter=adapter)
    copied = str(shutil.copytree(base, tmp_path / "copy"))
    assert ask(copied, base, strong_adapter=adapter)["strong"].name == copied
    kwargs = put_on_hub(tmp_path / "hub", "some/base", main=(COMMITS[0], base))
    put_on_hub(tmp_path / "hub", "its/other-name", main=(COMMITS[0], base))
    put_on_hub(tmp_path / "hub", "some/other", main=(COMMITS[1], checkpoints["weak"]))
    options = {"strong_adapter": adapter, "model_init_kwargs": kwargs}
    edit(adapter, base_model_name_or_path="some/base")
    ask("its/other-name", base, **options)
    with pytest.raises(ModelError, match="names the base 'some/base', and strong is 'some/other', with other weights"):
        ask("some/other", base, **options)
    assert not caplog.records
    for gone in ("some/base", "/home/somebody/base", "./base"):  # a path of the machine that trained it
        edit(adapter, base_model_name_or_path=gone)
        ask(base, base, **options)
        assert f"names the base {gone!r}, which can't be compared with {base!r}" in caplog.text
    edit(adapter, base_model_name_or_path=None)
    caplog.clear()
    ask(base, base, **options)
    assert not caplog.records


def test_adapters_that_can_not_be_used(base, adapter, tmp_path):
    for config, message in (
        ({"peft_type": "VERA"}, "its peft_type is VERA, and only LORA, LOHA, LOKR, IA3 are compared"),
        ({"peft_type": "PROMPT_TUNING"}, "its peft_type is PROMPT_TUNING"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa', which changes the weights of its base"),
        ({"bias": "all"}, "with bias='all' it changes biases of its base"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "it has layer_replication, which changes how its base runs"),
    ):
        broken = str(shutil.copytree(adapter, tmp_path / message[:20]))
        edit(broken, **config)
        with pytest.raises(ModelError, match=f"weak_adapter is .*, an adapter that can't be used: .*{message}"):
            ask(base, base, weak_adapter=broken)
    edit(adapter, base_model_name_or_path=None)
    with pytest.raises(ModelError, match="config names no base. Write .* or pass the base as cdr_strong and"):
        ask(adapter, base)


@pytest.mark.parametrize("pickled", [False, True])
def test_an_adapter_without_safetensors(pickled, base, adapter, monkeypatch):
    path = Path(adapter) / "adapter_model.safetensors"
    if pickled:
        path.rename(path.with_name("adapter_model.bin"))
    else:
        path.unlink()
    monkeypatch.setattr("torch.load", None)
    for options in ({"strong": base, "weak": base, "strong_adapter": adapter}, {"strong": adapter, "weak": base}):
        with pytest.raises(
            ModelError, match=r"an adapter without adapter_model.safetensors. Adapters are read from saf"
        ):
            DensityRatioScorer(**options).load()


def test_nothing_where_an_adapter_should_be(base, tmp_path):
    for name in (str(tmp_path), "no/such-adapter", base):
        with pytest.raises(ModelError, match=r"strong_adapter is .*, where no adapter_config.json can be found"):
            ask(base, base, strong_adapter=name)


def test_an_adapter_on_an_adapter(base, adapter, saved, tmp_path):
    with pytest.raises(ModelError, match=r"strong is the adapter .* on .*, which is an adapter itself. Merge one"):
        ask(adapter, base, strong_adapter=saved)
    edit(adapter, base_model_name_or_path=saved)
    with pytest.raises(ModelError, match=r"strong is the adapter .* on .*, which is an adapter itself. Merge one"):
        ask(adapter, base)


def test_a_config_that_is_none(base, adapter):
    (Path(adapter) / "adapter_config.json").write_text("{")
    with pytest.raises(ModelError, match="strong_adapter is .*, whose adapter_config.json can't be read"):
        ask(base, base, strong_adapter=adapter)


def test_a_revision_without_an_adapter():
    with pytest.raises(ConfigError, match="cdr_weak_adapter_revision is 'x' and cdr_weak_adapter is missing. Pass the"):
        CDRConfig("a", "b", cdr_weak_adapter_revision="x")
    with pytest.raises(ConfigError, match="cdr_weak_adapter is empty"):
        CDRConfig("a", "b", cdr_weak_adapter=" ")


@pytest.mark.parametrize(
    ("address", "served"),
    [
        ("vllm://gpu1:8000/Qwen/Qwen2.5-7B", Served(("http://gpu1:8000",), "Qwen/Qwen2.5-7B")),
        ("vllm://gpu1:8000//data/model/", Served(("http://gpu1:8000",), "/data/model")),
        ("vllm+https://gpu1/m", Served(("https://gpu1",), "m")),
        ("vllm://[::1]:8000/m?timeout=5", Served(("http://[::1]:8000",), "m", timeout=5.0)),
        (
            "vllm://a:1/m?tokenizer=some/base&timeout=0.5, vllm://b:2/m,vllm://a:1/m",
            Served(("http://a:1", "http://b:2"), "m", "some/base", 0.5),
        ),
    ],
)
def test_addresses_of_servers(address, served):
    assert read_served(address, "weak") == served


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("vllm://gpu1:8000", "cdr_weak is 'vllm://gpu1:8000', of which .* can't be read. Write vllm://HOST:PORT/MODEL"),
        ("vllm://gpu1:8000/", "can't be read"),
        ("vllm:///m", "can't be read"),
        ("vllm://gpu1:port/m", "can't be read"),
        ("vllm://a:1/m,b:2/m", "of which 'b:2/m' can't be read"),
        ("vllm://me:secret@a:1/m", "cdr_weak has a user or password in its address.*VLLM_API_KEY"),
        ("vllm://a:1/m,vllm://b:1/n", "cdr_weak names replicas of 'm' and of 'n'"),
        ("vllm://a:1/m?key=x", r"cdr_weak has \?key= in its address. Known there: tokenizer, timeout"),
        ("vllm://a:1/m?timeout=soon", "cdr_weak has timeout=soon in its address"),
        ("vllm://a:1/m?timeout=0", "cdr_weak has timeout=0 in its address"),
    ],
)
def test_addresses_that_are_none(address, message):
    with pytest.raises(ConfigError, match=message) as error:
        DensityRatioScorer("a", address)
    assert "secret" not in str(error.value)


def test_what_is_on_a_server_is_nowhere_here(base):
    config = CDRConfig.from_options(strong=base, weak="vllm://a:1/m")
    assert list(find_sources(config)) == ["strong"]
    assert not share_base(config, find_sources(config))
