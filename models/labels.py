"""Label columns: what is to be predicted, and where each column's classes stand in the logits."""

from collections.abc import Iterator, Sequence

from models.settings import Settings


class LabelColumn(Settings):
    """One column to predict, with its classes in a fixed (sorted) order.

    A classifier has one output vector; the classes of its label columns stand in it side by side, so that
    several columns cost one matrix multiplication and the weights load like those of any classifier.
    """

    name: str
    classes: tuple[str, ...]
    multi: bool = False
    """Whether a text may have any number of the classes (sigmoid) or exactly one (softmax)."""


def total_classes(columns: Sequence[LabelColumn]) -> int:
    """Width of the logits."""
    return sum(len(column.classes) for column in columns)


def spans(columns: Sequence[LabelColumn]) -> Iterator[tuple[LabelColumn, slice]]:
    """Each column with the slice of the logits that is its own."""
    start = 0
    for column in columns:
        yield column, slice(start, start + len(column.classes))
        start += len(column.classes)
