"""Pickled tables of plain containers, read without running anything that a pickle may contain."""

import pickle
from typing import Any

from upath import UPath

from models.settings import InputError
from pipelines.locate import reason_of


class _PlainUnpickler(pickle.Unpickler):
    """Refuses every class and function, so that only None, numbers, strings and containers can come out."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, and only plain containers are read")


def load_plain_columns(path: UPath) -> dict[str, list[Any]]:
    """The columns of a pickled table: {name: values}, [{name: value}], or (values, values, ...) named 0, 1, ...

    Holds the whole file in memory, as pickles must.

    Raises:
        InputError: the pickle holds anything else, or classes.
    """
    try:
        with path.fs.open(path.path, "rb") as stream:
            value = _PlainUnpickler(stream).load()
    except Exception as error:  # a damaged pickle may raise anything
        raise InputError(f"{path} cannot be read as a pickle: {reason_of(error)}.") from error
    columns = _columns(value)
    if columns is None or len({len(values) for values in columns.values()}) > 1:
        raise InputError(
            f"{path} holds no table: expected columns of one length ({{name: values}} or (values, values)) or rows "
            "([{name: value}])."
        )
    return columns


def _columns(value: Any) -> dict[str, list[Any]] | None:
    if isinstance(value, dict) and all(isinstance(item, list | tuple) for item in value.values()):
        return {str(name): list(values) for name, values in value.items()}
    if isinstance(value, list | tuple) and value:
        if all(isinstance(item, dict) for item in value):
            names = dict.fromkeys(str(name) for item in value for name in item)
            return {name: [item.get(name) for item in value] for name in names}
        if all(isinstance(item, list | tuple) for item in value):
            return {str(position): list(values) for position, values in enumerate(value)}
    return None
