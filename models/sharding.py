"""Weights, gradients and the optimizer's state spread over the workers: FSDP2 (`fully_shard`).

Each worker keeps a part of every tensor and borrows the others' parts for as long as a layer computes (Zhao et al.
2023, arXiv 2304.11277; Rajbhandari et al. 2020, ZeRO). So all workers must run forward and backward equally often, and
gradients are summed in floating point by a collective whose order depends on the number of workers: the run is not
the same to the bit for every number of them, as a replicated one is. Gradients are exchanged after each microbatch, not
once a step, for no worker has room to keep whole ones.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from models.fixedpoint import FloatSum
from models.layers import layers_of
from models.precision import DTYPES
from models.settings import Precision


def shard(model: PreTrainedModel, device: torch.device, precision: Precision, workers: int) -> None:
    """Spreads a model over the workers, each of which must call it with the same model; its weights move to `device`.

    A layer's weights, those of its normalisations too, are borrowed in `precision`; gradients are added up in float32
    after each microbatch.
    """
    mesh = init_device_mesh(device.type, (workers,))
    borrowed = None if precision == "fp32" else DTYPES[precision]
    policy = MixedPrecisionPolicy(param_dtype=borrowed, reduce_dtype=torch.float32)
    for module in (*layers_of(model), model):
        # By default the outermost module keeps what it borrowed until a backward pass, which validation has none of.
        sharded = fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        # A step's gradient is a sum over its texts, not a mean over workers.
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` has spread it."""
    return isinstance(model, FSDPModule)


def gathered(tensors: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """The tensors, whole, in the first worker's memory; nothing at the others, all of which must call it."""
    whole: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        full = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()
        if rank == 0:
            whole[name] = full.to("cpu", copy=True, memory_format=torch.contiguous_format)
    return whole


class ShardedSum(FloatSum):
    """Gradients of a sharded model: `fully_shard` adds them up over the workers after each backward pass.

    All workers must call all methods but `forget` and `release` together.
    """

    def _reduce_over_workers(self, gradients: Sequence[Tensor]) -> None:
        pass

    def holds(self) -> bool:
        """Whether the gradients, of all workers, are finite."""
        norm = nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        return bool((norm.full_tensor() if isinstance(norm, DTensor) else norm).isfinite())
