"""Cells as text, the same from every format: what is spelled how, and what is no UTF-8."""

import json
import re
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from models.settings import InputError
from pipelines.preparing.sieve import mask, whole

_STRINGS = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
_BYTES = (
    *_STRINGS,
    pa.types.is_binary,
    pa.types.is_large_binary,
    pa.types.is_binary_view,
    pa.types.is_fixed_size_binary,
)
_LISTS = (
    pa.types.is_list,
    pa.types.is_large_list,
    pa.types.is_fixed_size_list,
    pa.types.is_list_view,
    pa.types.is_large_list_view,
)
_SURROGATE = re.compile("[\ud800-\udfff]")


def holds_strings(kind: pa.DataType) -> bool:
    """Whether an Arrow type is one of strings."""
    return any(is_kind(kind) for is_kind in _STRINGS)


def holds_bytes(kind: pa.DataType) -> bool:
    """Whether an Arrow type is one of bytes, strings among them."""
    return any(is_kind(kind) for is_kind in _BYTES)


def plain(value: Any) -> Any:
    """A cell as text (or a list of texts), the same for every format: true, 3, 0.5; None where it is missing."""
    match value:
        case None | str():
            return value
        case bool():
            return "true" if value else "false"
        case float():
            return None if value != value else str(int(value)) if value.is_integer() else repr(value)
        case list() | tuple():
            return [text for item in value if (text := spelled(item)) is not None]
        case dict():
            return _json(value)
        case bytes():
            return value.decode("utf-8", "surrogateescape")
        case _:
            return str(value)


def spelled(value: Any) -> str | None:
    """A cell, or an item of a list, as one text: as `plain` does, but a list as JSON."""
    text: str | None = _json(value) if isinstance(value, list | tuple) else plain(value)
    return text


def _json(value: Any) -> str:
    return json.dumps(_with_plain_keys(value), ensure_ascii=False, default=plain)


def _with_plain_keys(value: Any) -> Any:
    """The value with keys that JSON can have: those of a map may be dates or bytes."""
    match value:
        case dict():
            return {
                key if isinstance(key, str | int | float | None) else plain(key): _with_plain_keys(item)
                for key, item in value.items()
            }
        case list() | tuple():
            return [_with_plain_keys(item) for item in value]
        case _:
            return value


def mended(value: Any) -> Any:
    """The value with U+FFFD for every surrogate in it: for bytes that were no UTF-8, or half a pair."""
    match value:
        case str():
            return _SURROGATE.sub("\ufffd", value)
        case list() | tuple():
            return [mended(item) for item in value]
        case dict():
            return {mended(key): mended(item) for key, item in value.items()}
        case _:
            return value


def is_unicode(cells: list[Any]) -> bool:
    """Whether the texts have no surrogates: bytes that were no UTF-8, or half a pair in a JSON escape."""
    try:
        json.dumps(cells, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def shown(text: Any) -> str:
    """A text as it can be shown: with `?` for surrogates."""
    return str(text).encode("utf-8", "replace").decode()


def as_text(column: Any, class_names: list[str] | None, where: str = "") -> tuple[pa.Array, NDArray[np.bool_]]:
    """An Arrow column as strings, or lists of strings, spelled as `plain` does; and where it is no UTF-8, which is
    replaced there.

    Raises:
        InputError: begins with `where`: an integer stands for none of the classes.
    """
    column = whole(column)
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = column.type
    if holds_bytes(kind):
        return _utf8(column)
    fine = np.zeros(len(column), bool)
    if class_names and pa.types.is_integer(kind):
        indices = pc.if_else(pc.less(column, 0), None, column)
        _class_name(pc.max(indices).as_py(), class_names, where)
        return pc.take(pa.array(class_names, pa.string()), indices), fine
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind):
        return pc.cast(column, pa.string()), fine
    listed = any(is_kind(kind) for is_kind in _LISTS)
    wanted = pa.list_(pa.string()) if listed else pa.string()
    given = column.to_pylist(maps_as_pydicts="lossy")
    if class_names and listed and pa.types.is_integer(kind.value_type):
        given = [cell if cell is None else [_class_name(item, class_names, where) for item in cell] for cell in given]
    cells = [plain(cell) for cell in given]
    try:
        return pa.array(cells, wanted), fine
    except UnicodeEncodeError:
        wrong = np.array([not is_unicode([cell]) for cell in cells], bool)
        fixed = [cell if cell is None else [shown(item) for item in cell] if listed else shown(cell) for cell in cells]
        return pa.array(fixed, wanted), wrong


def _utf8(column: pa.Array) -> tuple[pa.Array, NDArray[np.bool_]]:
    # Nothing makes the writers of Parquet keep to UTF-8, so strings are looked at as bytes are.
    content = pc.cast(column, pa.binary())
    try:
        return pc.cast(content, pa.string()), np.zeros(len(column), bool)
    except pa.ArrowInvalid:
        cells = content.to_pylist()
        fixed = pa.array([cell if cell is None else cell.decode("utf-8", "replace") for cell in cells], pa.string())
        return fixed, mask(pc.not_equal(pc.cast(fixed, pa.binary()), content))


def _class_name(number: int | None, class_names: list[str], where: str) -> str | None:
    """The name of a class; none for a negative number, by which `datasets` marks a missing label."""
    if number is None or number < 0:
        return None
    if number >= len(class_names):
        raise InputError(f"{where}: there is no class {number} among the {len(class_names)} that the file names.")
    return class_names[number]
