"""Keys and values of earlier tokens under any name: found, stored, read back and shared. On every supported version."""

import random

import pytest
import torch
from families import FAMILIES, V, build_family
from tiny import llama
from transformers import DynamicCache

from trl_cdr.scoring.forward import Decoder
from trl_cdr.scoring.kv_cache import fill_cache, find_argument, find_shareable, read_cache

pytestmark = [
    pytest.mark.compat,
    pytest.mark.filterwarnings("ignore:The `sliding_window_pattern` attribute is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*have no functionality in BLOOM:FutureWarning"),  # transformers 4
]
IDS = torch.tensor([[5, 7, 11, 13, 17, 19]])


def decoder(name):
    model = build_family(name)
    return Decoder(model, model.config)


@pytest.mark.parametrize("name", [name for name, (*_, way) in FAMILIES.items() if way == "packed"])
def test_hidden_continues_from_kept_states(name):
    """Keys and values of four tokens, stored and read back, give the next two tokens the states of one forward."""
    model = decoder(name)
    with torch.inference_mode():
        whole = model.hidden(IDS)
        cache = DynamicCache()
        model.hidden(IDS[:, :4], cache=cache)
        states = read_cache(cache)
        continued = model.hidden(IDS[:, 4:], cache=fill_cache(states))
    torch.testing.assert_close(continued, whole[:, 4:], rtol=0, atol=1e-4)
    assert [keys.shape[2] for keys, _ in states] == [4] * model.config.num_hidden_layers  # and nothing was added


def test_find_argument_names_every_failure():
    def ignores(input_ids, use_cache, return_dict, **_):
        pass

    def refuses(input_ids, use_cache, return_dict, cache=None):
        raise NotImplementedError("not on\nthis device")

    with pytest.raises(TypeError, match="with cache: after 6 tokens .* of 0; with past_key_values: after 6 tokens"):
        find_argument(ignores, IDS)
    with pytest.raises(TypeError, match="with cache: NotImplementedError: not on this device; with past_key_v"):
        find_argument(refuses, IDS)


def test_find_argument_passes_a_lack_of_memory_on():
    def exhausted(**_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(torch.OutOfMemoryError):
        find_argument(exhausted, IDS)


def generate(model, ids, **options):
    with torch.inference_mode():
        return model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            pad_token_id=0,
            return_dict_in_generate=True,
            **options,
        )


@pytest.mark.parametrize("name", FAMILIES)
def test_find_shareable_continues_or_refuses(name):
    """Two sequences continue from one prompt as if each had read it, or the reason is given."""
    model = build_family(name)
    draw = random.Random(0)
    prompt = torch.tensor([[draw.randrange(1, V) for _ in range(9)]])
    read = generate(model, prompt[:, :-1], max_new_tokens=1)
    try:
        shared = find_shareable(read, length=8)
    except TypeError:
        if FAMILIES[name][3] == "packed":
            raise
        return
    for cache in shared.values():
        cache.reorder_cache(torch.tensor([0, 0]))
    continued = generate(model, prompt.repeat(2, 1), max_new_tokens=5, **shared).sequences
    assert torch.equal(continued, generate(model, prompt.repeat(2, 1), max_new_tokens=5).sequences)


def test_find_shareable_refuses_what_it_does_not_know():
    with pytest.raises(TypeError, match="generate returns no keys and values"):
        find_shareable({}, length=8)
    with pytest.raises(TypeError, match="generate returns a tuple, not a DynamicCache"):
        find_shareable({"past_key_values": ()}, length=8)
    model = llama(V)
    with pytest.raises(TypeError, match="after 9 tokens the cache has keys and values of 6"):
        find_shareable(generate(model, IDS, max_new_tokens=1), length=9)
