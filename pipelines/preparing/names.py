"""The names to mask, read from the file that the recipe gives."""

from typing import TypeVar

from upath import UPath

from models.names import LONGEST_NAME
from models.redaction import RedactionSettings
from models.settings import InputError
from models.text import TextSettings
from pipelines.locate import identity, locate, telling_read_errors

Text = TypeVar("Text", bound=TextSettings)


def with_names(settings: Text) -> Text:
    """The settings with the names themselves in the place of the file that holds them.

    From here on they go with the dataset and the classifier: who serves it elsewhere has no such file.

    Raises:
        InputError: the file cannot be read, is not UTF-8, has a line that is no name, or has none at all.
    """
    redact = settings.redact
    if redact is None or not isinstance(redact.names, str):
        return settings
    path = _located(redact.names)
    with telling_read_errors(path):
        content = path.read_bytes()
    try:
        lines = content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}, the file of names, is not UTF-8 text (byte {error.start}).") from error
    for number, line in enumerate(lines, 1):
        if len(line.strip()) > LONGEST_NAME:
            raise InputError(f"{path}: line {number} is longer than a name; write one in each line.")
    names = tuple(dict.fromkeys(name for line in lines if any(map(str.isalnum, name := line.strip()))))
    if not names:
        raise InputError(f"{path}, the file of names, holds none; write one in each line.")
    return settings.model_copy(update={"redact": RedactionSettings(**(redact.model_dump() | {"names": names}))})


def names_identity(settings: TextSettings) -> dict[str, str]:
    """The identity of the file of names, where there is one."""
    redact = settings.redact
    if redact is None or not isinstance(redact.names, str):
        return {}
    return {"names": identity([_located(redact.names)])}


def _located(names: str) -> UPath:
    try:
        return locate(names)
    except InputError as error:
        raise InputError(f"redact.names: {error}") from error
