"""Which tokens make up each word of a text, and where the word stands in it.

Words are what the tokenizer's own word ids say, with two exceptions: white space ends a word even where the tokenizer
takes a whole text for one (as SentencePiece without a pre-tokenizer does), and in scripts that put no spaces between
words each token is one. Words never overlap: what a tokenizer makes of one character (the bytes of an emoji, the dots
of an ellipsis) is one word.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from tokenizers import Encoding

_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3041-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
"""Thai, Lao, Burmese, Khmer, kana and Han."""


@dataclass(slots=True)
class Word:
    """A word and its tokens."""

    source: int
    """0 for the text, 1 for its partner."""
    start: int
    end: int
    """Characters of the text as the tokenizer was given it; empty only where no token stands for a character."""
    tokens: list[int] = field(default_factory=list)
    """Positions in the encoding."""


def words_of(encoding: Encoding, texts: Sequence[str]) -> list[Word]:
    """The words of a text, or of a pair of texts, in their order.

    Every token is of exactly one word, but for those that the tokenizer adds to each text.

    Args:
        encoding: what the tokenizer made of `texts`.
        texts: the text, and its partner where there is one, as the tokenizer was given them.
    """
    words: list[Word] = []
    last: int | None = None
    for position, (added, source, word, (start, end)) in enumerate(
        zip(encoding.special_tokens_mask, encoding.sequence_ids, encoding.word_ids, encoding.offsets, strict=True)
    ):
        if added:
            continue
        source = source or 0
        text, current = texts[source], words[-1] if words and words[-1].source == source else None
        if current is None or _begins(text, current, start, end, same=word == last):
            current = Word(source, start, end)
            words.append(current)
        elif current.start == current.end:
            current.start = start
        current.end = max(current.end, end)
        current.tokens.append(position)
        last = word
    for each in words:
        _trim(each, texts[each.source])
    return words


def _begins(text: str, current: Word, start: int, end: int, *, same: bool) -> bool:
    """Whether a token at [start, end) begins a word, `current` being the one before; `same` if their ids are."""
    if start < current.end:
        return False
    if not same:
        return True
    if start == end or not text[current.start : current.end].strip():  # what stands before a word is of it
        return False
    spaced = any(map(str.isspace, text[current.end : start + 1]))
    return spaced or bool(_UNSPACED.match(text, start) or _UNSPACED.match(text, current.end - 1))


def _trim(word: Word, text: str) -> None:
    """Takes white space from a word's ends, unless it is nothing else: some tokenizers count it to the word after."""
    inside = text[word.start : word.end]
    if inside.strip():
        word.start += len(inside) - len(inside.lstrip())
        word.end -= len(inside) - len(inside.rstrip())
