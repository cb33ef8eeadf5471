"""Reading labelled text from where it lies, in whatever common form."""

from typing import Literal

from pydantic import Field, field_validator

from models.settings import Settings

Format = Literal["auto", "csv", "tsv", "jsonl", "parquet", "text", "datasets", "pickle"]


class LabelSettings(Settings):
    """One column to predict."""

    column: str = Field(description="The column's name in the source.")
    multi: bool = Field(False, description="Whether a text may have any number of the classes.")
    separator: str = Field(",", description="What stands between a multi-label cell's classes, in text formats.")
    classes: tuple[str, ...] | None = Field(
        None, description="The known classes; a row with another is rejected. By default, all that occur."
    )
    names: dict[str, str] = Field({}, description="New names for values, for example {'0': negative, '1': positive}.")


class DataSettings(Settings):
    """Where the text and its labels are."""

    source: str | tuple[str, ...] | dict[str, str | tuple[str, ...]] = Field(
        description="A path, glob, URL, `hub://OWNER/NAME` or `package://NAME/PATH`, a list of them, or a mapping of "
        "train, validation and test to them where the split is given."
    )
    format: Format = Field("auto", description="How the files are written; by default, told by their names.")
    text: str = Field("text", description="The column with the text.")
    text_pair: str | None = Field(None, description="The column with the second text, for pairs.")
    labels: tuple[LabelSettings, ...] = Field((), description="The columns to predict; a bare name will do.")
    columns: tuple[str, ...] = Field((), description="Further columns to keep, for slices in the evaluation.")
    where: dict[str, str] = Field(
        {}, description="Keeps only rows whose column matches (anywhere) a regular expression."
    )
    skip_rows: int = Field(0, ge=0, description="Lines to skip after the header of csv and tsv files.")
    split: str | None = Field(None, description="The column that names each row's split, where the data has one.")

    @field_validator("labels", mode="before")
    @classmethod
    def _bare_names(cls, value: object) -> object:
        if isinstance(value, str | dict):
            value = (value,)
        if isinstance(value, list | tuple):
            return tuple({"column": item} if isinstance(item, str) else item for item in value)
        return value
