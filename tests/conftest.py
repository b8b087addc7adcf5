"""No test reaches a network or rests on a draw; the demo's models are built once a session, in a folder of its own.

`HYPOTHESIS_PROFILE=nightly` searches with fresh seeds, and longer.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CI"] = "1"  # TRL sends no telemetry
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from hypothesis import HealthCheck, settings
from tiny import byte_tokenizer, llama

# A clone's first run is every run: the same examples, no clock, nothing remembered.
NO_CLOCK = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("default", derandomize=True, database=None, **NO_CLOCK)
settings.register_profile("nightly", max_examples=2000, **NO_CLOCK)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(scope="session", autouse=True)
def _demo_cache(tmp_path_factory):
    os.environ.setdefault("TRL_CDR_CACHE", str(tmp_path_factory.mktemp("cache")))


def pytest_addoption(parser):
    parser.addoption("--demo_output", help="output folder of a `trl-cdr demo` that has run; else the test runs one")


@pytest.fixture(scope="session")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="session")
def strong(tokenizer):
    return llama(len(tokenizer), seed=0)


@pytest.fixture(scope="session")
def weak(tokenizer):
    return llama(len(tokenizer), seed=1)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory, tokenizer, strong, weak):
    """Folders of a saved strong/weak pair."""
    folders = {}
    for name, model in (("strong", strong), ("weak", weak)):
        folders[name] = str(tmp_path_factory.mktemp("pair") / name)
        model.save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    return folders


@pytest.fixture(scope="session")
def quick(tmp_path_factory, tokenizer):
    """Folder of a policy that ends most of its completions soon."""
    model = llama(len(tokenizer), seed=3)
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] *= 8
    folder = tmp_path_factory.mktemp("policy")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def smollm_folder():
    """The packaged real model, converted once a session, or found in the cache that `TRL_CDR_CACHE` names."""
    from trl_cdr.demo.smollm import build_smollm

    return build_smollm()


def pytest_collection_modifyitems(items):
    from trl_cdr import ModelError
    from trl_cdr.demo.smollm import find_packaged

    if not any(item.get_closest_marker("real") for item in items):
        return
    try:
        find_packaged()
    except ModelError as missing:
        for item in items:
            if item.get_closest_marker("real"):
                item.add_marker(pytest.mark.skip(reason=str(missing)))
