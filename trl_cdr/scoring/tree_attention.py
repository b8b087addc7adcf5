"""Attention of a pack in the time of what its tokens see. Without it a mask hides the rest after it was computed."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .. import _compat
from .packing import Pack

_attend = _compat.cpu_attention()


class TreeAttention(TorchFunctionMode):
    """
    A context in which `scaled_dot_product_attention` under a pack's mask looks at nothing that the mask hides.

    A token sees the whole prefix, the whole prompt and, causally, what stands before it in its own branch. Each of the
    three is attended to apart, and their outputs are averaged by the sums of exponentials behind them, which makes it
    the softmax over all (online softmax, arXiv 1805.02867). A call under another mask (a sliding window's, or one to
    which a bias was added) is left alone, and so is one whose queries are not the pack's tokens (of a single token
    transformers 5 makes the heads of a group queries).

    Args:
        pack (`Pack`): Q tokens.
        mask (`Tensor` of shape (1, 1, Q, P + Q)): The pack's mask without a sliding window, as the model is given it.
    """

    def __init__(self, pack: Pack, mask: Tensor) -> None:
        super().__init__()
        self._mask = mask
        self._trees = pack.segments()
        self.num_calls = 0  # of attention that this context has taken over

    @staticmethod
    def suits(device: torch.device, dtype: torch.dtype) -> bool:
        """Whether a model can attend in this way: in float32 on a CPU."""
        return _attend is not None and device.type == "cpu" and dtype == torch.float32

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention and self._is_ours(*args, **kwargs):
            self.num_calls += 1
            return self._run(*args, **kwargs)
        return func(*args, **kwargs)

    def _is_ours(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **_: Any) -> bool:
        return (
            attn_mask is not None
            and attn_mask.data_ptr() == self._mask.data_ptr()
            and attn_mask.shape == self._mask.shape
            and (query.shape[2], key.shape[2]) == attn_mask.shape[2:]
            and query.shape[:2] == key.shape[:2] == value.shape[:2]  # heads are not grouped
            and query.shape[3] == value.shape[3]
        )

    def _run(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor, *, scale: float | None = None, **_: Any
    ) -> Tensor:
        assert _attend is not None
        num_prefix = attn_mask.shape[3] - attn_mask.shape[2]
        if num_prefix == 0:  # nothing is seen yet
            output = torch.zeros_like(query.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
            log_sum = query.new_full(query.shape[:3], -torch.inf)
        else:
            output, log_sum = _attend(query, key[:, :, :num_prefix], value[:, :, :num_prefix], scale=scale)
        key, value = key[:, :, num_prefix:], value[:, :, num_prefix:]

        def see(seeing: slice, seen: slice, *, is_causal: bool) -> None:
            more, more_log_sum = _attend(
                query[:, :, seeing], key[:, :, seen], value[:, :, seen], is_causal=is_causal, scale=scale
            )
            before = log_sum[:, :, seeing]
            output[:, :, seeing].lerp_(more, torch.sigmoid(more_log_sum - before)[..., None])
            torch.logaddexp(before, more_log_sum, out=before)

        for prompt, *branches in self._trees:
            for segment in (prompt, *branches):
                see(segment, segment, is_causal=True)
            if branches:
                see(slice(branches[0].start, branches[-1].stop), prompt, is_causal=False)
        return output
