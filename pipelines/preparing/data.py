"""The settings that name the labelled text and say how to read it."""

import re
from collections import Counter
from typing import Literal

from pydantic import Field, field_validator

from models.settings import InputError, Settings

Format = Literal["auto", "csv", "tsv", "jsonl", "parquet", "text", "datasets", "pickle"]

_SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}


class LabelSettings(Settings):
    """One column to predict."""

    column: str = Field(description="The column's name in the source.")
    multi: bool = Field(False, description="Whether a text may have any number of the classes.")
    separator: str = Field(
        ",", min_length=1, description="What stands between a multi-label cell's classes, in text formats."
    )
    classes: tuple[str, ...] | None = Field(
        None, description="The known classes; a row with another is rejected. By default, all that occur."
    )
    names: dict[str, str] = Field({}, description="New names for values, for example {'0': negative, '1': positive}.")


class TextSource(Settings):
    """Where text is and how to read it."""

    source: str | tuple[str, ...] | dict[str, str | tuple[str, ...]] = Field(
        description="A path, glob, URL, `hub://OWNER/NAME` (`@REVISION` pins it) or `package://NAME/PATH`, a list of "
        "them, or a mapping of train, validation and test to them where the split is given."
    )
    format: Format = Field("auto", description="How the files are written; by default, told by their names.")
    text: str = Field("text", description="The column with the text.")
    where: dict[str, str] = Field(
        {}, description="Keeps only rows whose column matches (anywhere) a regular expression."
    )
    skip_rows: int = Field(0, ge=0, description="Lines to skip after the header of csv and tsv files.")
    quotes: bool = Field(True, description='Whether fields of csv and tsv files may be quoted with ".')
    undecodable: Literal["reject", "replace"] = Field(
        "reject", description="What becomes of rows that are not UTF-8: rejected, or the wrong bytes replaced (U+FFFD)."
    )

    @field_validator("where")
    @classmethod
    def _regular_expressions(cls, where: dict[str, str]) -> dict[str, str]:
        for column, pattern in where.items():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} (for {column}) is no regular expression: {error}") from error
        return where


class DataSettings(TextSource):
    """Where the text and its labels are."""

    text_pair: str | None = Field(None, description="The column with the second text, for pairs.")
    labels: tuple[LabelSettings, ...] = Field((), description="The columns to predict; a bare name will do.")
    columns: tuple[str, ...] = Field((), description="Further columns to keep, for slices in the evaluation.")
    split: str | None = Field(None, description="The column that names each row's split, where the data has one.")

    @field_validator("labels", mode="before")
    @classmethod
    def _bare_names(cls, value: object) -> object:
        if isinstance(value, str | dict):
            value = (value,)
        if isinstance(value, list | tuple):
            return tuple({"column": item} if isinstance(item, str) else item for item in value)
        return value

    @field_validator("labels")
    @classmethod
    def _named_once(cls, labels: tuple[LabelSettings, ...]) -> tuple[LabelSettings, ...]:
        counts = Counter(label.column for label in labels)
        if twice := [column for column, count in counts.items() if count > 1]:
            raise ValueError(f"{twice[0]!r} is named twice; each column is predicted once")
        return labels

    @property
    def text_columns(self) -> tuple[str, ...]:
        """The column of the text, and that of the second text of pairs."""
        return (self.text, self.text_pair) if self.text_pair else (self.text,)

    @property
    def used_columns(self) -> tuple[str, ...]:
        """The columns that are read, each once."""
        split = [self.split] if self.split else []
        labels = [label.column for label in self.labels]
        return tuple(dict.fromkeys([*self.text_columns, *labels, *self.columns, *self.where, *split]))


def splits_to_read(place: str, names: list[str], split: str | None) -> dict[str, str | None]:
    """Which of a dataset's own splits are read, and as what: all by their names, or those that are `split`.

    A dataset with one split gives no splits by itself.

    Raises:
        InputError: a name tells no split, or none is `split`; names what there is.
    """
    known = {name: split_name(name) for name in names}
    if split is None and len(names) > 1 and None in known.values():
        odd = next(name for name in names if known[name] is None)
        raise InputError(
            f"{place} has the splits {', '.join(names)}, and {odd} is none of train, validation and test; map those to "
            "read in data.source."
        )
    if split is None:
        return known if len(names) > 1 else {names[0]: None}
    if len(names) == 1:  # Plain files on the hub are all called train, whatever they are.
        return {names[0]: split}
    if split not in known.values():
        raise InputError(f"{place} has no {split} split; its splits are {', '.join(names)}.")
    return {name: split for name in names if known[name] == split}


def split_name(value: str) -> str | None:
    """train, validation or test for any of their usual spellings, else None."""
    return _SPLIT_NAMES.get(value.strip().lower())
