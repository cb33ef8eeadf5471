"""What a model computes in: float32, or half of it (bf16, fp16) by autocast where the hardware has instructions for it.

fp16 reaches from 6e-8 to 65,504 only, so gradients are scaled up on the way through it (`LossScale`); bf16 has
float32's range and needs nothing of the kind.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from models.settings import Precision

DTYPES: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

_CPU_INSTRUCTIONS: dict[Precision, tuple[str, ...]] = {
    "bf16": ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"),
    "fp16": ("avx512_fp16", "amx_fp16", "fp16_arith"),
}
"""Any of them, as torch names what a processor of x86 or Arm has."""


def supported(device: torch.device, precision: Precision) -> bool:
    """Whether the device computes faster in it than in float32, not merely somehow."""
    if precision == "fp32":
        return True
    if device.type == "cuda":
        return precision == "fp16" or bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities: dict[str, Any] = dict(torch.cpu.get_capabilities())
    return any(capabilities.get(name) for name in _CPU_INSTRUCTIONS[precision])


def _candidates(wanted: Precision, device: torch.device) -> tuple[Precision, ...]:
    """What is wanted, and what serves in its place, the best first."""
    if wanted == "bf16" and device.type == "cuda":
        return ("bf16", "fp16", "fp32")
    return (wanted, "fp32")


def usable(wanted: Precision, device: torch.device) -> Precision:
    """The wanted precision, or the next best that the device supports: fp16 on a GPU without bf16, else float32."""
    return next(each for each in _candidates(wanted, device) if supported(device, each))


def agreed(wanted: Precision, device: torch.device) -> Precision:
    """As `usable`, but supported by the devices of all workers of the default process group, each of which must ask."""
    candidates = _candidates(wanted, device)
    fast = torch.tensor([int(supported(device, each)) for each in candidates], device=device)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(fast, dist.ReduceOp.MIN)
    return candidates[fast.tolist().index(1)]


@contextlib.contextmanager
def autocast(device: torch.device, precision: Precision) -> Iterator[None]:
    """Runs the block's matrix multiplications in the precision."""
    half = precision != "fp32"
    with torch.autocast(device.type, dtype=DTYPES[precision] if half else None, enabled=half):
        yield


@dataclass
class LossScale:
    """What losses are multiplied by on the way through fp16, so that small gradients are not lost.

    Doubled after `patience` steps without an overflow and halved at each, as in Micikevicius et al. 2018 (and torch's
    GradScaler); but a step that overflowed is taken again, not left out, so that no row is lost. Being powers of two,
    scales change nothing but what would have been lost.
    """

    value: float = 2.0**16
    steady: int = 0
    """Steps since the last change."""
    patience: int = 2000

    def held(self) -> None:
        """A step has gone well."""
        self.steady += 1
        if self.steady >= self.patience:
            self.value, self.steady = min(self.value * 2, 2.0**24), 0

    def lower(self) -> bool:
        """A step has overflowed; whether there is a lower scale to try it again with."""
        if self.value <= 1:
            return False
        self.value, self.steady = self.value / 2, 0
        return True
