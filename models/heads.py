"""Attention heads that matter little: found by the gradient of a mask, and removed (Michel et al. 2019).

("Are Sixteen Heads Really Better than One?", arXiv 1905.10650.) A share of the heads can go without training anew. What
is left is smaller in fact: the projections lose the removed heads' rows and columns. Layers then differ in their number
of heads, which no config of these architectures can say, so such a classifier is for an export alone.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from models.first_token import KIN
from models.settings import InputError


def head_importance(
    model: PreTrainedModel,
    batches: Iterable[tuple[Mapping[str, Tensor], Mapping[str, Tensor]]],
    loss: Callable[[Tensor, Mapping[str, Tensor]], Tensor],
) -> Tensor:
    """How much the loss depends on each head, [layers, heads]: the mean over texts of |d loss / d mask of the head|.

    Each layer's are divided by their Euclidean norm, since layers differ in scale (Molchanov et al. 2017, as Michel et
    al.).

    Args:
        model: in evaluation mode.
        batches: of inputs (the model's keyword arguments) and labels.
        loss: the sum over a batch's texts, from logits and labels.

    Raises:
        InputError: the model's heads cannot be told apart.
    """
    layers = _layers(model)
    found = torch.zeros(len(layers), layers[0].attention.self.num_attention_heads)
    for inputs, labels in batches:
        texts = len(next(iter(inputs.values())))
        # One for each text, whose gradients must not cancel each other.
        masks = [torch.ones(texts, found.shape[1], requires_grad=True) for _ in layers]
        hooks = [
            layer.attention.output.dense.register_forward_pre_hook(partial(_masked, mask))
            for layer, mask in zip(layers, masks, strict=True)
        ]
        try:
            with torch.enable_grad():
                gradients = torch.autograd.grad(loss(model(**inputs).logits, labels), masks)
        finally:
            for hook in hooks:
                hook.remove()
        found += torch.stack([gradient.abs().sum(0) for gradient in gradients])
    normed: Tensor = found / found.norm(dim=1, keepdim=True).clamp_min(1e-20)
    return normed


def _masked(mask: Tensor, _: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What the heads found, [texts, tokens, heads x size], each text's heads times its mask [texts, heads]."""
    values, *rest = given
    return ((values.unflatten(-1, (mask.shape[1], -1)) * mask[:, None, :, None]).flatten(-2), *rest)


def least_important(importance: Tensor, share: float) -> list[list[int]]:
    """By layer, the heads to remove: the least important `share` of all; each layer keeps its best one at least."""
    layers, heads = importance.shape
    best = importance.argmax(1).tolist()
    order = importance.flatten().argsort(stable=True).tolist()
    removable = [(layer, head) for layer, head in (divmod(place, heads) for place in order) if head != best[layer]]
    chosen = removable[: int(share * layers * heads)]
    return [sorted(head for layer, head in chosen if layer == number) for number in range(layers)]


def remove_heads(model: PreTrainedModel, removed: Sequence[Sequence[int]]) -> None:
    """Removes each layer's heads from the model: it then computes as if their output were zero.

    Raises:
        InputError: the model's heads cannot be removed.
    """
    for layer, gone in zip(_layers(model), removed, strict=True):
        own = layer.attention.self
        kept = [head for head in range(own.num_attention_heads) if head not in gone]
        size = own.attention_head_size
        places = torch.cat([torch.arange(head * size, (head + 1) * size) for head in kept])
        for name in ("query", "key", "value"):
            setattr(own, name, _sliced(getattr(own, name), places, 0))
        layer.attention.output.dense = _sliced(layer.attention.output.dense, places, 1)
        own.num_attention_heads, own.all_head_size = len(kept), len(places)


def _sliced(linear: nn.Linear, places: Tensor, dimension: int) -> nn.Linear:
    weight = linear.weight.detach().index_select(dimension, places)
    sliced = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
    with torch.no_grad():
        sliced.weight.copy_(weight)
        sliced.bias.copy_(linear.bias[places] if dimension == 0 else linear.bias)
    return sliced


def _layers(model: PreTrainedModel) -> list[Any]:
    """The layers, whose attention is that of BERT."""
    if model.config.model_type not in KIN or model.config.is_decoder:
        raise InputError(
            f"heads of {model.config.model_type} models cannot be removed, only those of {', '.join(sorted(KIN))}."
        )
    encoder: Any = model.base_model.encoder
    return list(encoder.layer)
