"""Which texts to compute together, so that little of the work is padding, or none.

A batch that is padded costs its number of texts times its longest text. Texts are taken in the order of their lengths,
and a batch ends when the next text would break the token budget or make too much of the batch padding.
"""

from collections.abc import Sequence

CPU_PADDING = 0.0
"""On a CPU a padded token costs what a real one does."""

GPU_PADDING = 0.5
"""A GPU has lanes to spare: fewer, larger batches are worth some padding."""


def group_by_length(lengths: Sequence[int], budget: int, max_padding: float | None = CPU_PADDING) -> list[list[int]]:
    """Positions of `lengths` in groups, each of texts of nearly equal length, the shortest first.

    Every position stands in exactly one group. A group of n texts whose longest has m tokens keeps
    n * m <= budget, unless it is one text that exceeds the budget alone, and at most the share
    `max_padding` of its n * m tokens is padding. Where that is None, nothing is ever padded, and only the texts' own
    tokens count. Equal lengths keep their order. O(n log n).
    """
    groups: list[list[int]] = []
    group: list[int] = []
    tokens = 0
    for position in sorted(range(len(lengths)), key=lambda index: lengths[index]):
        length = lengths[position]
        computed = tokens + length if max_padding is None else (len(group) + 1) * length
        if group and (computed > budget or computed - tokens - length > (max_padding or 0) * computed):
            groups.append(group)
            group, tokens = [], 0
        group.append(position)
        tokens += length
    return [*groups, group] if group else groups
