"""Finding telephone numbers, by Google's rules for each country (`phonenumbers`).

Its matcher takes about 0.2 ms for a country. So it is asked only about what could be a number: digits in groups, as
many as a country's numbers have, that begin as they do. The rules for that are its own; they cost some microseconds.
Of a text with thousands of such, all behind the first `_MOST_ASKED` are taken for numbers without asking.
"""

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import phonenumbers
from phonenumbers import Leniency, NumberFormat, NumberParseException, PhoneMetadata, PhoneNumberMatcher

from models.personal_data import Span

_MOST_ASKED = 1000
_LEAST_DIGITS, _MOST_DIGITS, _MOST_GROUPS = 7, 15, 7
_MOST_NATIONAL = 12  # Tickets and bar codes have 13.
_ABROAD = ("00", "011")
_ENOUGH_DIGITS = 9  # Behind so many a group like 0171 may begin another number.
_RUN = re.compile(r"[0-9]++(?:[ ./()-]{1,3}[0-9]++)*+")
_GROUP = re.compile(r"[0-9]+")
_LEAD = re.compile(r"(?:\(?\+ ?\(?|\()\Z")
_LONGEST_LEAD = 4
_EXTENSION = re.compile(r"(?i),? ?(?:ext\.?|extension|durchwahl|доб\.?|分机|转|x) ?[0-9]{1,6}(?![0-9A-Za-z])")
# What stands beside digits that are a part of something else: codes, sums of money, decimals, times.
_BEFORE = re.compile(r"(?:[A-Za-z0-9][-_]|[0-9][.,:]|[A-Za-z#№$€£¥₹=_]|[$€£¥₹#№] )\Z")
_AFTER = re.compile(r"[A-Za-z%€£¥₹°_]|[.,:-][0-9]|-[A-Za-z]| ?[€%]")
_DATE = re.compile(
    r"(?:19|20)[0-9]{2}[-./][01][0-9][-./][0-3][0-9]|[0-9]{1,2}[-./][0-9]{1,2}[-./](?:19|20)[0-9]{2}(?![0-9])"
)
_URL = re.compile(r"://\S*\Z")
_LONGEST_URL = 300
_KINDS = (
    "fixed_line",
    "mobile",
    "toll_free",
    "premium_rate",
    "shared_cost",
    "personal_number",
    "voip",
    "pager",
    "uan",
    "voicemail",
)


@dataclass(frozen=True)
class Country:
    """How a country's numbers are written inside it."""

    code: str
    number: re.Pattern[str]
    """Its numbers as they are dialled from near by."""
    before: re.Pattern[str] | None
    """What is dialled before them from further away: 0, or 1 in North America."""
    abroad: re.Pattern[str] | None
    """What leads abroad."""
    least_end: int
    """Digits in the last group, where a number is written in groups and does not begin with 0."""
    begins_with_zero: bool
    """Whether every number does, but for short ones."""
    rewritten: bool
    """Whether digits are changed on the way, so that `number` says nothing of them."""

    @classmethod
    def of(cls, code: str) -> "Country":
        """The country with a code of ISO 3166 that `phonenumbers` knows."""
        rules = PhoneMetadata.metadata_for_region(code)
        assert rules is not None
        kinds = (getattr(rules, kind) for kind in _KINDS)
        patterns = [kind.national_number_pattern for kind in kinds if kind and kind.national_number_pattern]
        return cls(
            code,
            re.compile("|".join(f"(?:{pattern})" for pattern in patterns)),
            re.compile(rules.national_prefix_for_parsing) if rules.national_prefix_for_parsing else None,
            re.compile(rules.international_prefix) if rules.international_prefix else None,
            min((_group_sizes(form)[-1][0] for form in rules.number_format), default=1),
            _begins_with_zero(rules),
            rules.national_prefix_transform_rule is not None,
        )

    def may_have(self, groups: Sequence[str]) -> bool:
        """Whether groups of digits could be a number; false where they are one only for a few islands."""
        digits = "".join(groups)
        if self.rewritten:
            return True
        if digits[0] != "0" and (
            (len(groups) > 1 and len(groups[-1]) < self.least_end)
            or (self.begins_with_zero and len(digits) > _LEAST_DIGITS)
        ):
            return False
        if self.number.fullmatch(digits):
            return True
        if self.abroad and (match := self.abroad.match(digits)):
            return len(digits) - match.end() >= _LEAST_DIGITS
        match = self.before.match(digits) if self.before else None
        return match is not None and self.number.fullmatch(digits, match.end()) is not None

    def has(self, written: str) -> bool:
        """Whether that is a number, all of it, with its digits in the country's groups or in one."""
        found = PhoneNumberMatcher(written, self.code, leniency=Leniency.STRICT_GROUPING)
        return any(match.end - match.start == len(written) for match in found)


def _group_sizes(form: NumberFormat) -> list[tuple[int, int]]:
    """The fewest and the most digits in each group of a form such as (\\d{2})(\\d{3,5})(\\d{4})."""
    groups = re.findall(r"\((?:\\d|\[[^]]*\])(?:\{(\d+)(?:,(\d+))?\})?", form.pattern or "")
    return [(int(least or 1), int(most or least or 1)) for least, most in groups]


def _begins_with_zero(rules: PhoneMetadata) -> bool:
    """Whether all numbers of eight digits or more are written with 0 before them."""
    long = [form for form in rules.number_format if sum(most for _, most in _group_sizes(form)) > _LEAST_DIGITS]
    return rules.national_prefix == "0" and all(
        (form.national_prefix_formatting_rule or "").startswith("0")
        and not form.national_prefix_optional_when_formatting
        for form in long
    )


class Phones:
    """Finds telephone numbers: international ones (+49 ...), and national ones of some countries."""

    def __init__(self, countries: Sequence[str]) -> None:
        """`countries` are codes of ISO 3166 that `phonenumbers` knows."""
        self._countries = [Country.of(code) for code in countries]

    def __call__(self, text: str) -> Iterator[Span]:
        """The spans of the numbers in a folded text."""
        asked = itertools.count()
        for run in _RUN.finditer(text):
            if run.end() - run.start() >= _LEAST_DIGITS:
                yield from self._in_run(text, *run.span(), asked)

    def _in_run(self, text: str, start: int, stop: int, asked: Iterator[int]) -> Iterator[Span]:
        groups = [match.span() for match in _GROUP.finditer(text, start, stop)]
        first = 0
        while first < len(groups):
            ends = _possible_ends(text, groups[first : first + _MOST_GROUPS])
            begin, end = self._number(text, groups[first][0], ends, asked)
            if end:
                extension = _EXTENSION.match(text, end)
                yield begin, extension.end() if extension else end
            first += 1
            while first < len(groups) and groups[first][0] < end:
                first += 1

    def _number(self, text: str, start: int, ends: Sequence[int], asked: Iterator[int]) -> Span:
        """The best number that begins with the digits at `start`, or (0, 0)."""
        lead = _LEAD.search(text, max(0, start - _LONGEST_LEAD), start)
        if lead and "+" in lead[0]:
            return _international(text, lead.start(), ends)
        begin = lead.start() if lead else start
        if _BEFORE.search(text, max(0, begin - 2), begin) or _in_url(text, begin):
            return 0, 0
        for end in ends:
            low = begin if _is_balanced(text[begin:end]) else start
            groups = _GROUP.findall(text, low, end)
            digits = sum(map(len, groups))
            if _DATE.search(text, low, end) or (digits > _MOST_NATIONAL and not groups[0].startswith(_ABROAD)):
                continue
            for country in self._countries:
                if country.may_have(groups) and (next(asked) >= _MOST_ASKED or country.has(text[low:end])):
                    return low, end
        return 0, 0


def _possible_ends(text: str, groups: Sequence[Span]) -> list[int]:
    """Where a number that begins with the first of some groups of digits may end: the longest first, but those last
    that reach into what looks like the next number.
    """
    digits, another = 0, False
    ends: list[int] = []
    joined: list[int] = []
    for position, (low, high) in enumerate(groups):
        another = another or (digits >= _ENOUGH_DIGITS and high - low > 2 and text[low] == "0")
        digits += high - low
        if digits > _MOST_DIGITS or (position > 1 and high - low == 1 and text[low - 1] not in "()"):
            break
        if digits >= _LEAST_DIGITS and not _AFTER.match(text, high):
            (joined if another else ends).append(high)
    return ends[::-1] + joined[::-1]


def _international(text: str, begin: int, ends: Sequence[int]) -> Span:
    """The longest number from a plus sign on; the longest that is none yet but could be, where there is none."""
    parsed = {end: number for end in ends if (number := _parsed(text[begin:end]))}
    valid = [end for end, number in parsed.items() if phonenumbers.is_valid_number(number)]
    if not parsed:
        return 0, 0
    end = max(valid or parsed)
    return (begin if _is_balanced(text[begin:end]) else text.index("+", begin)), end


def _parsed(written: str) -> phonenumbers.PhoneNumber | None:
    """An international number; None where no country has numbers of that length."""
    try:
        number = phonenumbers.parse(written, None)
    except NumberParseException:
        return None
    return number if phonenumbers.is_possible_number(number) else None


def _is_balanced(text: str) -> bool:
    return text.count("(") == text.count(")")


def _in_url(text: str, position: int) -> bool:
    return _URL.search(text[max(0, position - _LONGEST_URL) : position]) is not None
