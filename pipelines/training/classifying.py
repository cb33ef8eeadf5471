"""The lesson of `finetune`: an encoder becomes a classifier."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from upath import UPath

from models.architectures import ScratchEncoder, scratch_config
from models.classifier import save
from models.distillation import DistillationObjective
from models.encoders import build_classifier, set_padding
from models.feed import Feed
from models.microbatch import Batch
from models.objectives import ClassificationObjective
from models.settings import Precision
from models.spec import ClassifierSpec
from models.training import LaneTrainer
from pipelines.metrics import metric_of
from pipelines.prepared import Prepared
from pipelines.pretrained import encoder_folder
from pipelines.training.lanes import text_batches
from pipelines.training.lesson import stored_tokenizer
from pipelines.training.soft_targets import SoftTargets
from pipelines.training.validating import validation_metrics

if TYPE_CHECKING:
    from pipelines.finetune import FinetuneSettings


@dataclass(frozen=True)
class Classifying:
    """Learns the label columns of a prepared dataset."""

    settings: "FinetuneSettings"
    prepared: UPath
    encoder: str | ScratchEncoder
    """Where it is, for the one that the recipe pretrains too."""
    spec: ClassifierSpec
    class_weights: dict[str, list[float]]
    teacher: SoftTargets | None = None
    """What a teacher said of each row."""
    section: str = "finetune"
    length: str = "prepare.max_length"

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Of the prepared dataset."""
        return stored_tokenizer(Prepared(self.prepared))

    def build(self, tokenizer: PreTrainedTokenizerBase, device: torch.device, precision: Precision) -> PreTrainedModel:
        """The encoder with a new head."""
        settings = self.settings
        build = partial(
            build_classifier,
            labels=self.spec.labels,
            seed=settings.seed,
            dropout=settings.dropout,
            head_only=settings.tune == "head",
        )
        if isinstance(self.encoder, ScratchEncoder):
            dropout = self.encoder.dropout if settings.dropout is None else settings.dropout
            fresh = partial(scratch_config, self.encoder, tokenizer, self.spec.max_length)
            model = build(fresh=fresh, dropout=dropout)
        else:
            with encoder_folder(self.encoder) as folder:
                model = build(pretrained=folder, layers=settings.keep_layers)
        set_padding(model, tokenizer)
        return model

    def loss(self) -> Callable[[Tensor, Mapping[str, Tensor]], Tensor]:
        """Cross-entropy, beside the teacher's part where there is one."""
        settings = self.settings
        labelled = ClassificationObjective(self.spec.labels, self.class_weights, settings.label_smoothing)
        if self.teacher is None:
            return labelled
        return DistillationObjective(labelled, self.spec.labels, settings.teacher_weight, settings.teacher_temperature)

    def batches(
        self, feed: Feed, lanes: range, tokenizer: PreTrainedTokenizerBase
    ) -> Callable[[int, int, int], Batch | None]:
        """Texts with their labels, and the teacher's."""
        return text_batches(Prepared(self.prepared), feed, lanes, int(tokenizer.pad_token_id), self.teacher)

    def validate(
        self, trainer: LaneTrainer, tokenizer: PreTrainedTokenizerBase, stopped: Callable[[], bool]
    ) -> dict[str, float] | None:
        """The metrics of all label columns, the one that picks the best first."""
        labels, metric = self.spec.labels, self.settings.metric
        measured = validation_metrics(Prepared(self.prepared), trainer, labels, int(tokenizer.pad_token_id), stopped)
        return measured and {metric: metric_of(measured, metric, labels), **measured}

    def score(self, measured: dict[str, float]) -> float:
        """The recipe's metric."""
        return measured[self.settings.metric]

    def cost(self, trainer: LaneTrainer) -> dict[str, float]:
        """Not told."""
        return {}

    def save(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
        """A classifier that `models.classifier.load` reads."""
        save(model, tokenizer, self.spec, folder)
