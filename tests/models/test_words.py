"""Words are cut out of a text exactly, whatever the tokenizer and the script."""

import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE, Unigram
from tokenizers.processors import ByteLevel as TrimmedOffsets

from models.text import TextSettings, cleaned
from models.words import Word, words_of
from tests.small_classifiers import CORPUS, train_tokenizer

LETTERS = sorted({letter for text in CORPUS for letter in text if letter != " "})


def byte_level(*, trimmed: bool) -> Tokenizer:
    """As GPT-2's, or as RoBERTa's, whose words do not hold the space before them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({letter: place for place, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if trimmed:
        tokenizer.post_processor = TrimmedOffsets(trim_offsets=True)
    return tokenizer


def sentence_piece(*, split: bool) -> Tokenizer:
    """As XLM-RoBERTa's; without `split`, as Llama's, to which a text is one word."""
    pieces = [("<unk>", 0.0), ("▁", -3.0), *((letter, -4.0) for letter in LETTERS), ("▁late", -2.0), ("再び", -2.0)]
    tokenizer = Tokenizer(Unigram(pieces, unk_id=0))
    if split:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return tokenizer


def word_piece() -> Tokenizer:
    """As BERT's, over another Unicode form."""
    tokenizer = Tokenizer.from_str(train_tokenizer().backend_tokenizer.to_str())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.BertNormalizer()])
    return tokenizer


TOKENIZERS = {
    "gpt2": byte_level(trimmed=False),
    "roberta": byte_level(trimmed=True),
    "xlm-roberta": sentence_piece(split=True),
    "llama": sentence_piece(split=False),
    "bert": word_piece(),
}
ODD = [
    "👩🏽‍🚀",
    "🇦🇶",
    "مرحبا بالعالم",
    "שָׁלוֹם",
    "\u202eabc\u202c",
    "再び遅れた",
    "航班又晚点了",
    "½",
    "…",
    "é",
    "e\u0301",
    "\u200b",
    "ก็ดี",
]
TEXTS = st.lists(
    st.sampled_from([*" ".join(CORPUS).split(), *ODD, " ", "  ", "!", "\n"]) | st.text(max_size=6), max_size=12
).map("".join)
PLAIN = TextSettings(normalise="none")


def words(name: str, text: str, partner: str | None = None) -> tuple[list[str], list[Word]]:
    encoding = TOKENIZERS[name].encode(text, partner)
    texts = (text,) if partner is None else (text, partner)
    found = words_of(encoding, texts)
    return [texts[word.source][word.start : word.end] for word in found], found


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=TEXTS, partner=st.none() | TEXTS, folded=st.booleans())
@settings(max_examples=40, deadline=None)
def test_each_token_is_of_one_word_and_words_stand_apart(
    name: str, text: str, partner: str | None, folded: bool
) -> None:
    given_texts = cleaned([text] if partner is None else [text, partner], TextSettings() if folded else PLAIN)
    encoding = TOKENIZERS[name].encode(*given_texts)
    found = words_of(encoding, given_texts)
    own = [place for place, added in enumerate(encoding.special_tokens_mask) if not added]
    assert [place for word in found for place in word.tokens] == own
    for source, whole in enumerate(given_texts):
        places = [(word.start, word.end) for word in found if word.source == source]
        assert places == sorted(places)
        assert all(0 <= start <= end <= len(whole) for start, end in places)
        assert all(end <= after for (_, end), (after, _) in itertools.pairwise(places))
        for start, end in places:
            assert whole[start:end] == whole[start:end].strip() or whole[start:end].isspace()
        if name in ("gpt2", "roberta"):  # which leave nothing out
            covered = "".join(whole[start:end] for start, end in places)
            assert re.sub(r"\s", "", covered) == re.sub(r"\s", "", whole)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=st.lists(st.sampled_from(" ".join(CORPUS).split()), min_size=1, max_size=10))
@settings(max_examples=10, deadline=None)
def test_words_between_spaces_are_the_words(name: str, text: list[str]) -> None:
    assert words(name, " ".join(text))[0] == text
    found, places = words(name, " ".join(text), "late again")
    assert found == [*text, "late", "again"]
    assert [word.source for word in places] == [0] * len(text) + [1, 1]


def test_what_one_character_becomes_is_one_word() -> None:
    assert words("gpt2", "late 👩 again")[0] == ["late", "👩", "again"]
    assert words("bert", "late… ½")[0] == ["late", "…", "½"]


@pytest.mark.parametrize(
    ("name", "chinese"),
    [("bert", ["晚", "点", "了"]), ("gpt2", ["晚", "点", "了"]), ("xlm-roberta", ["晚点了"]), ("llama", ["晚点了"])],
)
def test_scripts_without_spaces_are_cut_where_tokens_are(name: str, chinese: list[str]) -> None:
    assert words(name, "late 晚点了 late")[0] == ["late", *chinese, "late"]


@pytest.mark.parametrize("name", ["xlm-roberta", "llama"])
def test_a_token_of_such_a_script_is_a_word(name: str) -> None:
    assert words(name, "再び晚点late")[0] == ["再び", "晚点", "late"]
