"""Dropout for training on a CPU, where torch's takes more than a tenth of a step.

torch draws a CPU's masks one number at a time, and attention with dropout in it takes the slow road through float32.
Here masks are cut from 64 random bits four at a time, and attention's products stay in their inputs' type. The bits
are those of numpy's SFC64 (Doty-Humphrey's Small Fast Chaotic generator), whose stream is the same in all versions of
numpy. Like torch's, the stream is one for the process: `seed` begins it anew.
"""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

_LEVELS = 1 << 16
_ATTENTION = "shoal"
_bits = np.random.SFC64(0)


def seed(value: int) -> None:
    """Begins the process's stream of masks that belongs to `value`, at least 0."""
    global _bits
    _bits = np.random.SFC64(value)


def replayed() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For `torch.utils.checkpoint`: the second block draws what the first one drew, and leaves the stream as it was."""
    kept: list[Any] = []

    @contextmanager
    def remember() -> Iterator[None]:
        kept.append(_bits.state)
        yield

    @contextmanager
    def replay() -> Iterator[None]:
        now, _bits.state = _bits.state, kept[0]
        try:
            yield
        finally:
            _bits.state = now

    return remember(), replay()


def dropped(values: Tensor, probability: float) -> Tensor:
    """The values, each zeroed with `probability` (rounded to 2**-16), the others scaled up so that the mean stays."""
    level = round(probability * _LEVELS)
    if level == 0:
        return values
    if level == _LEVELS:
        return torch.zeros_like(values)
    count = math.prod(values.shape)
    drawn = torch.from_numpy(_bits.random_raw(-(-count // 4)).view(np.int16)[:count])
    mask = (drawn >= level - _LEVELS // 2).to(values.dtype)
    return values * mask.mul_(_LEVELS / (_LEVELS - level)).view(values.shape)


class StreamDropout(nn.Dropout):
    """`nn.Dropout`, with masks from the process's stream."""

    def forward(self, values: Tensor) -> Tensor:
        """The values; in training with some of them zeroed."""
        return dropped(values, self.p) if self.training else values


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """An attention function as transformers asks for it.

    From [texts, heads, tokens, width] to [texts, tokens, heads, width]. What has no dropout, or more to it than a
    mask, goes torch's way.
    """
    causal = attention_mask is None and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
    more = query.shape[1] != key.shape[1] or any(others.get(name) is not None for name in ("position_bias", "cache"))
    if not dropout or causal or more:
        done: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **others
        )
        return done
    scores = torch.matmul(query * (query.shape[-1] ** -0.5 if scaling is None else scaling), key.transpose(2, 3))
    if attention_mask is not None:
        scores = scores + _as_bias(attention_mask)
    # In float32: exact, and torch's bf16 softmax takes four times as long on a CPU.
    weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
    return torch.matmul(dropped(weights, dropout), value).transpose(1, 2).contiguous(), None


def _as_bias(mask: Tensor) -> Tensor:
    """What to add to scores: nothing where the mask is true, the least number where it is false."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape).masked_fill_(~mask, torch.finfo(torch.float32).min)


def uses_stream(model: PreTrainedModel) -> bool:
    """Whether `use_stream` was called for a model."""
    drawn = any(isinstance(module, StreamDropout) for module in model.modules())
    return drawn or model.config._attn_implementation == _ATTENTION


def use_stream(model: PreTrainedModel) -> None:
    """Makes a model draw its dropout from the process's stream."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Dropout:
                setattr(module, name, StreamDropout(child.p).train(child.training))
    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register(_ATTENTION, attention)
        AttentionMaskInterface.register(_ATTENTION, sdpa_mask)
        model.set_attn_implementation(_ATTENTION)
