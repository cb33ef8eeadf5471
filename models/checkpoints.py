"""The tensors that a training run needs to go on, by name, whatever their layout on the workers."""

import torch
from torch import Tensor, nn
from torch.optim import AdamW

_MOMENTS = ("exp_avg", "exp_avg_sq")


def training_state(model: nn.Module, optimizer: AdamW) -> dict[str, Tensor]:
    """The trained weights and the optimizer's state: `model.<parameter>`, `optimizer.<parameter>.<key>`.

    The tensors are those in use: what is loaded into them is restored. Names do not depend on the number of workers,
    nor on whether the weights are replicated or sharded (DTensor), so that a checkpoint of one layout serves another.
    """
    state: dict[str, Tensor] = {}
    for name, parameter in trained(model).items():
        state[f"model.{name}"] = parameter.detach()
        kept = optimizer.state[parameter]
        if not kept:  # As AdamW makes it at its first step.
            kept["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            kept |= {moment: torch.zeros_like(parameter.detach()) for moment in _MOMENTS}
        state |= {f"optimizer.{name}.{key}": kept[key] for key in ("step", *_MOMENTS)}
    return state


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
