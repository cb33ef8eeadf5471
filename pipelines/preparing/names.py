"""The names to mask, read from the file that the recipe gives."""

from typing import TypeVar

from models.name_files import located_names, with_names_read
from models.text import TextSettings
from pipelines.locate import identity

Text = TypeVar("Text", bound=TextSettings)


def with_names(settings: Text) -> Text:
    """The settings with the names themselves in the place of the file that holds them.

    From here on they go with the dataset and the classifier: who serves it elsewhere has no such file.

    Raises:
        InputError: the file cannot be read, is not UTF-8, has a line that is no name, or has none at all.
    """
    if settings.redact is None or not isinstance(settings.redact.names, str):
        return settings
    return settings.model_copy(update={"redact": with_names_read(settings.redact)})


def names_identity(settings: TextSettings) -> dict[str, str]:
    """The identity of the file of names, where there is one."""
    redact = settings.redact
    if redact is None or not isinstance(redact.names, str):
        return {}
    return {"names": identity([located_names(redact.names)])}
