"""Keys and values of earlier tokens: the argument by which a model takes them, how they are stored and read back.

The only module that knows transformers' names for them. Runs no rows: `packed` scores after them, `writers` generates
after them.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from transformers import DynamicCache

from .. import _compat

KeyValues = list[tuple[Tensor, Tensor]]
"""For each layer keys and values, (1, heads, P, head size) each."""

# transformers 5.24 renamed `past_key_values` to `cache`. Drop the old name when the floor is 5.24.
_NAMES = ("cache", "past_key_values")


def fill_cache(states: KeyValues) -> DynamicCache:
    """Return a new cache that contains these keys and values. The tensors are not copied and not changed."""
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(states):
        cache.update(keys, values, layer)
    return cache


def read_cache(cache: DynamicCache) -> KeyValues:
    """Return the keys and values that a cache contains."""
    return [(layer.keys, layer.values) for layer in cache.layers]


def find_argument(forward: Callable[..., Any], input_ids: Tensor) -> str:
    """
    Find the argument by which a model's forward takes keys and values of earlier tokens.

    The forward runs with an empty cache under each known name. The right name is the one under which the forward
    fills the cache. A signature does not decide: a forward with `**kwargs` accepts every name and may ignore it.

    Args:
        forward (`Callable`): The backbone.
        input_ids (`Tensor` of shape (1, T)): Any tokens, on the backbone's device.

    Returns:
        `str`: The name of the argument.

    Raises:
        TypeError: no name works. The message contains the reason for each name.
    """
    reasons = []
    for name in _NAMES:
        cache = DynamicCache()
        try:
            forward(input_ids=input_ids, use_cache=True, return_dict=True, **{name: cache})
        except Exception as error:  # a forward may refuse an argument with any exception
            if _compat.is_out_of_memory(error):
                raise
            reasons.append(f"with {name}: {describe_error(error)}")
            continue
        reason = _missing_tokens(cache, input_ids.shape[1])
        if reason is None:
            return name
        reasons.append(f"with {name}: {reason}")
    raise TypeError("; ".join(reasons))


def find_shareable(output: Mapping[str, Any], *, length: int) -> dict[str, DynamicCache]:
    """
    Find the keys and values in the output of `generate`, if several sequences can continue from them.

    Args:
        output (`Mapping`): The output of `generate` with `return_dict_in_generate`.
        length (`int`): Tokens that were read.

    Returns:
        `dict`: The cache under the name by which `generate` takes it.

    Raises:
        TypeError: the model keeps something else, or not of all tokens.
    """
    name = next((name for name in _NAMES if name in output.keys()), None)  # noqa: SIM118 - `in output` warns of old names
    if name is None:
        raise TypeError("generate returns no keys and values")
    cache = output[name]
    if type(cache) is not DynamicCache:
        raise TypeError(f"generate returns a {type(cache).__name__}, not a DynamicCache")
    reason = _missing_tokens(cache, length)
    if reason is not None:
        raise TypeError(reason)
    return {name: cache}


def describe_error(error: Exception) -> str:
    """Return an exception's type and its words in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _missing_tokens(cache: DynamicCache, length: int) -> str | None:
    """Return why a cache does not contain keys and values of `length` tokens, or `None` if it does."""
    try:
        found = cache.get_seq_length()
    except ValueError:  # recurrent states alone, which have no length: generate would read the prompt again after them
        found = 0
    return None if found == length else f"after {length} tokens the cache has keys and values of {found}"
