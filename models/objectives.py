"""What a classifier is trained to minimise."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from models.labels import LabelColumn, spans

MISSING = -1


class ClassificationObjective:
    """Cross-entropy (binary for multi-label columns), summed over a microbatch's texts and label columns.

    The sum is divided by the texts of the *whole* step, so that a text weighs the same in whatever lane it stands.
    A missing label adds nothing. Class weights have a mean of one over the training set (`balanced_weights`).
    """

    def __init__(
        self,
        columns: Sequence[LabelColumn],
        weights: Mapping[str, Sequence[float]] | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        self.columns = tuple(columns)
        self.label_smoothing = label_smoothing
        self._weights = {name: torch.tensor(values) for name, values in (weights or {}).items()}

    def __call__(self, logits: Tensor, labels: Mapping[str, Tensor]) -> Tensor:
        """The loss of a microbatch, a scalar, from logits [texts, total classes].

        `labels` holds for each column class indices [texts], -1 where missing, or for a multi-label column
        zeros and ones [texts, classes], -1 where missing.
        """
        total = logits.new_zeros((), dtype=torch.float32)
        for column, span in spans(self.columns):
            part, target = logits[:, span].float(), labels[column.name]
            weight = self._weights.get(column.name)
            weight = weight.to(part.device) if weight is not None else None
            if column.multi:
                smooth = target.float() * (1 - self.label_smoothing) + self.label_smoothing / 2
                known = (target != MISSING).float()
                total = total + F.binary_cross_entropy_with_logits(
                    part, smooth, weight=known, pos_weight=weight, reduction="sum"
                )
            else:
                total = total + F.cross_entropy(
                    part,
                    target,
                    weight=weight,
                    ignore_index=MISSING,
                    label_smoothing=self.label_smoothing,
                    reduction="sum",
                )
        return total


def balanced_weights(counts: Sequence[int]) -> list[float]:
    """Weights inverse to the classes' frequencies, with a mean of one over the texts (as scikit-learn's "balanced")."""
    present = [count for count in counts if count]
    return [sum(counts) / (len(present) * count) if count else 0.0 for count in counts]
