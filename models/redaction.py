"""Masking personal data: what identifies a person is replaced by a tag such as [EMAIL], everything else stays as it is.

One implementation for texts to learn from, texts to classify, logs and samples. docs/personal-data.md says what is
found and what is not. A text with nothing in it costs a few microseconds: it is looked at closely only where it has an
address sign behind a word, a number of seven digits or several with points, or several colons.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Self, get_args

import phonenumbers
from pydantic import Field, field_validator, model_validator

from models.folding import fold
from models.names import LONGEST_NAME, Names
from models.personal_data import Span, cards, chinese_ids, emails, ibans, ips, us_ssns
from models.phones import Phones
from models.settings import Settings

Kind = Literal["email", "iban", "cn_id", "card", "ip", "us_ssn", "phone"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""In the order in which they are looked for: where two overlap, the surer one comes first."""

NAME = "name"
"""What a name is counted as."""

REACH = 512
"""Of what is masked before a place, nothing depends on more characters behind it than these."""

_TAGS = {kind: f"[{kind.upper()}]" for kind in (*KINDS, NAME)}
_ANY_TAG = re.compile("|".join(map(re.escape, _TAGS.values())))
_NOTHING: Mapping[str, int] = {}

# Each with its like for texts beyond ASCII, which takes three times as long.
_ACCOUNT = r"(?<=[A-Za-z][A-Za-z].)[0-9](?:[ .-]?[0-9A-Za-z]){11}"
_MAY_BE_NUMBER = re.compile(rf"[0-9](?:(?:[^\w\n]{{0,3}}[0-9]){{6}}|\.[0-9]{{1,3}}\.[0-9]|{_ACCOUNT})")
_MAY_BE_ANY_NUMBER = re.compile(
    r"\d(?:(?:[^\w\n]{0,9}\d){6}|[.\uff0e\ufe52]\d{1,3}[.\uff0e\ufe52]\d|(?<=\w\w.)\d(?:\W?\w){11})"
)
_ADDRESS_SIGN = re.compile(r"@(?<=\S@)\S")
_ANY_ADDRESS_SIGN = re.compile(r"[@\uff20\ufe6b](?<=\S.)\S")
_ANY_COLONS = re.compile("[:\uff1a\ufe55].*?[:\uff1a\ufe55]")

Finder = Callable[[str], Iterable[Span]]
"""From a folded text to the spans of one kind, in order and apart."""


class RedactionSettings(Settings):
    """Which personal data is masked."""

    kinds: tuple[Kind, ...] = Field(
        KINDS, description="What is looked for. Each is replaced by its name: [EMAIL], [PHONE] and so on."
    )
    phone_countries: tuple[str, ...] = Field(
        ("US", "GB", "DE", "FR", "CN"),
        description="Countries (ISO 3166) whose telephone numbers are found without +49 or its like before them, too.",
    )
    names: str | tuple[str, ...] | None = Field(
        None, description="Names to mask as whole words: a list, or a file with one in each line. No other is known."
    )

    @field_validator("phone_countries")
    @classmethod
    def _known_countries(cls, countries: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := [code for code in countries if code not in phonenumbers.SUPPORTED_REGIONS]:
            raise ValueError(f"{unknown[0]!r} is no country's code; write ISO 3166 codes such as US or DE")
        return countries

    @field_validator("names")
    @classmethod
    def _words(cls, names: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        for name in names if isinstance(names, tuple) else ():
            if not re.search(r"\w", name) or len(name) > LONGEST_NAME or "\n" in name:
                raise ValueError(
                    f"{name[:80]!r} is no name; write a word or several, {LONGEST_NAME} characters at most"
                )
        return names

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not self.kinds and not self.names:
            raise ValueError("give at least one of kinds, or names; to mask nothing, write null in the place of all")
        return self

    @cached_property
    def redactor(self) -> "Redactor":
        """What masks as these settings say, made once."""
        return Redactor(self)

    def __getstate__(self) -> dict[Any, Any]:
        """Without the redactor: another process makes its own."""
        state = super().__getstate__()
        return state | {"__dict__": {name: getattr(self, name) for name in type(self).model_fields}}


@dataclass(frozen=True, slots=True)
class Redacted:
    """A text without personal data."""

    text: str
    counts: Mapping[str, int]
    """How many of each kind were masked; kinds of which there were none are left out."""


class Redactor:
    """Masks personal data in texts. Keeps nothing of them; several threads may use one.

    To mask a masked text changes nothing. Nothing that is masked spans lines.
    """

    def __init__(self, settings: RedactionSettings) -> None:
        """Takes some milliseconds, for the rules of countries and the names.

        Raises:
            ValueError: `settings.names` is the name of a file, which is to be read before.
        """
        if isinstance(settings.names, str):
            raise ValueError(f"the names in {settings.names} have not been read")
        finders: dict[Kind, Callable[[], Finder]] = {
            "iban": lambda: ibans,
            "cn_id": lambda: chinese_ids,
            "card": lambda: cards,
            "ip": lambda: ips,
            "us_ssn": lambda: us_ssns,
            "phone": lambda: Phones(settings.phone_countries),
        }
        self._finds_emails = "email" in settings.kinds
        self._finds_ips = "ip" in settings.kinds
        self._of_numbers = [(kind, finders[kind]()) for kind in KINDS if kind in settings.kinds and kind in finders]
        self._finds_numbers = bool(self._of_numbers)
        self._names = Names(settings.names) if settings.names else None

    def redact(self, text: str) -> Redacted:
        """The text with a tag in the place of each datum, and how many there were."""
        found = self._find(text)
        if not found:
            return Redacted(text, _NOTHING)
        counts: Counter[str] = Counter()
        while found:
            counts.update(kind for kind, _, _ in found)
            text = _tagged(text, found)
            # Beside a tag there may be what could not be seen beside a datum.
            found = self._find(text)
        return Redacted(text, counts)

    def redact_all(self, texts: Sequence[str]) -> list[str]:
        """Each text with a tag in the place of each datum."""
        return [self.redact(text).text for text in texts]

    def _find(self, text: str) -> list[tuple[str, int, int]]:
        """Kind, start and end of all there is, in the text's order."""
        if text.isascii():
            addresses = self._finds_emails and "@" in text and _ADDRESS_SIGN.search(text) is not None
            numbers = self._finds_numbers and _MAY_BE_NUMBER.search(text) is not None
            colons = self._finds_ips and text.count(":") > 1
        else:
            addresses = self._finds_emails and _ANY_ADDRESS_SIGN.search(text) is not None
            numbers = self._finds_numbers and _MAY_BE_ANY_NUMBER.search(text) is not None
            colons = self._finds_ips and _ANY_COLONS.search(text) is not None
        if not (addresses or numbers or colons or self._names):
            return []
        folded = fold(text)
        seen = folded.text
        found = []
        for kind, find in self._finders(addresses, numbers, colons):
            spans = list(find(seen))
            found += [(kind, *folded.place(*span)) for span in spans]
            seen = _blanked(seen, spans)
        return sorted(found, key=lambda each: each[1])

    def _finders(self, addresses: bool, numbers: bool, colons: bool) -> Iterator[tuple[str, Finder]]:
        if addresses:
            yield "email", emails
        if numbers:
            yield from self._of_numbers
        elif colons:
            yield "ip", ips
        if self._names:
            yield NAME, self._names_outside_tags

    def _names_outside_tags(self, text: str) -> Iterable[Span]:
        assert self._names
        return self._names(_blanked(text, [match.span() for match in _ANY_TAG.finditer(text)]))


def _tagged(text: str, found: Iterable[tuple[str, int, int]]) -> str:
    pieces, end = [], 0
    for kind, start, stop in found:
        pieces += [text[end:start], _TAGS[kind]]
        end = stop
    return "".join([*pieces, text[end:]])


def _blanked(text: str, spans: Iterable[Span]) -> str:
    """The text with brackets in the place of what was found: as long as before, and with a tag's neighbours."""
    pieces, end = [], 0
    for start, stop in spans:
        pieces += [text[end:start], "[" + "]" * (stop - start - 1)]
        end = stop
    return "".join([*pieces, text[end:]])
