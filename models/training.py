"""The training step: always L lanes, on however many workers, ending in the same bits.

Worker `rank` of `workers` owns the lanes rank, rank + workers, ... Each lane runs its microbatch forward and
backward with its own seed; the gradients are summed over lanes and workers (`FixedPointSum`), and every worker then
takes the same optimizer step. Nothing else is shared but the lanes' losses, once a step.
"""

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel, get_scheduler

from models import dropout
from models.feed import Feed
from models.fixedpoint import FixedPointSum, FloatSum, GradientSum
from models.ledger import digest
from models.precision import Precision, autocast
from models.settings import InputError


@dataclass(frozen=True)
class Batch:
    """A microbatch: `inputs` are the model's keyword arguments, each [texts, longest]."""

    inputs: dict[str, Tensor]
    labels: dict[str, Tensor]
    rows: list[int]
    """The rows' identities."""


@dataclass(frozen=True)
class StepResult:
    """What a step did: the mean loss over its texts, and this worker's share of the work."""

    loss: float
    texts: int
    """Texts of the whole step."""
    tokens: int
    """Tokens that this worker ran, padding left out."""
    padded: int
    """Tokens that this worker ran, padding included."""
    digests: list[int]
    """Of each lane's rows, by all workers: the step's line in the ledger."""
    flag: int
    """What the first worker flagged (see `LaneTrainer.step`)."""


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
        rank: int = 0,
        workers: int = 1,
    ) -> None:
        """`batch` gives the microbatch at (epoch, step, lane), or None for a dry lane; `exact` sums in fixed point."""
        self.model, self.loss, self.feed, self.batch = model, loss, feed, batch
        self.optimizer, self.schedule = optimizer, schedule
        self.precision, self.clip, self.rank, self.workers = precision, clip, rank, workers
        self.device = next(model.parameters()).device
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        sparse = _make_embedding_sparse(model)
        if self.device.type == "cpu":
            dropout.use_stream(model)
        self.sums: GradientSum = FixedPointSum(self.parameters, sparse) if exact else FloatSum(self.parameters)

    def step(self, epoch: int, step: int, flag: int = 0) -> StepResult | None:
        """One optimizer step. The first worker's `flag`, a small number, reaches all workers in their results.

        None, and no weight changes, where all lanes are dry: on every worker alike.

        Raises:
            InputError: the loss or a gradient is not finite; on every worker alike.
        """
        texts = sum(self.feed.lane_rows(epoch, step))
        if not texts:
            # The learning rate follows the place in the feed, even before the optimizer's first step.
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
                self.schedule.step()
            return None
        # Each lane's loss, each lane's digest, and the flag. Adding zeros is exact, so the sum is a gather.
        lanes = self.feed.lanes
        told = torch.zeros(2 * lanes + 1, dtype=torch.float64, device=self.device)
        if self.rank == 0:
            told[-1] = flag
        tokens = padded = 0
        # One autocast region for all lanes, so that the weights are cast once a step.
        with autocast(self.device, self.precision):
            for lane in range(self.rank, lanes, self.workers):
                batch = self.batch(epoch, step, lane)
                if batch is None:
                    continue
                tokens += int(batch.inputs["attention_mask"].sum())
                padded += batch.inputs["attention_mask"].numel()
                seed = self.feed.draw_seed(epoch, step, lane)
                torch.manual_seed(seed)
                dropout.seed(seed)
                inputs = {name: value.to(self.device, non_blocking=True) for name, value in batch.inputs.items()}
                labels = {name: value.to(self.device, non_blocking=True) for name, value in batch.labels.items()}
                loss = self.loss(self.model(**inputs).logits, labels) / texts
                loss.backward()
                told[lane] = loss.detach()
                told[lanes + lane] = digest(batch.rows)
        if self.workers > 1:
            dist.all_reduce(told)
        losses, digests, raised = told[:lanes].tolist(), told[lanes:-1].long().tolist(), int(told[-1])
        if bad := [lane for lane, value in enumerate(losses) if not math.isfinite(value)]:
            raise InputError(
                f"the loss is not finite at epoch {epoch}, step {step}, lane {bad[0]}: "
                "lower finetune.learning_rate or look at those rows."
            )
        try:
            self.sums.reduce()
        except ArithmeticError as error:
            raise InputError(f"at epoch {epoch}, step {step}: {error}.") from error
        self.sums.clip(self.clip)
        self.optimizer.step()
        self.schedule.step()
        self.sums.release()
        return StepResult(math.fsum(losses), texts, tokens, padded, digests, raised)


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
