"""Finding what identifies a person in a text: one function for each kind, from a text to the spans of what was found.

All read a folded text (`models.folding`): digits, spaces and hyphens of every script in ASCII. What has a check sum or
an exact form is taken only where it is right (`stdnum`, `ipaddress`), so that few numbers are taken for what they are
not. Nothing that is found spans lines. All are linear in the length of the text.
"""

import ipaddress
import re
from collections.abc import Iterator

from stdnum import iban, luhn
from stdnum.cn import ric
from stdnum.exceptions import ValidationError
from stdnum.us import ssn

Span = tuple[int, int]
"""Start and end."""

# Scripts written with spaces: Latin, Greek, Cyrillic, and accents that stand by themselves. A Chinese word before an
# address is no part of it.
_LETTERS = "A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u02af\u0300-\u036f\u0386\u0388-\u03ff\u0400-\u052f\u1e00-\u1fff"
_LOCAL = re.compile(f"[{_LETTERS}0-9_.!#$&'*+^`{{|}}~%-]")
_LOCAL_BEGIN = re.compile(f"[{_LETTERS}0-9_+]")
_DOMAIN = re.compile(
    f"(?:[{_LETTERS}0-9-]{{1,63}}\\.){{1,9}}(?:xn--[A-Za-z0-9-]{{2,59}}|[{_LETTERS}]{{2,24}})(?![{_LETTERS}0-9])"
)


def emails(text: str) -> Iterator[Span]:
    """Addresses; also with letters beyond ASCII, in scripts that have spaces between words."""
    at = text.find("@")
    end = 0
    while at >= 0:
        start = at
        while start > end and _LOCAL.match(text[start - 1]):
            start -= 1
        while start < at and not _LOCAL_BEGIN.match(text[start]):
            start += 1
        if start < at and (domain := _DOMAIN.match(text, at + 1)):
            end = domain.end()
            yield start, end
        at = text.find("@", at + 1)


# Looking ahead, so that what is none does not hide one that begins inside it.
_IBAN = re.compile(r"(?:(?<![0-9A-Za-z])|(?<=IBAN))(?=([A-Za-z]{2} ?[0-9]{2}(?:[ .-]?[0-9A-Za-z]){11,30}))")
_IBAN_SIZE, _IBAN_DIGITS = 15, 9


def ibans(text: str) -> Iterator[Span]:
    """Account numbers with a right check sum, and the form that they have in their country."""
    last = 0
    for match in _IBAN.finditer(text):
        start, stop = match.span(1)
        if start < last or sum(map(str.isdigit, match[1])) < _IBAN_DIGITS:
            continue
        for end in range(stop, start + _IBAN_SIZE - 1, -1):
            # Only where a group ends: the words behind it look the same.
            if _is_alphanumeric(text[end - 1]) and not _is_alphanumeric(text[end : end + 1]):
                number = re.sub("[ .-]", "", text[start:end])
                if len(number) >= _IBAN_SIZE and iban.is_valid(number, check_country=False):
                    yield start, end
                    last = end
                    break


_CARD_GROUPS = re.compile(r"[0-9]++(?:(?: - |  |[ .-])[0-9]++)*+")
_ISSUERS = re.compile(
    r"4[0-9]{15}(?:[0-9]{3})?"  # Visa; those of 13 digits are gone, and would be taken for bar codes
    r"|(?:5[1-5]|222[1-9]|22[3-9][0-9]|2[3-6][0-9]{2}|27[01][0-9]|2720)[0-9]*(?<=^[0-9]{16})"  # Mastercard
    r"|3[47][0-9]{13}|3(?:0[0-5]|[689][0-9])[0-9]{11}"  # American Express, Diners
    r"|(?:35(?:2[89]|[3-8][0-9])|6(?:011|4[4-9][0-9]|5[0-9]{2}|2[0-9]{2}))[0-9]{12,15}"  # JCB, Discover, UnionPay
    r"|(?:220[0-4]|8[12][0-9]{2}|60[0-9]{2}|9792)[0-9]{12}"  # Mir, RuPay, Troy
    r"|(?:5018|5020|5038|5893|6304|6759|676[1-3])[0-9]{8,15}"  # Maestro
)
_CARD_SIZES = range(12, 20)
_LEAST_GROUP, _MOST_GROUPS = 3, 5


def cards(text: str) -> Iterator[Span]:
    """Payment cards: of an issuer's range and length, with a right check sum (Luhn), in groups or not."""
    for match in _CARD_GROUPS.finditer(text):
        if match.end() - match.start() >= _CARD_SIZES.start:
            yield from _cards_in(text, *match.span())


def _cards_in(text: str, start: int, stop: int) -> Iterator[Span]:
    groups = [match.span() for match in re.compile("[0-9]+").finditer(text, start, stop)]
    if _is_alphanumeric(text[stop : stop + 1]):
        groups.pop()
    first = 0
    while first < len(groups):
        begin, number, taken = groups[first][0], "", 0
        if text[begin - 1 : begin] != "." or first == 0:  # else the digits behind a point
            for count, (low, high) in enumerate(groups[first : first + _MOST_GROUPS], 1):
                number += text[low:high]
                if high - low < _LEAST_GROUP or len(number) >= _CARD_SIZES.stop:
                    break
                if len(number) in _CARD_SIZES and _ISSUERS.fullmatch(number) and luhn.is_valid(number):
                    taken = count
        if taken:
            yield begin, groups[first + taken - 1][1]
        first += taken or 1


_CN_ID = re.compile(r"(?<![0-9])[1-9](?:[ -]?[0-9]){16}[ -]?[0-9Xx](?![0-9A-Za-z])")


def chinese_ids(text: str) -> Iterator[Span]:
    """Numbers of Chinese identity cards: 18 digits with a day of birth and a right check digit.

    Whether the place (the first six) is one is not asked: places come and go, and people keep their number.
    """
    for match in _CN_ID.finditer(text):
        groups = re.split("[ -]", match[0].upper())
        number = "".join(groups)
        if min(map(len, groups)) < _LEAST_GROUP or number[6:8] not in ("19", "20"):
            continue
        try:
            ric.get_birth_date(number)
        except ValidationError:
            continue
        if number[-1] == ric.calc_check_digit(number):
            yield match.span()


_SSN = re.compile(r"(?<![0-9A-Za-z])(?<![0-9]-)[0-9]{3}([ .-]?)[0-9]{2}\1[0-9]{4}(?![0-9A-Za-z]|-[0-9])")
_SSN_NAMED = re.compile(r"(?i)\b(?:(?:ssn|social security|soc\.? ?sec)\b|ss ?#)[^0-9\n\[]{0,30}\Z")
_NAMED_BEFORE = 60


def us_ssns(text: str) -> Iterator[Span]:
    """US social security numbers that can have been issued; where the text names them before, also without hyphens."""
    for match in _SSN.finditer(text):
        named = match[1] == "-" or _SSN_NAMED.search(text[max(0, match.start() - _NAMED_BEFORE) : match.start()])
        if named and ssn.is_valid(re.sub("[ .-]", "", match[0])):
            yield match.span()


_IPV4 = re.compile(r"(?<![0-9A-Za-z.])(?:[0-9]{1,3}\.){3}[0-9]{1,3}(?![0-9A-Za-z]|\.[0-9])")
_IPV6 = re.compile(r"(?<![0-9A-Za-z:.])[0-9A-Fa-f:]{2,40}(?![0-9A-Za-z:]|\.[0-9])")
_VERSION = re.compile(r"(?i)(?:\bv|\bver|version|release|build|firmware|版本|版)[ .:#]{0,3}\Z")


def ips(text: str) -> list[Span]:
    """Addresses of the internet protocol, versions 4 and 6, but for those that are nobody's (127.0.0.1, ::).

    Four numbers behind a word like "version" are none.
    """
    found = []
    for match in _IPV4.finditer(text):
        versioned = _VERSION.search(text[max(0, match.start() - 12) : match.start()])
        if not versioned and _is_somebodys(match[0]):
            found.append(match.span())
    for match in _IPV6.finditer(text):
        # A colon behind the address belongs to the sentence.
        written = match[0][:-1] if match[0].endswith(":") and not match[0].endswith("::") else match[0]
        if written.count(":") >= 2 and _looks_like_ipv6(written) and _is_somebodys(written):
            found.append((match.start(), match.start() + len(written)))
    return sorted(found)


def _looks_like_ipv6(written: str) -> bool:
    """Whether it is more than a short word of hexadecimal digits with "::" in it, such as a name in C++."""
    groups = [group for group in written.split(":") if group]
    return len(groups) > 2 or (bool(groups) and len(groups[0]) == 4 and any(map(str.isdigit, groups[0])))


def _is_somebodys(address: str) -> bool:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    return not (parsed.is_loopback or parsed.is_unspecified)


def _is_alphanumeric(sign: str) -> bool:
    return sign.isascii() and sign.isalnum()
