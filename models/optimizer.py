"""The optimizer and its learning rate's schedule."""

from functools import partial

from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import get_scheduler


def build_optimizer(model: nn.Module, learning_rate: float, weight_decay: float) -> AdamW:
    """Fused AdamW (Loshchilov and Hutter 2019); biases and normalisations are not decayed."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return AdamW([group for group in groups if group["params"]], lr=learning_rate, fused=True)


def wsd_rate(step: int, warm: int, fork: int, end: int) -> float:
    """Warm-up, stable, decay (Hu et al. 2024, arXiv 2404.06395): a step's share of the peak rate, counted from 0.

    The rate rises over `warm` steps, stays, and falls in a line from step `fork` on, to nothing after step `end`.
    """
    if step < warm:
        return (step + 1) / (warm + 1)
    if step < fork:
        return 1.0
    return max(end - step, 0) / (end - fork + 1)


def wsd_fork(warm: int, end: int, decay: float) -> int:
    """The step at which the rate begins to fall, where it does so over a share `decay` of those after the warm-up."""
    return end - max(round((end - warm) * decay), 1)


def build_schedule(optimizer: AdamW, kind: str, steps: int, warmup: float, decay: float = 0.2) -> LRScheduler:
    """A learning rate schedule over `steps`, the share `warmup` of them rising: `wsd`, or transformers' of that name.

    `decay` is the share of the steps after the warm-up during which the rate of `wsd` falls.
    """
    if kind == "wsd":
        warm = round(steps * warmup)
        return LambdaLR(optimizer, partial(wsd_rate, warm=warm, fork=wsd_fork(warm, steps, decay), end=steps))
    name = "constant_with_warmup" if kind == "constant" else kind
    schedule: LRScheduler = get_scheduler(
        name, optimizer, num_warmup_steps=round(steps * warmup), num_training_steps=steps
    )
    return schedule
