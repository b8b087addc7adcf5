"""No test reaches a network; the demo's models are built once a session, in a folder of its own."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CI"] = "1"  # TRL sends no telemetry
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
from tiny import byte_tokenizer, llama


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
