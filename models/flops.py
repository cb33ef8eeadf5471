"""How much of a device's arithmetic a training run uses: model FLOPs utilization (Chowdhery et al. 2022, PaLM)."""

import time
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from models.precision import DTYPES, autocast
from models.settings import Precision

PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "GH200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A10": 125e12,
    "A30": 165e12,
    "RTX A6000": 155e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "V100": 125e12,
    "T4": 65e12,
}
"""FLOP/s of dense half-precision matrix products, from the makers' data sheets; the first name that fits counts."""

_SIZE, _SECONDS = 1024, 0.2


def peak(device: torch.device, precision: Precision) -> float | None:
    """A device's FLOP/s: of a GPU from the table, None where it is unknown; of CPU threads measured, in 0.2 s."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return next((value for known, value in PEAKS.items() if known in name), None) if precision != "fp32" else None
    if device.type != "cpu":
        return None
    matrix = torch.ones(_SIZE, _SIZE, dtype=DTYPES[precision])
    matrix @ matrix
    started, products = time.monotonic(), 0
    while (seconds := time.monotonic() - started) < _SECONDS:
        matrix @ matrix
        products += 1
    return 2.0 * _SIZE**3 * products / seconds


@torch.no_grad()
def training_flops(
    model: PreTrainedModel, inputs: Mapping[str, Tensor], device: torch.device, precision: Precision
) -> int:
    """FLOPs of a training step over a microbatch: its matrix products forward, and twice as many backward."""
    with FlopCounterMode(display=False) as counter, autocast(device, precision):
        model(**{name: value.to(device) for name, value in inputs.items()})
    return 3 * int(counter.get_total_flops())
