"""What can be done to an encoder's layers to save memory or time: computed twice, compiled.

`models.sharding` spreads them over workers.
"""

import torch._dynamo
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from models import dropout
from models.settings import InputError


def layers_of(model: PreTrainedModel) -> list[nn.Module]:
    """The layers that an encoder is a stack of."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def checkpoint_activations(model: PreTrainedModel, section: str) -> None:
    """Keeps only the layers' inputs for the backward pass, which computes the rest again: the same bits.

    (Chen et al. 2016, arXiv 1604.06174.) A last layer that works only for the first token (`models.first_token`) is
    left as it is. To be called after `dropout.use_stream`, if at all: the masks are drawn again. `section` is where
    the recipe asked for it.

    Raises:
        InputError: the model cannot do it.
    """
    replayed = {"context_fn": dropout.replayed} if dropout.uses_stream(model) else {}
    try:
        model.activation_checkpointing_enable({"use_reentrant": False, **replayed})
    except ValueError as error:
        raise InputError(
            f"{section}.activation_checkpointing: {model.config.model_type} models cannot; leave it out."
        ) from error
    model.config.use_cache = False  # It would keep what is not to be kept.


def compile_layers(model: PreTrainedModel, section: str) -> None:
    """Compiles the layers for inputs of any size; the layers being alike, their code is made once.

    What is made may depend on the sizes that are seen first, so all workers should begin with the same
    (`models.training.LaneTrainer.warm_up`).

    Raises:
        InputError: there are no layers that can be compiled each.
    """
    layers = layers_of(model)
    if not layers:
        raise InputError(f"{section}.compile: {model.config.model_type} models cannot be compiled; leave it out.")
    # A layer's code comes in kinds (training or not, with a mask or without, the last layer). Beyond the limit, 8 by
    # default, torch would go on without compiling.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
    for layer in layers:
        layer.compile(dynamic=True)
