"""Smaller models out of larger ones: an encoder that keeps some of its layers."""

import copy
import re
from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from models.settings import InputError


def keep_layers(model: PreTrainedModel, wanted: int | Sequence[int]) -> PreTrainedModel:
    """The model with some of its layers alone: the first so many, or those at the places in a list, from 0.

    To be trained afterwards: what is left has never worked without the rest. (Sanh et al. 2019, arXiv 1910.01108, begin
    DistilBERT with every other layer; Sajjad et al. 2020, arXiv 2004.03844, "Poor Man's BERT", compare which to keep.)
    It is a plain smaller model of its architecture, whose config says how many layers it has, so that it loads from a
    folder as any other.

    Raises:
        InputError: the encoder has no such layers, or is not one stack of them.
    """
    kind, layers = model.config.model_type, model.config.num_hidden_layers
    stack = _stack(model, layers)
    kept = list(range(wanted)) if isinstance(wanted, int) else list(wanted)
    if stack is None:
        raise InputError(f"finetune.keep_layers: {kind} models are not one stack of layers; leave it out.")
    if kept[-1] >= layers:
        named = f"keeps {wanted}" if isinstance(wanted, int) else f"names layer {kept[-1]}"
        raise InputError(
            f"finetune.keep_layers: {named}, but the encoder has {layers} layers"
            + (f", 0 to {layers - 1}." if not isinstance(wanted, int) else ".")
        )
    smaller: PreTrainedModel = type(model)(_config_of(model.config, kept))
    places = {layer: place for place, layer in enumerate(kept)}
    weights = {}
    for name, value in model.state_dict().items():
        if inside := re.fullmatch(rf"{re.escape(stack)}\.(\d+)\.(.+)", name):
            if int(inside[1]) not in places:
                continue
            name = f"{stack}.{places[int(inside[1])]}.{inside[2]}"
        weights[name] = value
    try:
        smaller.load_state_dict(weights)
    except RuntimeError as error:  # Its layers are not alike.
        raise InputError(f"finetune.keep_layers: {kind} models need their layers as they are; leave it out.") from error
    return smaller


def _stack(model: nn.Module, layers: int) -> str | None:
    """The name of the one list of so many modules that is inside no other; None where there is none, or are several."""
    lists = [name for name, each in model.named_modules() if isinstance(each, nn.ModuleList) and len(each) == layers]
    outermost = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    return outermost[0] if len(outermost) == 1 else None


def _config_of(config: PreTrainedConfig, kept: Sequence[int]) -> PreTrainedConfig:
    """The smaller model's config; what it says of each layer (`layer_types` ...) it says of those that are kept."""
    smaller, layers = copy.deepcopy(config), config.num_hidden_layers
    for name, value in vars(config).items():
        if "layer" in name and isinstance(value, list | tuple) and len(value) == layers:
            setattr(smaller, name, [value[layer] for layer in kept])
    smaller.num_hidden_layers = len(kept)
    return smaller
