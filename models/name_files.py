"""Names to mask that stand in a file: read once, where the settings are given, and carried with them from there on."""

from upath import UPath

from models.locating import locate, telling_read_errors
from models.names import LONGEST_NAME
from models.redaction import RedactionSettings
from models.settings import InputError


def with_names_read(redact: RedactionSettings, setting: str = "redact") -> RedactionSettings:
    """The settings with the names themselves in the place of the file that holds them; `setting`: what they are called.

    Raises:
        InputError: the file cannot be read, is not UTF-8, has a line that is no name, or has none at all.
    """
    if not isinstance(redact.names, str):
        return redact
    names = _names_in(located_names(redact.names, setting))
    return RedactionSettings(**(redact.model_dump() | {"names": names}))


def located_names(names: str, setting: str = "redact") -> UPath:
    """The file of names.

    Raises:
        InputError: it is not there.
    """
    try:
        return locate(names)
    except InputError as error:
        raise InputError(f"{setting}.names: {error}") from error


def _names_in(path: UPath) -> tuple[str, ...]:
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
    return names
