"""Masking personal data: what is found in made sentences, what is left alone, and what holds of any text."""

import pickle
import random
import re
import time
from collections.abc import Sequence

import phonenumbers
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from models import redaction
from models.names import Names
from models.phones import Country, Phones
from models.redaction import KINDS, REACH, RedactionSettings, Redactor
from models.spec import ClassifierSpec
from models.text import TextSettings, cleaned
from tests.personal_texts import FORMS, NEGATIVES, chinese_id, luhn_digit, made, negatives

REDACTOR = Redactor(RedactionSettings(names=("Anna", "Anna Maria", "李小龙")))
TAG = re.compile(r"\[(?:EMAIL|PHONE|CARD|IBAN|IP|US_SSN|CN_ID|NAME)\]")


def masked(text: str, **values: object) -> str:
    return RedactionSettings.model_validate(values).redactor.redact(text).text


@pytest.mark.parametrize("kind", FORMS)
def test_what_is_personal_is_replaced_and_nothing_else(kind: str) -> None:
    sentences = [each for each in made(120) if each.kind == kind]
    assert kind in KINDS
    for each in sentences:
        found = REDACTOR.redact(each.text)
        assert (found.text, found.counts) == (each.expected, {kind: 1}), each.text


def test_what_only_looks_like_it_stays() -> None:
    wrong = [each.text for each in negatives(20 * len(NEGATIVES)) if REDACTOR.redact(each.text).text != each.text]
    # Of random digits some are a number of somebody's.
    assert len(wrong) <= 4, wrong


STAY = [
    "4111 1111 1111 1112",  # another check digit
    "1234 5678 9012 3452",  # of no issuer, though its check digit is right
    "DE89 3704 0044 0532 0130 01",
    "110101199003072",
    "11010119900230777X",  # the 30th of February
    "000-12-3456",
    "666-12-3456",
    "my id is 123456789",
    "01.02.03.04",
    "256.1.1.1",
    "1.2.3",
    "version 1.2.3.4",
    "12:30:45",
    "abc::def",
    "@united: hi @jetblue",
    "react@18.2.0",
    "name@",
    "@name.surname",
    "a@b",
    "2125550123.50",
    "$2125550123",
    "#2125550123",
    "https://shop.example/orders/2125550123",
    "2024-01-02 08:15",
    "10:05 1994-12-19 06:10",
    "0162389030167",
    "",
]


@pytest.mark.parametrize("text", STAY)
def test_numbers_that_are_none_stay(text: str) -> None:
    assert masked(text) == text


CASES = {
    # Where two overlap, the surer one is taken, and all of it.
    "ask 13812345678@qq.com now": "ask [EMAIL] now",
    "IBAN DE89370400440532013000": "IBAN [IBAN]",
    "GB82 WEST 1234 5698 7654 32 thx": "[IBAN] thx",
    "pay 4111 1111 1111 1111 12/26 123": "pay [CARD] 12/26 123",
    "5 4111-1111-1111-1111": "5 [CARD]",
    "192.168.100.200:8080": "[IP]:8080",
    "2001:db8::8a2e:370:7334: down": "[IP]: down",
    "ssn 123456789": "ssn [US_SSN]",
    "(212) 555-0123 or 212.555.0199": "[PHONE] or [PHONE]",
    "2125550123 2125550124": "[PHONE] [PHONE]",
    "030 1234567/0171 1234567": "[PHONE]/[PHONE]",
    "(+49 30 123456)": "([PHONE])",
    "+49 (0)30 123456-78": "[PHONE]",
    "650-253-0000 ext. 123": "[PHONE]",
    "http://93.174.88.196/a.php": "http://[IP]/a.php",
    # Other scripts, other widths, marks that are not seen.
    "电话138\u200b1234\u200b5678请": "电话[PHONE]请",
    "٠٣٠ ١٢٣٤٥٦٧": "[PHONE]",
    "\uff14\uff11\uff11\uff11\u30001111\u20111111\u00a01111": "[CARD]",
    "zhang\uff20example\uff0ecom": "[EMAIL]",
    "«müller@bücher.de»": "«[EMAIL]»",
    "\u202a+972 50-234-5678\u202c": "\u202a[PHONE]\u202c",
    # A tag is another neighbour than what stood there.
    "a@b.com2125550123": "a@b.com2125550123",
    "x@y.org/a@b.com": "[EMAIL]/[EMAIL]",
}


@pytest.mark.parametrize("text", CASES)
def test_cases(text: str) -> None:
    assert masked(text) == CASES[text]


def test_only_the_kinds_that_are_wanted_are_masked() -> None:
    text = "bob@example.com, 212-555-0123, 4111111111111111, 10.1.2.3, DE89370400440532013000, 123-45-6789"
    assert masked(text, kinds=["email"]).startswith("[EMAIL], 212-555-0123, 4111111111111111, 10.1.2.3")
    assert masked(text, kinds=["card", "ip"]) == text.replace("4111111111111111", "[CARD]").replace("10.1.2.3", "[IP]")
    assert masked(text, kinds=["phone"], phone_countries=[]) == text
    assert masked("04 12 34 56 78, +33 6 12 34 56 78", phone_countries=["US"]) == "04 12 34 56 78, [PHONE]"


def test_names_are_whole_words_as_they_are_written() -> None:
    names = ["Anna", "Anna Maria", "O'Brien", "Müller", "李小龙", "EMAIL", "Ж", "Jean\u2013Luc\u00a0P"]

    def named(text: str) -> str:
        return masked(text, names=names)

    assert named("Anna's friend Anna Maria met Hannah, anna and Annamaria") == (
        "[NAME]'s friend [NAME] met Hannah, anna and Annamaria"
    )
    assert named("O'Brien, Frau Müller-Meier; Mu\u0308ller!") == "[NAME], Frau [NAME]-Meier; [NAME]!"
    assert named("Jean-Luc P, Jean\u2013Luc P.") == "[NAME], [NAME]."
    assert named("我是李小龙的朋友李小") == "我是[NAME]的朋友李小"
    assert named("bob@example.com EMAIL [EMAIL] Ж") == "[EMAIL] [NAME] [EMAIL] [NAME]"
    assert masked("Anna, bob@example.com", kinds=[], names=["Anna"]) == "[NAME], bob@example.com"
    assert list(Names(["Anna"])("Anna")) == [(0, 4)]


PIECES = st.one_of(
    st.text("0123456789 .-+()@:/,#[]xX", max_size=12),
    st.text(max_size=8),
    st.sampled_from(["a@b.com", "DE89 3704 0044 0532 0130 00", "4111 1111 1111 1111", "4111", "1111 1111", " ", "\n"]),
    st.sampled_from(["212-555-0123", "+49 30 1234567", "030 ", "10.1.2.3", "::1", "2001:db8::1", "[EMAIL]", "Anna"]),
    st.sampled_from(["123-45-6789", "ssn ", "version ", "11010119900307123X", "ext. 5", "\u200f", "\uff11", "\u00a0"]),
)
TEXTS = st.lists(PIECES, max_size=30).map("".join)


@given(TEXTS)
@example("a@b.com" * 3)
@example("1" * 30 + "@x.de" + "2125550123")
@settings(max_examples=200)
def test_masking_is_done_at_once_and_leaves_the_rest(text: str) -> None:
    found = REDACTOR.redact(text)
    assert REDACTOR.redact(found.text) == redaction.Redacted(found.text, {})
    assert sum(found.counts.values()) == len(TAG.findall(found.text)) - len(TAG.findall(text))
    if not found.counts:
        assert found.text == text
    position = 0
    for piece in TAG.split(found.text):
        position = text.index(piece, position) + len(piece)
    assert text.endswith(TAG.split(found.text)[-1])


@given(st.lists(TEXTS, max_size=4))
@settings(max_examples=100)
def test_nothing_spans_lines(texts: Sequence[str]) -> None:
    text = "\n".join(texts)
    assert REDACTOR.redact(text).text.split("\n") == REDACTOR.redact_all(text.split("\n"))


@pytest.mark.parametrize("seed", range(6))
def test_what_comes_far_behind_changes_nothing(seed: int) -> None:
    draw = random.Random(seed)
    pieces = [
        "4111",
        " 1111",
        "030 ",
        "+49 ",
        "212-555-0123",
        "-",
        "DE89 3704 ",
        " 0044",
        "12",
        "(",
        ")",
        " ",
        "x",
        "1.2.",
    ]
    text = "".join(draw.choices(pieces, k=400))
    whole = REDACTOR.redact(text).text
    differ = False
    for end in range(600, len(text), 37):
        cut = REDACTOR.redact(text[:end]).text
        assert whole.startswith(cut[:-REACH])
        differ = differ or not whole.startswith(cut)
    assert differ


@pytest.mark.parametrize("seed", range(5))
def test_of_all_check_digits_one_is_right(seed: int) -> None:
    draw = random.Random(seed)
    card, identity = "4" + "".join(draw.choices("0123456789", k=14)), chinese_id(draw)[:-1]
    assert [digit for digit in "0123456789" if masked(card + digit, kinds=["card"]) == "[CARD]"] == [luhn_digit(card)]
    assert sum(masked(identity + digit, kinds=["cn_id"]) == "[CN_ID]" for digit in "0123456789X") == 1


COUNTRIES = ["US", "GB", "DE", "FR", "CN", "IN", "BR", "JP", "RU", "ES", "IT", "NL", "AR", "MX", "KR", "ZA"]


@pytest.mark.parametrize("code", COUNTRIES)
def test_no_number_is_missed_before_the_matcher_is_asked(code: str) -> None:
    country, phones = Country.of(code), Phones([code])
    for kind in (phonenumbers.PhoneNumberType.FIXED_LINE, phonenumbers.PhoneNumberType.MOBILE):
        number = phonenumbers.example_number_for_type(code, kind)
        assert number
        for form in (phonenumbers.PhoneNumberFormat.NATIONAL, phonenumbers.PhoneNumberFormat.INTERNATIONAL):
            for written in (plain := phonenumbers.format_number(number, form), plain.replace(" ", "-")):
                if country.has(written):
                    assert list(phones(f"call {written} now")) == [(5, 5 + len(written))]


SLOW = {
    "pairs": "21 35 46 72 89 " * 1000,
    "cards that are none": "4111 1111 1111 1112 " * 500,
    "named numbers": "ssn " + "123 45 6789 " * 800,
    "brackets": "(0" * 5_000,
    "address signs": "a@" * 5_000,
    "one word": "a" * 20_000 + "@",
    "accounts that are none": "DE89A1234567890 " * 600,
    "wide": "\uff11\u200b" * 5_000,
}


@pytest.mark.parametrize("kind", SLOW)
def test_no_text_takes_long(kind: str) -> None:
    started = time.monotonic()
    REDACTOR.redact(SLOW[kind])
    assert time.monotonic() - started < 3


MISTAKES = {
    "kinds": ({"kinds": ["mail"]}, "Input should be 'email'"),
    "country": ({"phone_countries": ["US", "Germany"]}, "'Germany' is no country's code; write ISO 3166 codes"),
    "nothing": ({"kinds": []}, "give at least one of kinds, or names"),
    "name": ({"names": ["Anna", "- "]}, "'- ' is no name; write a word or several"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_the_settings_are_told(mistake: str) -> None:
    values, sentence = MISTAKES[mistake]
    with pytest.raises(ValidationError, match=re.escape(sentence)):
        RedactionSettings.model_validate(values)


def test_settings_go_to_other_processes_and_into_records() -> None:
    wanted = RedactionSettings(kinds=("email",), names=("Anna",))
    assert wanted.redactor is wanted.redactor
    again = pickle.loads(pickle.dumps(wanted))
    assert again == wanted
    assert "redactor" not in vars(again)
    assert again.redactor.redact("Anna a@b.com").counts == {"name": 1, "email": 1}
    assert pickle.loads(pickle.dumps(REDACTOR)).redact("Anna 212-555-0123").text == "[NAME] [PHONE]"
    assert RedactionSettings.model_validate_json(wanted.model_dump_json()) == wanted


def test_texts_to_classify_are_masked_as_the_spec_says() -> None:
    old = '{"labels": [], "max_length": 8, "text": {"repair": true, "normalise": "NFC"}}'
    assert ClassifierSpec.model_validate_json(old).text == TextSettings()
    assert TextSettings().identity() == {"repair": True, "normalise": "NFC"}
    spec = ClassifierSpec(labels=(), max_length=8, text=TextSettings(redact=RedactionSettings(names=("Anna",))))
    again = ClassifierSpec.model_validate_json(spec.model_dump_json())
    # White space is folded before: what was wrapped is found.
    assert cleaned(["Anna:  +1 212\n555 0123 &amp; a@b.com", "x"], again.text) == ["[NAME]: [PHONE] & [EMAIL]", "x"]
    assert again.text.identity()["redact"]["names"] == ["Anna"]
