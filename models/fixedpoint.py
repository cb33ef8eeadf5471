"""Sums of gradients that are the same bits in whatever order and on however many workers they are taken.

Floating-point addition is not associative, so a sum over lanes depends on how the lanes are spread over workers.
Here each lane's gradient is rounded to a multiple of 2**-34 and summed as integers, whose addition is associative.
(Kin: Demmel and Nguyen's reproducible summation, ReproBLAS; EasyScale, arXiv 2208.14228, keeps the order instead.)
The rounding, 5.8e-11, is far below Adam's epsilon of 1e-8.

Cost: one pass over the gradient for each lane, in blocks that stay in the processor's cache, while the backward
pass goes on. A sum is kept, and goes over the wire, in 32 bits (the bytes of a float32) while a running bound shows
that it fits, up to 0.12, else in 64; it is exact both ways. The input embedding's gradient stays sparse: only
rows of tokens that occur are summed and exchanged. Workers exchange through shared memory (`hostsum`) where
all are on one host.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter

from models.hostsum import WorkerSum

SCALE_BITS = 34
_SCALE = 2.0**SCALE_BITS
_LARGEST = 2.0 ** (62 - SCALE_BITS)
_LARGEST_32 = 2.0 ** (31 - SCALE_BITS) * 0.999
_BLOCK = 1 << 18


class GradientOverflowError(ArithmeticError):
    """A gradient is not finite, or its sum leaves the fixed-point range."""


class GradientSum(Protocol):
    """Sums gradients over the lanes of a step and over the workers."""

    loss_scale: float
    """A power of two that the losses were multiplied by, which is taken out of the gradients again."""

    def reduce(self) -> None:
        """Adds up over the workers and sets each parameter's `.grad`; every worker must call it.

        Raises:
            GradientOverflowError: on every worker alike, where a gradient is not finite or too large.
        """
        ...

    def holds(self) -> bool:
        """Whether the gradients that this worker has added since the last `reduce` or `forget` can be summed."""
        ...

    def forget(self) -> None:
        """Drops what this worker has added."""
        ...

    def clip(self, most: float) -> None:
        """Scales the reduced gradients down where their norm, of all together, is larger than `most`."""
        ...

    def release(self) -> None:
        """Takes the gradients away again after the optimizer's step."""
        ...


class FloatSum:
    """Sums in float32, in whatever order the lanes and workers give: the usual way, for comparison and sharding."""

    def __init__(self, parameters: Sequence[Parameter]) -> None:
        self._parameters = [p for p in parameters if p.requires_grad]
        self.loss_scale = 1.0

    def reduce(self) -> None:
        """Adds up over the workers and sets each parameter's `.grad`."""
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            elif parameter.grad.is_sparse:
                parameter.grad = parameter.grad.to_dense()
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        self._reduce_over_workers(gradients)
        if self.loss_scale != 1:
            torch._foreach_mul_(gradients, 1 / self.loss_scale)
        if not self.holds():
            self.forget()
            raise GradientOverflowError("a gradient is not finite; lower the learning rate or look at the data")

    def _reduce_over_workers(self, gradients: Sequence[Tensor]) -> None:
        if dist.is_initialized() and dist.get_world_size() > 1:
            flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
            dist.all_reduce(flat)
            for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))

    def holds(self) -> bool:
        """Whether the gradients are finite."""
        held = (p.grad for p in self._parameters if p.grad is not None)
        gradients = [gradient.coalesce().values() if gradient.is_sparse else gradient for gradient in held]
        return bool(nn.utils.get_total_norm(gradients).isfinite()) if gradients else True

    def forget(self) -> None:
        """Drops the gradients."""
        self.release()

    def clip(self, most: float) -> None:
        """Scales the reduced gradients down where their norm, of all together, is larger than `most`."""
        nn.utils.clip_grad_norm_(self._parameters, most)

    def release(self) -> None:
        """Takes the gradients away again after the optimizer's step."""
        for parameter in self._parameters:
            parameter.grad = None


class FixedPointSum:
    """Sums gradients over the lanes of a step and over the workers.

    Hooks take each parameter's gradient as soon as a backward pass has made it and free it. `reduce`, after the
    step's last lane, leaves the sum in each parameter's `.grad`: the same bits on every worker and for every
    number of workers. Every worker of the default process group must call it.
    """

    def __init__(self, parameters: Sequence[Parameter], sparse: Sequence[Parameter] = ()) -> None:
        """`sparse` are those of the parameters whose gradients come sparse (`torch.nn.Embedding(sparse=True)`)."""
        self._parameters = [p for p in parameters if p.requires_grad]
        self._is_sparse = [any(p is s for s in sparse) for p in self._parameters]
        self._sums = [self._zeros(position) for position in range(len(self._parameters))]
        self._gradients = [torch.zeros_like(p, dtype=torch.float32) for p in self._parameters]
        self._touched = [
            torch.zeros(len(p), dtype=torch.uint8, device=p.device) if s else None
            for p, s in zip(self._parameters, self._is_sparse, strict=True)
        ]
        device = self._parameters[0].device
        self._bounds = torch.zeros(len(self._parameters), dtype=torch.float64, device=device)
        self.loss_scale = 1.0
        self._float_block = torch.empty(_BLOCK)
        self._integer_block = torch.empty(_BLOCK, dtype=torch.int32)
        self._long_block = torch.empty(_BLOCK, dtype=torch.int64)
        self._workers = WorkerSum()
        self._reduced: list[tuple[Tensor, Tensor | None]] = []
        for position, parameter in enumerate(self._parameters):
            parameter.register_post_accumulate_grad_hook(self._taker(position))

    def reduce(self) -> None:
        """Adds up over the workers and sets each parameter's `.grad`.

        Raises:
            GradientOverflowError: on every worker alike, where any lane's gradient was not finite or too large.
        """
        workers = dist.get_world_size() if dist.is_initialized() else 1
        if workers > 1:
            dist.all_reduce(self._bounds)
        bounds = self._bounds.tolist()
        self._bounds.zero_()
        if not all(bound < _LARGEST for bound in bounds):
            self.forget()
            raise GradientOverflowError(
                f"a gradient is not finite or larger than {_LARGEST:.0e}; lower the learning rate or look at the data"
            )
        if workers > 1:
            for touched in self._touched:
                if touched is not None:
                    dist.all_reduce(touched, dist.ReduceOp.MAX)
        rows = [None if touched is None else touched.nonzero().squeeze(1) for touched in self._touched]
        parts = [
            (total if chosen is None else total[chosen]).reshape(-1)
            for total, chosen in zip(self._sums, rows, strict=True)
        ]
        # A dense gradient is written where it stays; of a sparse one only the rows that occur.
        targets = [
            gradient.view(-1) if chosen is None else gradient.new_empty(len(part))
            for gradient, chosen, part in zip(self._gradients, rows, parts, strict=True)
        ]
        for part, target, place in self._summed(parts, targets, bounds, workers):
            torch.mul(part, 1.0 / _SCALE, out=target[place])
        self._reduced = list(zip(targets, rows, strict=True))
        self._set_gradients()
        for position, chosen in enumerate(rows):
            kept = self._sums[position]
            if chosen is None:
                self._sums[position] = (
                    kept.zero_() if kept.dtype == self._first_type(position) else self._zeros(position)
                )
            else:
                kept[chosen] = 0

    def holds(self) -> bool:
        """Whether the gradients that this worker has added are finite and leave room for those of others."""
        return bool((self._bounds < _LARGEST).all())

    def forget(self) -> None:
        """Drops what this worker has added."""
        for parameter in self._parameters:
            parameter.grad = None
        self._bounds.zero_()
        self._sums = [self._zeros(position) for position in range(len(self._parameters))]
        for touched in self._touched:
            if touched is not None:
                touched.zero_()

    def clip(self, most: float) -> None:
        """Scales the reduced gradients down where their norm, of all together, is larger than `most`."""
        values = [target for target, _ in self._reduced]
        norm = float(nn.utils.get_total_norm(values))
        if norm > most:
            torch._foreach_mul_(values, most / (norm + 1e-6))
            self._set_gradients()

    def _set_gradients(self) -> None:
        for parameter, gradient, (target, chosen) in zip(self._parameters, self._gradients, self._reduced, strict=True):
            if chosen is not None:
                gradient[chosen] = target.view(len(chosen), *gradient.shape[1:])
            parameter.grad = gradient

    def release(self) -> None:
        """Takes the gradients away again after the optimizer's step."""
        for parameter, gradient, touched in zip(self._parameters, self._gradients, self._touched, strict=True):
            parameter.grad = None
            if touched is not None:
                gradient[touched.nonzero().squeeze(1)] = 0.0
                touched.zero_()

    def _taker(self, position: int) -> Callable[[Parameter], None]:
        # A parameter's hooks are held where Python's garbage collector does not look.
        own = weakref.ref(self)

        def take(parameter: Parameter) -> None:
            sums = own()
            if sums is not None and parameter.grad is not None:
                gradient, parameter.grad = parameter.grad, None
                sums._take(position, gradient)

        return take

    def _take(self, position: int, gradient: Tensor) -> None:
        touched = self._touched[position]
        if touched is None:
            self._add(gradient.reshape(-1), position)
        else:
            rows, values = gradient._indices()[0], gradient._values()
            touched[rows] = 1
            self._note_bound(position, values, len(values))
            self._sums[position].index_add_(0, rows, (values * self._scale).round_().to(torch.int64))

    def _note_bound(self, position: int, gradient: Tensor, terms: int = 1) -> None:
        """Adds the most that the gradient can change a sum by; NaN and infinity carry through."""
        if gradient.numel():
            low, high = torch.aminmax(gradient)
            largest = torch.maximum(-low, high) / self.loss_scale
            self._bounds[position] += largest * terms + 1.0 / _SCALE

    def _add(self, gradient: Tensor, position: int) -> None:
        self._note_bound(position, gradient)
        if gradient.device.type != "cpu":
            self._sums[position].view(-1).add_((gradient * self._scale).round_().to(torch.int64))
            return
        if self._sums[position].dtype == torch.int32 and not float(self._bounds[position]) < _LARGEST_32:
            self._sums[position] = self._sums[position].to(torch.int64)
        total = self._sums[position].view(-1)
        block = self._integer_block if total.dtype == torch.int32 else self._long_block
        for part, sums in zip(gradient.split(_BLOCK), total.split(_BLOCK), strict=True):
            scaled, rounded = self._float_block[: len(part)], block[: len(part)]
            torch.mul(part, self._scale, out=scaled)
            rounded.copy_(scaled.round_())
            sums.add_(rounded)

    @property
    def _scale(self) -> float:
        """From a gradient of a scaled loss to fixed point."""
        return _SCALE / self.loss_scale

    def _zeros(self, position: int) -> Tensor:
        parameter = self._parameters[position]
        return torch.zeros(parameter.shape, dtype=self._first_type(position), device=parameter.device)

    def _first_type(self, position: int) -> torch.dtype:
        """What a step's sum begins in: 32 bits only for dense ones on a CPU, where memory is what takes the time."""
        dense_on_cpu = not self._is_sparse[position] and self._parameters[position].device.type == "cpu"
        return torch.int32 if dense_on_cpu else torch.int64

    def _summed(
        self, parts: Sequence[Tensor], targets: Sequence[Tensor], bounds: Sequence[float], workers: int
    ) -> Iterator[tuple[Tensor, Tensor, slice]]:
        """Stretches of the sums over the workers, each with the target that it belongs to and its place there."""
        if workers == 1:
            yield from ((part, target, slice(None)) for part, target in zip(parts, targets, strict=True))
            return
        # As 32-bit integers where the bound allows.
        for dtype in (torch.int32, torch.int64):
            mine = [n for n, bound in enumerate(bounds) if (bound < _LARGEST_32) == (dtype == torch.int32)]
            for index, place, summed in self._workers.stretches([parts[n] for n in mine], dtype):
                yield summed, targets[mine[index]], place
