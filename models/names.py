"""Finding names that a list holds: whole words, exactly as they are written there.

Scripts written without spaces (Chinese, Japanese, Thai ...) have no words to see: there a name is found wherever its
characters stand.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator
from typing import Literal

from models.folding import fold
from models.personal_data import Span

_SPACELESS = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Burmese, Khmer
    "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Japanese, Chinese
)
_WORD = re.compile(f"[{_SPACELESS}]|[^\\W{_SPACELESS}]+")
_FORMS: tuple[Literal["NFC", "NFD"], ...] = ("NFC", "NFD")

LONGEST_NAME = 100
"""Characters of a name at most."""


class Names:
    """Finds any number of names; the time is that of looking up each word."""

    def __init__(self, names: Iterable[str]) -> None:
        by_word: dict[str, set[str]] = {}
        for name in names:
            for form in _FORMS:
                written = fold(unicodedata.normalize(form, name)).text
                if word := _WORD.search(written):
                    # What stands before the first word, such as an apostrophe, is no help in finding it.
                    by_word.setdefault(word[0], set()).add(written[word.start() :])
        self._by_word = {word: sorted(found, key=len, reverse=True) for word, found in by_word.items()}

    def __call__(self, text: str) -> Iterator[Span]:
        """The spans of the names in a folded text, the longest where several begin at one place."""
        end = 0
        for word in _WORD.finditer(text):
            if word[0] in self._by_word and word.start() >= end:
                for name in self._by_word[word[0]]:
                    stop = word.start() + len(name)
                    if text.startswith(name, word.start()) and not _inside_word(text, stop):
                        yield word.start(), stop
                        end = stop
                        break


def _inside_word(text: str, position: int) -> bool:
    word = _WORD.match(text, position - 1)
    return word is not None and word.end() > position
