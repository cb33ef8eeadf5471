"""Folding a text for recognizers: digits, spaces, hyphens and Latin letters of every script and width become ASCII.

One character stands for one, so that what is found in the folded text is known in the text itself. Only marks that are
not seen are left out: those of direction, which stand around numbers in Arabic and Hebrew, joiners, soft hyphens.
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

_INVISIBLE = re.compile(
    "[\u00ad\u034f\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufe00-\ufe0f\ufeff]"
)
_SPACES = "\t\u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000"
_HYPHENS = "\u2010\u2011\u2012\u2013\u2014\u2015\u2043\u2212\ufe58\ufe63\uff0d"
_WIDE = range(0xFF01, 0xFF5F)
_OTHERS = {0xFE52: ".", 0xFE55: ":", 0xFE62: "+", 0xFE6B: "@", 0x2044: "/", 0x2215: "/"}


def _folds() -> dict[int, str]:
    digits = {code: str(unicodedata.decimal(chr(code))) for code in range(128, 0x20000) if chr(code).isdecimal()}
    wide = {code: chr(code - _WIDE.start + ord("!")) for code in _WIDE}
    signs = dict.fromkeys(map(ord, _SPACES), " ") | dict.fromkeys(map(ord, _HYPHENS), "-")
    return digits | wide | signs | _OTHERS


_FOLDS = _folds()


@dataclass(frozen=True, slots=True)
class Folded:
    """A folded text."""

    text: str
    places: Sequence[int] | None
    """Where each character stands in the text itself; None where each stands in its own place."""

    def place(self, start: int, stop: int) -> tuple[int, int]:
        """Where a span of it, which is not empty, begins and ends in the text itself."""
        return (start, stop) if self.places is None else (self.places[start], self.places[stop - 1] + 1)


def fold(text: str) -> Folded:
    """The text as recognizers read it."""
    if text.isascii():
        return Folded(text.replace("\t", " "), None)
    if _INVISIBLE.search(text) is None:
        return Folded(text.translate(_FOLDS), None)
    places = [place for place, sign in enumerate(text) if not _INVISIBLE.match(sign)]
    return Folded("".join(map(text.__getitem__, places)).translate(_FOLDS), places)
