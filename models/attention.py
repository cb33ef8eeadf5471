"""Attention within each of several texts that are laid end to end (`models.unpadded`), and its name to transformers.

Texts of one length are computed at once; on GPUs all are, by the kernels for variable lengths of flash attention
(Dao 2023, arXiv 2307.08691), as torch brings them.
"""

from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

UNPADDED = "unpadded"
"""What transformers knows it by."""

_UNKNOWN = ("position_bias", "softcap", "s_aux", "cache")
"""What some architectures' attention has besides."""


class Layout(NamedTuple):
    """Where texts stand in a row."""

    bounds: Tensor
    """Where each begins, and the end of the last: int32 [texts + 1], on the model's device."""
    host_bounds: Tensor
    """The same on the CPU, for reading them must not wait for a GPU."""

    def lengths(self) -> list[int]:
        """The tokens of each text."""
        found: list[int] = self.host_bounds.diff().tolist()
        return found


@torch.library.custom_op("shoal::attend_within", mutates_args=())
def attend_within(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    host_bounds: Tensor,
    scale: float | None,
    causal: bool,
    window: int | None,
) -> Tensor:
    """The attention of each text to itself: [queries, heads, width].

    To a compiler it is one operation, so that how many texts there are of which lengths is no matter of its code.

    Args:
        query: [tokens, heads, width], or of each text's first token alone: [texts, heads, width].
        key: [tokens, heads, width]; a divisor of the query's heads will do.
        value: as the key.
        bounds: see `Layout`.
        host_bounds: see `Layout`.
        scale: of the products; None for one over the root of the width.
        causal: whether a token sees none after it.
        window: whether it sees only those less than so many places away.
    """
    return _attend_within(query, key, value, Layout(bounds, host_bounds), scale, causal, window)


@attend_within.register_fake
def _(query: Tensor, *_: Any) -> Tensor:
    return query.new_empty(query.shape)


def _attend_within(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    scale: float | None,
    causal: bool,
    window: int | None,
) -> Tensor:
    # Rotated queries and keys may be float32 where autocast gave the values in less.
    query, key = query.to(value.dtype), key.to(value.dtype)
    first_only = len(query) != len(key)
    if query.is_cuda:
        return _by_flash(query, key, value, layout, first_only, scale, causal, window)
    return _by_length(query, key, value, layout, first_only, scale, causal, window)


def _by_flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    first_only: bool,
    scale: float | None,
    causal: bool,
    window: int | None,
) -> Tensor:
    longest, reach = max(layout.lengths()), -1 if window is None else window - 1
    found = varlen_attn(
        query,
        key,
        value,
        torch.arange(len(query) + 1, dtype=torch.int32, device=query.device) if first_only else layout.bounds,
        layout.bounds,
        1 if first_only else longest,
        longest,
        scale=scale,
        window_size=(reach, 0 if causal else reach),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(found, Tensor)
    return found


def _by_length(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    first_only: bool,
    scale: float | None,
    causal: bool,
    window: int | None,
) -> Tensor:
    found = []
    asked = start = 0
    for length, same in groupby(layout.lengths()):
        texts = len(list(same))
        queries = 1 if first_only else length
        places = slice(start, start + texts * length)
        asking = slice(asked, asked + texts * queries)
        start, asked = places.stop, asking.stop
        q, k, v = (
            rows.unflatten(0, (texts, -1)).transpose(1, 2) for rows in (query[asking], key[places], value[places])
        )
        near = None
        if window is not None and length > window and not first_only:
            place = torch.arange(length)
            distance = place[:, None] - place
            near = (distance < window) & ((distance >= 0) if causal else (distance > -window))
        found.append(
            scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=near,
                is_causal=causal and near is None and not first_only,
                scale=scale,
                enable_gqa=q.shape[1] != k.shape[1],
            )
            .transpose(1, 2)
            .flatten(0, 1)
        )
    return torch.cat(found) if len(found) > 1 else found[0]


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    scaling: float | None = None,
    layout: Layout | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """As transformers calls an attention: [rows, heads, tokens, width] in, [rows, tokens, heads, width] out.

    Without a layout, and so for whoever calls the model by itself, it is the plain one.
    """
    if layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **others)
    if unknown := [name for name in _UNKNOWN if others.get(name) is not None]:
        raise NotImplementedError(f"its attention has {', '.join(unknown)}")
    causal = others.get("is_causal")
    causal = bool(getattr(module, "is_causal", True) if causal is None else causal)
    window = others.get("sliding_window")
    q, k, v = (each[0].transpose(0, 1) for each in (query, key, value))
    if torch.compiler.is_compiling():
        found = attend_within(q, k, v, layout.bounds, layout.host_bounds, scaling, causal, window)
    else:  # An operation of Python's own takes some time to call.
        found = _attend_within(q, k, v, layout, scaling, causal, window)
    return found[None], None


AttentionInterface.register(UNPADDED, _attention)
AttentionMaskInterface.register(UNPADDED, sdpa_mask)
