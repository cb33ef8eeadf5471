"""Cells of any Arrow type become the same text, or lists of texts."""

from datetime import date
from typing import Any

import pyarrow as pa
import pytest

from pipelines.preparing.cells import as_text


@pytest.mark.parametrize(
    ("kind", "cells", "texts"),
    [
        (pa.map_(pa.string(), pa.int64()), [[("a", 1)], None], ['{"a": 1}', None]),
        (pa.map_(pa.date32(), pa.date32()), [[(date(2020, 1, 2), date(2020, 1, 3))]], ['{"2020-01-02": "2020-01-03"}']),
        (pa.struct([("m", pa.map_(pa.int32(), pa.string()))]), [{"m": [(1, "x")]}], ['{"m": {"1": "x"}}']),
        (pa.list_view(pa.int64()), [[1, 2], None], [["1", "2"], None]),
        (pa.large_list_view(pa.string()), [["a", None]], [["a"]]),
    ],
    ids=str,
)
def test_maps_are_json_objects_and_list_views_are_lists(kind: pa.DataType, cells: list[Any], texts: list[Any]) -> None:
    found, wrong = as_text(pa.chunked_array([pa.array(cells, kind)]), None)
    assert found.to_pylist() == texts
    assert not wrong.any()
