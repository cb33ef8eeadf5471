"""The names to mask in texts to classify, read where the endpoint is started: its replicas have no such file."""

from models.name_files import with_names_read
from serve.settings import ServeSettings


def with_names(settings: ServeSettings) -> ServeSettings:
    """The settings with the names themselves in the place of the files that hold them.

    Raises:
        InputError: a file cannot be read, is not UTF-8, has a line that is no name, or has none at all.
    """
    redact, sample = settings.redact, settings.sample
    if redact is not None:
        redact = with_names_read(redact, "serve.redact")
    if sample is not None:
        sample = sample.model_copy(update={"redact": with_names_read(sample.redact, "serve.sample.redact")})
    return settings.model_copy(update={"redact": redact, "sample": sample})
