"""Groups of nearly equal length under a token budget."""

from hypothesis import given
from hypothesis import strategies as st

from models.batches import group_by_length

LENGTHS = st.lists(st.integers(1, 600), max_size=200)


@given(LENGTHS, st.integers(1, 5000), st.floats(0, 1))
def test_every_text_stands_in_one_group_within_the_budget(lengths: list[int], budget: int, padding: float) -> None:
    groups = group_by_length(lengths, budget, padding)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    for group in groups:
        longest = max(lengths[index] for index in group)
        assert len(group) * longest <= budget or len(group) == 1
        tokens = sum(lengths[index] for index in group)
        assert 1 - tokens / (len(group) * longest) <= padding + 1e-9


@given(LENGTHS, st.integers(1, 5000))
def test_lengths_rise_from_group_to_group(lengths: list[int], budget: int) -> None:
    ordered = [lengths[index] for group in group_by_length(lengths, budget) for index in group]
    assert ordered == sorted(lengths)


@given(st.integers(1, 100), st.integers(1, 50), st.integers(1, 5000))
def test_equal_lengths_fill_the_budget(length: int, count: int, budget: int) -> None:
    groups = group_by_length([length] * count, budget)
    size = max(1, budget // length)
    assert [len(group) for group in groups] == [size] * (count // size) + ([count % size] if count % size else [])
