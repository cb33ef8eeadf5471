"""Packing: full rows, no token lost, none twice."""

import random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from models.packing import pack

LENGTHS = st.lists(st.integers(0, 40), max_size=60)


@given(LENGTHS, st.integers(1, 24))
@example([0, 0], 3)
@example([4, 4, 4], 8)
def test_each_token_stands_in_one_row_and_all_rows_but_the_last_are_full(lengths: list[int], length: int) -> None:
    rows = list(pack(lengths, length))
    sizes = [sum(map(len, row)) for row in rows]
    assert sizes == [min(length, sum(lengths) - length * number) for number in range(len(sizes))]
    pieces = sorted((p.document, p.start, p.stop) for row in rows for p in row)
    tokens = [(document, place) for document, start, stop in pieces for place in range(start, stop)]
    assert tokens == [(document, place) for document, count in enumerate(lengths) for place in range(count)]


def test_documents_that_fit_side_by_side_are_not_split() -> None:
    rows = list(pack([5, 3, 6, 2, 8, 4, 4], 8))
    assert sorted(sorted(map(len, row)) for row in rows) == [[2, 6], [3, 5], [4, 4], [8]]


@pytest.mark.parametrize("length", [64, 512])
def test_few_documents_are_split_for_room(length: int) -> None:
    draw = random.Random(0)
    lengths = [max(3, int(draw.lognormvariate(3.5, 0.7))) for _ in range(5000)]
    pieces = [0] * len(lengths)
    for row in pack(lengths, length):
        for piece in row:
            pieces[piece.document] += 1
    shorter = [count for count, tokens in zip(pieces, lengths, strict=True) if tokens <= length]
    assert sum(count > 1 for count in shorter) <= 0.005 * len(shorter)


def test_rows_have_room() -> None:
    with pytest.raises(ValueError, match="at least 1 token"):
        next(pack([1], 0))
