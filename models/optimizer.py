"""The optimizer and its learning rate's schedule."""

from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler


def build_optimizer(model: nn.Module, learning_rate: float, weight_decay: float) -> AdamW:
    """Fused AdamW (Loshchilov and Hutter 2019); biases and normalisations are not decayed."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return AdamW([group for group in groups if group["params"]], lr=learning_rate, fused=True)


def build_schedule(optimizer: AdamW, kind: str, steps: int, warmup: float) -> LRScheduler:
    """transformers' learning rate schedule `kind` over `steps`, the share `warmup` of them rising."""
    name = "constant_with_warmup" if kind == "constant" else kind
    schedule: LRScheduler = get_scheduler(
        name, optimizer, num_warmup_steps=round(steps * warmup), num_training_steps=steps
    )
    return schedule
