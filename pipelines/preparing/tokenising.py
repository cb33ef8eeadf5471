"""Step tokenise: texts to token ids at the tokenizer's full speed.

The Rust class of `tokenizers` is used directly; the Python class around it costs a third of the speed. Long texts
are cut before they are tokenised, where the tokenizer allows to tell that the outcome is the same.
"""

import itertools
import json
import os
import re
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field
from tokenizers import Tokenizer

from models.settings import Settings

_BATCH = 256
_HEAD_FACTORS = (6, 18, 0)
"""Characters for each token of max_length that are tokenised, until these are enough tokens; 0 for all.

English has 5 characters in a token, with its space. Chinese has 1 or 2, and a third of this is tried.
"""


class TokenizerSettings(Settings):
    """A tokenizer to train on the training split, where the encoder starts from scratch."""

    kind: Literal["wordpiece", "bpe", "unigram"] = Field(
        "wordpiece",
        description="The subword model: BERT's, GPT's over bytes, or SentencePiece's, which no two runs learn alike.",
    )
    vocabulary: int = Field(8000, ge=300, description="Size of the vocabulary.")
    lowercase: bool = Field(True, description="Whether case is dropped.")


class TokenisingSettings(Settings):
    """How text becomes tokens."""

    max_length: int = Field(128, ge=4, description="Tokens a text is cut to, special tokens included.")
    tokenizer: TokenizerSettings | None = Field(
        None, description="A tokenizer to train on the data; by default, the encoder's own."
    )


@dataclass(frozen=True)
class Tokens:
    """Token ids of many rows end to end, and what is to be known of each row."""

    ids: NDArray[np.int32]
    lengths: NDArray[np.int32]
    truncated: NDArray[np.bool_]
    type_ids: NDArray[np.int8] | None = None

    def columns(self) -> dict[str, pa.Array]:
        """As columns of a prepared dataset."""
        offsets = pa.array(np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int32))
        columns = {"input_ids": pa.ListArray.from_arrays(offsets, pa.array(self.ids))}
        if self.type_ids is not None:
            columns["token_type_ids"] = pa.ListArray.from_arrays(offsets, pa.array(self.type_ids))
        return columns | {"length": pa.array(self.lengths), "truncated": pa.array(self.truncated)}


class Encoder:
    """Texts, or pairs of them, to token ids cut to `max_length`, as the tokenizer itself would cut them."""

    def __init__(self, tokenizer_json: bytes, max_length: int) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a Ray task has one core; threads would fight over it
        self._tokenizer = Tokenizer.from_buffer(tokenizer_json)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._max_length = max_length
        self._single = _frame_of(self._tokenizer.encode("a"))
        self._pair = _frame_of(self._tokenizer.encode("a", "a"))
        self._word_end = _word_end(json.loads(tokenizer_json))

    def encode(self, texts: list[str]) -> Tokens:
        """Token ids of texts."""
        return _joined([self._encode(texts[start : start + _BATCH]) for start in range(0, len(texts), _BATCH)])

    def encode_pairs(self, texts: list[str], pairs: list[str]) -> Tokens:
        """Token ids of pairs; the longer part of a pair is cut first."""
        starts = range(0, len(texts), _BATCH)
        return _joined([self._encode_pairs(texts[at : at + _BATCH], pairs[at : at + _BATCH]) for at in starts])

    def _encode(self, texts: list[str]) -> Tokens:
        room = self._max_length - self._single.size
        ids, _ = self._enough_ids(texts, room)
        whole = _lengths(ids)
        return self._single.around([ids], [np.minimum(whole, room)], whole > room)

    def _encode_pairs(self, texts: list[str], pairs: list[str]) -> Tokens:
        room = self._max_length - self._pair.size
        first, first_cut = self._enough_ids(texts, room)
        second, second_cut = self._enough_ids(pairs, room)
        for row in np.flatnonzero(first_cut | second_cut).tolist():
            # Which part is the longer decides the cut: a head will do where that is sure all the same.
            counts = len(first[row]), len(second[row])
            sure = counts[0] > counts[1] if first_cut[row] else counts[1] > counts[0]
            if not sure or (first_cut[row] and second_cut[row]):
                first[row], second[row] = self._ids([texts[row], pairs[row]])
        lengths = _lengths(first), _lengths(second)
        kept = longest_first(*lengths, room)
        return self._pair.around([first, second], list(kept), lengths[0] + lengths[1] > room)

    def _enough_ids(self, texts: list[str], room: int) -> tuple[list[list[int]], NDArray[np.bool_]]:
        """All token ids of each text, or of a head of it that has more than `room`; and which are of heads."""
        ids: list[list[int]] = [[]] * len(texts)
        cut = np.zeros(len(texts), bool)
        remaining = list(range(len(texts)))
        for factor in _HEAD_FACTORS:
            heads = [self._head(texts[row], factor) for row in remaining]
            for row, head, found in zip(remaining, heads, self._ids(heads), strict=True):
                ids[row], cut[row] = found, len(head) < len(texts[row])
            remaining = [row for row in remaining if cut[row] and len(ids[row]) <= room]
            if not remaining:
                break
        return ids, cut

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def _head(self, text: str, factor: int) -> str:
        """The part of a long text that surely decides its first tokens: whole words, up to where one ends."""
        if self._word_end is None or factor == 0:
            return text
        limit = self._max_length * factor
        if len(text) > limit // 3 and len(text[:32].encode()) > 64:  # Chinese and its like: 3 bytes a character
            limit //= 3
        if len(text) <= limit:
            return text
        found = self._word_end.match(text, 0, limit)
        return text[: found.end() - 1] if found and found.end() > 1 else text


@dataclass(frozen=True)
class _Frame:
    """The special tokens before, between and after the parts of a row, and the types of all."""

    special: list[NDArray[np.int32]]
    special_types: list[NDArray[np.int8]]
    part_types: list[int]

    @property
    def size(self) -> int:
        """How many special tokens there are."""
        return sum(map(len, self.special))

    def around(
        self, parts: list[list[list[int]]], kept: list[NDArray[np.int64]], truncated: NDArray[np.bool_]
    ) -> Tokens:
        """Rows made of the first `kept` tokens of each part, framed by the special tokens."""
        lengths = np.sum(kept, axis=0) + self.size
        ids, types = np.empty(int(lengths.sum()), np.int32), np.empty(int(lengths.sum()), np.int8)
        cursor = np.cumsum(lengths) - lengths
        for position, (special, special_types) in enumerate(zip(self.special, self.special_types, strict=True)):
            for offset in range(len(special)):
                ids[cursor + offset], types[cursor + offset] = special[offset], special_types[offset]
            cursor = cursor + len(special)
            if position < len(parts):
                whole = _lengths(parts[position])
                flat = np.fromiter(itertools.chain.from_iterable(parts[position]), np.int32, int(whole.sum()))
                flat = flat[_within(whole) < np.repeat(kept[position], whole)]
                places = np.repeat(cursor, kept[position]) + _within(kept[position])
                ids[places], types[places] = flat, self.part_types[position]
                cursor = cursor + kept[position]
        return Tokens(ids, lengths.astype(np.int32), truncated, types if len(parts) > 1 else None)


def _frame_of(probe: Any) -> _Frame:
    """The frame that the tokenizer put around the one-token parts of a probe."""
    inner = [position for position, part in enumerate(probe.sequence_ids) if part is not None]
    bounds = []
    for part in sorted({probe.sequence_ids[position] for position in inner}):
        own = [position for position in inner if probe.sequence_ids[position] == part]
        bounds.append((own[0], own[-1] + 1))
    starts, ends = [0, *(end for _, end in bounds)], [*(start for start, _ in bounds), len(probe.ids)]
    ids, types = np.array(probe.ids, np.int32), np.array(probe.type_ids, np.int8)
    return _Frame(
        [ids[start:end] for start, end in zip(starts, ends, strict=True)],
        [types[start:end] for start, end in zip(starts, ends, strict=True)],
        [int(types[start]) for start, _ in bounds],
    )


def longest_first(
    first: NDArray[np.int64], second: NDArray[np.int64], room: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """How many tokens of each part stay when the longer part is cut first (as `tokenizers` does it)."""
    short, long = np.minimum(first, second), np.maximum(first, second)
    both = short > room // 2
    kept_short = np.where(short + long <= room, short, np.where(both, room // 2, short))
    kept_long = np.where(short + long <= room, long, room - kept_short)
    swapped = first > second
    return np.where(swapped, kept_long, kept_short), np.where(swapped, kept_short, kept_long)


def _lengths(ids: list[list[int]]) -> NDArray[np.int64]:
    return np.fromiter(map(len, ids), np.int64, len(ids))


def _within(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """0, 1, ... for each length, end to end."""
    return np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def _joined(parts: list[Tokens]) -> Tokens:
    types = [part.type_ids for part in parts if part.type_ids is not None]
    return Tokens(
        np.concatenate([np.zeros(0, np.int32), *(part.ids for part in parts)]),
        np.concatenate([np.zeros(0, np.int32), *(part.lengths for part in parts)]),
        np.concatenate([np.zeros(0, bool), *(part.truncated for part in parts)]),
        np.concatenate(types) if types else None,
    )


def _word_end(spec: dict[str, Any]) -> re.Pattern[str] | None:
    """Finds the last character of a text before which it may be cut without changing the tokens before the cut.

    None where a tokenizer's words do not surely end at spaces.
    """
    normalizer, pre = spec.get("normalizer") or {}, spec.get("pre_tokenizer") or {}
    if any(token.get("lstrip") or token.get("rstrip") or " " in token["content"] for token in spec["added_tokens"]):
        return None
    if normalizer.get("type") not in (None, "BertNormalizer", "Lowercase", "NFC", "NFD"):
        return None
    if normalizer.get("handle_chinese_chars") and pre.get("type") == "BertPreTokenizer":
        return re.compile(r"(?s).*[ \u4e00-\u9fff]")
    by_space = pre.get("type") in ("BertPreTokenizer", "Whitespace", "WhitespaceSplit")
    return re.compile(r"(?s).* ") if by_space or (pre.get("type") == "ByteLevel" and pre.get("use_regex")) else None
