"""Everything a training run needs to go on, in a folder without pickles: safetensors and JSON."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel

TENSORS = "state.safetensors"
REST = "state.json"


def save_state(
    folder: Path, model: PreTrainedModel, optimizer: AdamW, schedule: LRScheduler, progress: dict[str, Any]
) -> None:
    """Writes the weights that are trained, the optimizer's and the schedule's state, and `progress` (plain JSON)."""
    tensors: dict[str, Tensor] = {f"model.{name}": p.detach() for name, p in trained(model).items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": value for key, value in state.items()}
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / TENSORS)
    (folder / REST).write_text(json.dumps({"progress": progress, "schedule": schedule.state_dict()}), encoding="utf-8")


def load_state(folder: Path, model: PreTrainedModel, optimizer: AdamW, schedule: LRScheduler) -> dict[str, Any]:
    """Restores what `save_state` wrote and returns its `progress`."""
    tensors = load_file(folder / TENSORS)
    with torch.no_grad():
        for name, parameter in trained(model).items():
            parameter.copy_(tensors[f"model.{name}"])
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".")
            state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    rest = json.loads((folder / REST).read_text(encoding="utf-8"))
    schedule.load_state_dict(rest["schedule"])
    # The groups' rates are the schedule's to set; it does so at its next step only.
    for group, rate in zip(optimizer.param_groups, schedule.get_last_lr(), strict=True):
        group["lr"] = rate
    progress: dict[str, Any] = rest["progress"]
    return progress


def trained(model: PreTrainedModel) -> dict[str, Tensor]:
    """The parameters that are trained, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
