"""The training step: always L lanes, on however many workers, ending in the same bits.

Worker `rank` of `workers` owns the lanes rank, rank + workers, ... Each lane runs its microbatch forward and
backward with its own seed; the gradients are summed over lanes and workers (`FixedPointSum`), and every worker then
takes the same optimizer step. Nothing else is shared but the lanes' sizes and losses, once a step each.

A sharded model (`models.sharding`) computes with all workers at once, so that one without a lane to run goes through
the motions with an idle microbatch of weight zero.
"""

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import product

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel

from models import dropout
from models.encoders import set_training
from models.faults import FAULTS, NO_GRADIENT, NOT_FINITE, OUT_OF_MEMORY, Fault, Skipped, out_of_memory
from models.feed import Feed
from models.fixedpoint import FixedPointSum, FloatSum, GradientSum
from models.ledger import digest
from models.microbatch import Batch, StepResult
from models.precision import LossScale, autocast
from models.settings import InputError, Precision
from models.sharding import ShardedSum, is_sharded


class LaneTrainer:
    """Takes training steps. Every worker makes one with the same model, and calls the same steps."""

    def __init__(
        self,
        model: PreTrainedModel,
        loss: Callable[[Tensor, Mapping[str, Tensor]], Tensor],
        feed: Feed,
        batch: Callable[[int, int, int], Batch | None],
        *,
        optimizer: AdamW,
        schedule: LRScheduler,
        precision: Precision = "bf16",
        clip: float = 1.0,
        exact: bool = True,
        skip_bad: bool = False,
        rank: int = 0,
        workers: int = 1,
        section: str = "finetune",
        length: str = "prepare.max_length",
    ) -> None:
        """A trainer.

        Args:
            model: what learns.
            loss: the sum of a microbatch's losses, from logits and labels.
            feed: which rows a lane gets.
            batch: the microbatch at (epoch, step, lane), or None for a dry lane.
            optimizer: over the model's parameters.
            schedule: of its rate; goes on by one a step.
            precision: of the forward and backward passes; in fp16 losses are scaled (`models.precision.LossScale`).
            clip: the largest norm of a step's gradient.
            exact: sum gradients in fixed point; a sharded model cannot.
            skip_bad: leave microbatches out whose loss or gradient is not finite, or for which memory does not suffice.
            rank: of this worker.
            workers: how many there are.
            section: the part of the recipe that a user would change if something is wrong.
            length: the setting of the recipe that says how long texts are.
        """
        self.model, self.loss, self.feed, self.batch = model, loss, feed, batch
        self.optimizer, self.schedule = optimizer, schedule
        self.precision, self.clip, self.rank, self.workers = precision, clip, rank, workers
        self.skip_bad = skip_bad
        self._names = {"section": section, "length": length}
        self.device = next(model.parameters()).device
        self.scale = LossScale()
        self.sharded = is_sharded(model)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.sums: GradientSum
        if self.sharded:
            if exact:
                raise ValueError("gradients of a sharded model are not summed in fixed point")
            self.sums = ShardedSum(self.parameters)
        else:
            sparse = _make_embedding_sparse(model)
            self.sums = FixedPointSum(self.parameters, sparse) if exact else FloatSum(self.parameters)

    def step(self, epoch: int, step: int, flag: int = 0) -> StepResult:
        """One optimizer step. The first worker's `flag`, a small number, reaches all workers with its results, if any.

        Raises:
            InputError: a microbatch's loss or gradient is not finite, or memory does not suffice for it, and such are
                not skipped; on every worker alike.
        """
        rows = self.feed.lane_rows(epoch, step)
        batches = self._own_batches(epoch, step)
        sizes = self._sizes(batches)
        skipped: dict[int, Fault] = {}
        scale = replace(self.scale)
        while weight := sum(size[0] for lane, size in enumerate(sizes) if lane not in skipped):
            own = {lane: batch for lane, batch in batches.items() if lane not in skipped}
            outcome = self._run_lanes(epoch, step, own, weight, flag)
            bad = outcome.bad
            if not bad:
                try:
                    self.sums.reduce()
                    break
                except ArithmeticError as error:
                    if self.precision == "fp16" and self.scale.lower():
                        continue
                    bad = self._without_gradient(epoch, step, own, weight)
                    self.scale = scale  # It was not to blame.
                    if not bad:  # No lane by itself is to blame.
                        raise InputError(f"at epoch {epoch}, step {step}: {error}.") from error
            self.sums.forget()
            if not self.skip_bad:
                raise InputError(self._told(epoch, step, *next(iter(bad.items()))))
            skipped |= bad
        else:
            outcome = _Outcome([0.0], [0] * self.feed.lanes, 0, {})
        left_out = [Skipped(lane, fault.reason, self.rows(epoch, step, lane)) for lane, fault in skipped.items()]
        digests = list(outcome.digests)
        for each in left_out:
            digests[each.lane] = -digest(each.rows)
        texts, tokens, padded = (
            sum(size for lane, size in enumerate(part) if lane not in skipped)
            for part in (rows, *list(zip(*sizes, strict=True))[1:])
        )
        result = StepResult(math.fsum(outcome.losses), texts, tokens, padded, digests, outcome.flag, left_out)
        if not texts:
            # The learning rate follows the place in the feed, even before the optimizer's first step.
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
                self.schedule.step()
            return result
        self.scale.held()
        self.sums.clip(self.clip)
        self.optimizer.step()
        self.schedule.step()
        self.sums.release()
        return result

    def _own_batches(self, epoch: int, step: int) -> dict[int, Batch]:
        """This worker's microbatches, by lane."""
        lanes = range(self.rank, self.feed.lanes, self.workers)
        return {lane: batch for lane in lanes if (batch := self.batch(epoch, step, lane))}

    def _sizes(self, batches: Mapping[int, Batch]) -> list[list[int]]:
        """For each lane, of all workers, its weight, its tokens, and its tokens with padding."""
        sizes = torch.zeros(self.feed.lanes, 3, dtype=torch.int64)
        for lane, batch in batches.items():
            mask = batch.inputs["attention_mask"]
            sizes[lane] = torch.tensor([batch.weight, int(mask.count_nonzero()), mask.numel()])
        if self.workers > 1:
            sizes = sizes.to(self.device)
            dist.all_reduce(sizes)
        told: list[list[int]] = sizes.tolist()
        return told

    def _run_lanes(self, epoch: int, step: int, batches: Mapping[int, Batch], weight: int, flag: int) -> "_Outcome":
        """Forward and backward of this worker's lanes; what all workers found."""
        # Each lane's loss, digest and fault, and the flag. Adding zeros is exact, so the sum is a gather.
        lanes = self.feed.lanes
        told = torch.zeros(3 * lanes + 1, dtype=torch.float64, device=self.device)
        if self.rank == 0:
            told[-1] = flag
        self.sums.loss_scale = self.scale.value if self.precision == "fp16" else 1.0
        # One autocast region for all lanes, so that the weights are cast once a step.
        with autocast(self.device, self.precision):
            for lane in range(self.rank, lanes + self.rank, self.workers):
                batch = batches.get(lane)
                if batch is None:
                    self.idle()
                    continue
                told[lanes + lane] = digest(batch.rows)
                try:
                    loss = self._run_lane(epoch, step, lane, batch, weight)
                except (RuntimeError, MemoryError) as error:
                    if not out_of_memory(error):
                        raise
                    if self.sharded:  # The others wait for this worker in the middle of a layer.
                        raise InputError(self._told(epoch, step, lane, FAULTS[OUT_OF_MEMORY])) from error
                    told[2 * lanes + lane] = OUT_OF_MEMORY
                    break
                told[lane] = loss.nan_to_num()
                told[2 * lanes + lane] = ~loss.isfinite() * NOT_FINITE
        if self.workers > 1:
            dist.all_reduce(told)
        losses, digests, faults = (part.tolist() for part in told[:-1].split(lanes))
        bad = {lane: FAULTS[int(fault)] for lane, fault in enumerate(faults) if fault}
        return _Outcome(losses, [int(value) for value in digests], int(told[-1]), bad)

    def _run_lane(self, epoch: int, step: int, lane: int, batch: Batch, weight: int) -> Tensor:
        """Forward and backward; its part of the step's loss."""
        seed = self.feed.draw_seed(epoch, step, lane)
        torch.manual_seed(seed)
        dropout.seed(seed)
        inputs = {name: value.to(self.device, non_blocking=True) for name, value in batch.inputs.items()}
        labels = {name: value.to(self.device, non_blocking=True) for name, value in batch.labels.items()}
        loss = self.loss(self.model(**inputs).logits, labels) / weight
        (loss * self.sums.loss_scale).backward()
        return loss.detach()

    def hear(self, said: bool) -> bool:
        """What the first worker says, on all workers, each of which must ask."""
        word = torch.tensor(int(said), device=self.device)
        if self.workers > 1:
            dist.broadcast(word, 0)
        return bool(word)

    def idle(self) -> None:
        """What a worker does while the others compute: nothing, unless they need its part of the model."""
        if self.sharded:
            # Special tokens where texts have them; the rest of a text could harm the others' sums.
            last = int(self.first_batch.inputs["attention_mask"][0].count_nonzero()) - 1
            inputs = self.first_batch.inputs.items()
            self._run_for_nothing({name: value[:1, [0, min(last, value.shape[1] - 1)]] for name, value in inputs})

    def warm_up(self) -> None:
        """Runs one microbatch, the same on all workers, so that what is compiled on first use is compiled alike."""
        inputs = self.first_batch.inputs
        # Without padding, attention has no mask and other code.
        whole = torch.ones_like(inputs["attention_mask"])
        padded = whole.clone()
        padded[0, 1:] = 0
        for prepare in (self.model.eval, partial(set_training, self.model)):
            prepare()
            for mask in (whole, padded):
                self._run_for_nothing({**inputs, "attention_mask": mask})
            self.idle()
        self.sums.forget()

    def _run_for_nothing(self, inputs: Mapping[str, Tensor]) -> None:
        """Forward, and backward in training, of texts that weigh nothing."""
        inputs = {name: value.to(self.device) for name, value in inputs.items()}
        with torch.set_grad_enabled(self.model.training), autocast(self.device, self.precision):
            nothing = self.model(**inputs).logits.sum() * 0
        if self.model.training:
            nothing.backward()

    @cached_property
    def first_batch(self) -> Batch:
        """Of all: the same on each worker."""
        places = product(range(self.feed.steps), range(self.feed.lanes))
        return next(batch for step, lane in places if (batch := self.batch(0, step, lane)))

    def _without_gradient(self, epoch: int, step: int, batches: Mapping[int, Batch], weight: int) -> dict[int, Fault]:
        """The lanes, of all workers, whose gradient by itself is not finite or too large."""
        found = torch.zeros(self.feed.lanes, device=self.device)
        self.sums.loss_scale = self.scale.value if self.precision == "fp16" else 1.0
        with autocast(self.device, self.precision):
            for lane in range(self.feed.lanes):
                mine = lane % self.workers == self.rank
                if lane in batches:
                    self._run_lane(epoch, step, lane, batches[lane], weight)
                else:
                    self.idle()
                if mine or self.sharded:
                    found[lane] = not self.sums.holds()
                    self.sums.forget()
        if self.workers > 1:
            dist.all_reduce(found)
        return dict.fromkeys(found.nonzero().flatten().tolist(), FAULTS[NO_GRADIENT])

    def rows(self, epoch: int, step: int, lane: int) -> list[int]:
        """The identities of the rows that a lane consumes at a step, of any worker."""
        batch = self.batch(epoch, step, lane)
        return batch.rows if batch else []

    def _told(self, epoch: int, step: int, lane: int, fault: Fault) -> str:
        rows = ", ".join(map(str, self.rows(epoch, step, lane)))
        cannot_skip = self.skip_bad or (self.sharded and fault is FAULTS[OUT_OF_MEMORY])
        section = self._names["section"]
        skip = "" if cannot_skip else f", or leave such microbatches out with {section}.bad_microbatch=skip"
        return (
            f"{fault.reason} at epoch {epoch}, step {step}, lane {lane} (rows {rows}): "
            f"{fault.advice.format(**self._names)}, look at those rows{skip}."
        )


@dataclass(frozen=True)
class _Outcome:
    """What all workers found in a try at a step."""

    losses: list[float]
    digests: list[int]
    flag: int
    bad: dict[int, Fault]
    """By lane."""


def _make_embedding_sparse(model: PreTrainedModel) -> list[nn.Parameter]:
    """Lets the token embedding's gradient come sparse, unless other layers share its weight."""
    embedding = model.get_input_embeddings()
    if not isinstance(embedding, nn.Embedding) or not embedding.weight.requires_grad:
        return []
    uses = [m for m in model.modules() for p in m.parameters(recurse=False) if p is embedding.weight]
    if len(uses) > 1 or embedding.max_norm is not None:
        return []
    embedding.sparse = True
    return [weight for weight in embedding.parameters() if weight.requires_grad]
