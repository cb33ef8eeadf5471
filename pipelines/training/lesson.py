"""What a training run learns, seen from the loop that trains: a classifier, or a language model."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from cluster.store import local_copy
from models.feed import Feed
from models.microbatch import Batch
from models.settings import Precision
from models.training import LaneTrainer
from pipelines.prepared import Prepared

Stopped = Callable[[], bool]


def stored_tokenizer(prepared: Prepared) -> PreTrainedTokenizerBase:
    """A prepared dataset's, wherever it lies."""
    with local_copy(prepared.tokenizer_folder) as folder:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


class Lesson(Protocol):
    """The part of a run that depends on what is learnt; sent to each worker, so it holds settings and paths alone."""

    @property
    def settings(self) -> Any:
        """The stage's (`pipelines.training.settings.TrainingSettings` at least)."""
        ...

    @property
    def section(self) -> str:
        """The recipe's, where a user would change what is wrong."""
        ...

    @property
    def length(self) -> str:
        """The recipe's setting of the texts' length."""
        ...

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Of the rows."""
        ...

    def build(self, tokenizer: PreTrainedTokenizerBase, device: torch.device, precision: Precision) -> PreTrainedModel:
        """The model at the beginning, in training mode: the same weights each time, for the device but not yet on it.

        It and the tokenizer end up with the same token for padding.
        """
        ...

    def loss(self) -> Callable[[Tensor, Mapping[str, Tensor]], Tensor]:
        """The sum of a microbatch's losses, from logits and labels."""
        ...

    def batches(
        self, feed: Feed, lanes: range, tokenizer: PreTrainedTokenizerBase
    ) -> Callable[[int, int, int], Batch | None]:
        """The microbatch at (epoch, step, lane), for some lanes."""
        ...

    def validate(
        self, trainer: LaneTrainer, tokenizer: PreTrainedTokenizerBase, stopped: Stopped
    ) -> dict[str, float] | None:
        """What is measured on the validation split by all workers, or None where it was stopped on the way."""
        ...

    def score(self, measured: dict[str, float]) -> float:
        """How good that is; higher is better."""
        ...

    def cost(self, trainer: LaneTrainer) -> dict[str, float]:
        """Figures of the model and its device that are told at the end; asked on all workers before they train."""
        ...

    def save(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
        """Writes the finished model."""
        ...
