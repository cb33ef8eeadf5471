"""The last layer only for the token that is read.

The classification heads of BERT and its kin read the first token's vector and nothing else. What the last layer does
for the other tokens, beyond their keys and values, is never seen: leaving it out saves a seventh of the products with
weights in an encoder of 6 layers, forward and backward, and changes no result but by rounding.
"""

from functools import partial
from typing import Any

from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

KIN = {"bert", "camembert", "electra", "roberta", "xlm-roberta"}
"""Types of encoders whose layers are made alike and whose heads read the first token."""


def skip_unread_tokens(model: PreTrainedModel) -> None:
    """Makes a classifier's last layer give the first token's vector alone; models of another make stay as they are."""
    config = model.config
    if config.model_type in KIN and not config.is_decoder and config._attn_implementation == "sdpa":
        encoder: Any = model.base_model.encoder
        encoder.layer[-1].forward = partial(_first_token, encoder.layer[-1])


def _first_token(layer: Any, hidden: Tensor, mask: Tensor | None = None, *_: Any, **others: Any) -> Tensor:
    """The layer's output at the first place: [texts, 1, width] from [texts, tokens, width].

    Or from [1, tokens of all texts, width] where a layout says where they begin (`models.unpadded`).
    """
    own, layout = layer.attention.self, others.get("layout")
    first = hidden[:, :1] if layout is None else hidden[:, layout.bounds[:-1]]

    def heads(values: Tensor) -> Tensor:
        split: Tensor = values.unflatten(-1, (own.num_attention_heads, own.attention_head_size))
        return split.transpose(1, 2)

    attend = AttentionInterface()[own.config._attn_implementation]
    context, _weights = attend(
        own,
        heads(own.query(first)),
        heads(own.key(hidden)),
        heads(own.value(hidden)),
        mask if mask is None else mask[:, :, :1],
        dropout=own.dropout.p if own.training else 0.0,
        scaling=own.scaling,
        **({} if layout is None else {"layout": layout}),
    )
    output: Tensor = layer.feed_forward_chunk(layer.attention.output(context.flatten(-2), first))
    return output if layout is None else output.transpose(0, 1)
