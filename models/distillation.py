"""Distillation: a classifier learns from another's probabilities, beside the labels or without them."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from models.labels import LabelColumn, spans, total_classes
from models.settings import InputError

TEACHER = "\0teacher"
"""The teacher's logits among a microbatch's labels; no label column can be called so."""


class DistillationObjective:
    """`weight` x what the teacher says + (1 - `weight`) x what the labels say, summed over a microbatch's texts.

    Of a single-label column, the divergence of the student's softmax from the teacher's, both at `temperature`, times
    its square, so that gradients are as large at any temperature (Hinton et al. 2015, arXiv 1503.02531). Of a
    multi-label column, binary cross-entropy against the teacher's probabilities. A text without a label still learns
    from the teacher.
    """

    def __init__(
        self,
        labelled: Callable[[Tensor, Mapping[str, Tensor]], Tensor],
        columns: Sequence[LabelColumn],
        weight: float,
        temperature: float,
    ) -> None:
        """`labelled`: the loss against the labels, summed likewise (`models.objectives.ClassificationObjective`)."""
        self._labelled, self._columns = labelled, tuple(columns)
        self._weight, self._temperature = weight, temperature

    def __call__(self, logits: Tensor, labels: Mapping[str, Tensor]) -> Tensor:
        """The loss of a microbatch, a scalar, from logits [texts, total classes].

        `labels[TEACHER]` holds the teacher's logits, as wide; the rest is for the loss against the labels.
        """
        teacher, heard = labels[TEACHER], logits.new_zeros((), dtype=torch.float32)
        for column, span in spans(self._columns):
            own, wanted = logits[:, span].float(), teacher[:, span].float()
            if column.multi:
                heard = heard + F.binary_cross_entropy_with_logits(own, wanted.sigmoid(), reduction="sum")
            else:
                at = self._temperature
                said, meant = (own / at).log_softmax(-1), (wanted / at).log_softmax(-1)
                heard = heard + at**2 * F.kl_div(said, meant, reduction="sum", log_target=True)
        return self._weight * heard + (1 - self._weight) * self._labelled(logits, labels)


def teacher_order(own: Sequence[LabelColumn], teachers: Sequence[LabelColumn]) -> list[int]:
    """For each of the student's logits, where the teacher has it among its own: columns and classes go by name.

    Raises:
        InputError: the two have not the same columns and classes.
    """
    given = {column.name: (column, span) for column, span in spans(teachers)}
    if set(given) != {column.name for column in own}:
        raise InputError(f"it predicts {_told(given)}, not {_told([column.name for column in own])}.")
    order: list[int] = []
    for column in own:
        theirs, span = given[column.name]
        if theirs.multi != column.multi:
            says = "any number of classes" if theirs.multi else "one class"
            raise InputError(f"it gives {says} for each text in the column {column.name}, which the data does not.")
        if odd := sorted(set(theirs.classes) ^ set(column.classes)):
            lacks = "the teacher does not know" if odd[0] in column.classes else "the data does not have"
            raise InputError(f"in the column {column.name} there is a class that {lacks}, {odd[0]!r}.")
        order += [span.start + theirs.classes.index(name) for name in column.classes]
    assert len(order) == total_classes(own)
    return order


def _told(names: Sequence[str] | Mapping[str, object]) -> str:
    return " and ".join(map(repr, names))
