"""Label columns: what is to be predicted, and where each column's classes stand in the logits."""

from collections.abc import Iterator, Sequence

from models.settings import InputError, Settings

_LISTED = 20
"""Names of classes that a sentence holds at most."""


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


def find_class(
    columns: Sequence[LabelColumn], column: str | None, label: str | None
) -> tuple[LabelColumn, slice, int | None]:
    """The label column asked for, its slice of the logits, and the place of the class asked for in the column.

    Args:
        columns: those of the classifier.
        column: a column's name; may be None where there is one only.
        label: one of its classes; None for none in particular, then there is no place.

    Raises:
        InputError: there is no such column or class, or no column was named though there are several.
    """
    found = {each.name: (each, span) for each, span in spans(columns)}
    if column is None and len(found) > 1:
        raise InputError(f"column is missing: the classifier has several, {_listed(list(found))}; name one.")
    name = columns[0].name if column is None else column
    if name not in found:
        raise InputError(f"column: there is no label column {name[:80]!r}; there is {_listed(list(found))}.")
    chosen, span = found[name]
    if label is None:
        return chosen, span, None
    if label not in chosen.classes:
        raise InputError(
            f"label: the column {name} has no class {label[:80]!r}; its classes are {_listed(chosen.classes)}."
        )
    return chosen, span, chosen.classes.index(label)


def _listed(names: Sequence[str]) -> str:
    """The names in a sentence; of very many, the first."""
    *first, last = [*names[:_LISTED], f"{len(names) - _LISTED} more"] if len(names) > _LISTED + 1 else names
    return f"{', '.join(first)} and {last}" if first else last
