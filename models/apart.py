"""Documents of packed rows computed one by one, for models that would mix those of a row.

Documents of like length stand below each other, padded to the longest of them, as texts of a classifier do: those of 17
to 32 tokens, say, so that less than half of what is computed is padding. What follows the encoder sees rows again.
"""

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


def first_tokens(documents: Tensor) -> Tensor:
    """Which tokens are the first of their documents, [rows, tokens], from the documents' numbers."""
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return begins & (documents > 0)


def compute_apart(model: PreTrainedModel) -> None:
    """Makes a model's encoder take rows as documents; their numbers come as its `attention_mask`."""
    model.base_model.forward = _Apart(model)


def computes_apart(model: PreTrainedModel) -> bool:
    """Whether it does so."""
    return isinstance(model.base_model.forward, _Apart)


class _Apart:
    """An encoder's forward pass."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._encode = model.base_model.forward
        self._signature = inspect.signature(self._encode)
        self._pad = int(model.config.get_text_config().pad_token_id or 0)

    def __call__(self, *positional: Any, **named: Any) -> Any:
        given = self._signature.bind(*positional, **named)
        more = given.arguments.pop("kwargs", {})
        given.arguments |= more
        input_ids: Tensor = given.arguments.pop("input_ids")
        attention_mask: Tensor | None = given.arguments.pop("attention_mask", None)
        if attention_mask is None:
            raise TypeError("they take no attention mask")
        there = (attention_mask > 0).flatten()
        ids, places = input_ids.flatten()[there], there.nonzero()[:, 0]
        document = first_tokens(attention_mask).flatten()[there].cumsum(0) - 1
        lengths = torch.bincount(document)
        # A power of two and what is longer than the one before: the exponent of x - 1 where x is the length.
        size = torch.frexp((lengths - 1).float()).exponent
        parts, order = [], []
        for each in size.unique().tolist():
            chosen = size == each
            own = lengths[chosen]
            present = torch.arange(int(own.max()), device=own.device) < own[:, None]
            padded = torch.full(present.shape, self._pad, device=ids.device)
            inside = chosen[document]
            padded[present] = ids[inside]
            output = self._encode(input_ids=padded, attention_mask=present.long(), **given.arguments)
            parts.append(output[0][present])
            order.append(places[inside])
        found = torch.cat(parts)
        rows = found.new_zeros(there.numel(), found.shape[-1]).index_copy(0, torch.cat(order), found)
        return type(output)(last_hidden_state=rows.view(*attention_mask.shape, -1))
