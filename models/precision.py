"""What a model computes in: float32, or bf16 (autocast) where the hardware has instructions for it."""

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.distributed as dist

Precision = Literal["bf16", "fp32"]

_CPU_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")
"""Any of them, as torch names what a processor of x86 or Arm has."""


def supported(device: torch.device) -> bool:
    """Whether the device computes bf16 faster than float32, not merely somehow."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities: dict[str, Any] = dict(torch.cpu.get_capabilities())
    return any(capabilities.get(name) for name in _CPU_INSTRUCTIONS)


def agreed(wanted: Precision, device: torch.device) -> Precision:
    """The wanted precision, or float32 where any worker's device has no fast bf16: the same on all workers.

    Every worker of the default process group, if there is one, must call it.
    """
    fast = torch.tensor(int(supported(device)), device=device)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(fast, dist.ReduceOp.MIN)
    return wanted if fast else "fp32"


@contextlib.contextmanager
def autocast(device: torch.device, precision: Precision) -> Iterator[None]:
    """Runs the block's matrix multiplications in bf16, or all in float32."""
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        yield
