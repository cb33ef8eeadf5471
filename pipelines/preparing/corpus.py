"""The sources of a corpus: label-free text to pretrain on, each read in its own way and with its own weight."""

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import Field
from upath import UPath

from models.settings import InputError
from pipelines.preparing.clean_pass import CleanPass
from pipelines.preparing.data import DataSettings, TextSource
from pipelines.preparing.formats import Source
from pipelines.preparing.sources import find_sources
from pipelines.preparing.units import Unit


class CorpusSource(TextSource):
    """Texts of one kind."""

    weight: float | None = Field(
        None,
        gt=0,
        description="Its share of an epoch's tokens, beside the other sources' weights. An epoch has as many tokens as "
        "all sources together, so that some texts stand in it several times and others not at all.",
    )

    def as_data(self) -> DataSettings:
        """As what the passes over labelled data know."""
        return DataSettings(**self.model_dump(exclude={"weight"}))

    @property
    def shown(self) -> str:
        """Its name for a reader."""
        named = self.source.values() if isinstance(self.source, dict) else [self.source]
        first = next(iter(named))
        reference = first if isinstance(first, str) else first[0]
        return f"{reference.rsplit('/', 1)[-1]}: {self.text}"


_DATA_SETTING = re.compile(rf"(?<![\w./-])data\.(?=({'|'.join(TextSource.model_fields)})\b)")


@contextlib.contextmanager
def telling_source(number: int) -> Iterator[None]:
    """Mistakes in a source are told with the setting's name in the recipe."""
    try:
        yield
    except InputError as error:
        raise InputError(_DATA_SETTING.sub(f"pack.sources.{number}.", str(error))) from error


def find_corpus(sources: Sequence[CorpusSource], fetched: UPath) -> list[tuple[int, Source]]:
    """Every file to read with the number of its source; splits to test with are left out.

    Raises:
        InputError: as `pipelines.preparing.sources.find_sources`.
    """
    found = []
    for number, source in enumerate(sources):
        with telling_source(number):
            files = find_sources(source.as_data(), fetched / f"{number:03d}")
            kept = [file for file in files if file.split != "test"]
            if not kept:
                raise InputError(f"data.source: there is only a test split in {source.shown}.")
        found += [(number, file) for file in kept]
    return found


@dataclass(frozen=True)
class CorpusClean:
    """The first pass over a unit of any source."""

    passes: tuple[CleanPass, ...]

    def __call__(self, number: int, part: tuple[int, Unit]) -> dict[str, Any]:
        source, unit = part
        with telling_source(source):
            return self.passes[source](number, unit)
