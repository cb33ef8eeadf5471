"""Cleaning text alike wherever it comes from: what was done to the training texts is done to those to classify.

Whole arrays go through Arrow's compiled functions; Python touches only the texts that need it. A request's few texts
go one by one: Arrow compiles its expressions at each call, which takes longer (2 ms) than all else that is done to
them. Repair is the dear one: ftfy takes 20-60 us for a tweet and 200 for a page, so it is called only where it could
change something (`may_need_repair`), and not where entities or line breaks in ASCII are all there is to mend.
"""

import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Literal

import ftfy
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from ftfy.badness import BADNESS_RE
from ftfy.fixes import (
    fix_c1_controls,
    fix_line_breaks,
    fix_surrogates,
    remove_control_chars,
    remove_terminal_escapes,
    unescape_html,
)
from numpy.typing import NDArray
from pydantic import Field

from models.redaction import RedactionSettings, Redactor
from models.settings import Settings, added

REPAIRS = ftfy.TextFixerConfig(
    # Mis-decoded text, entities, control characters and stray line breaks are damage. Curly quotes, wide Chinese
    # punctuation and ligatures are how people write: they stay. The Unicode form is the next step's business.
    uncurl_quotes=False,
    fix_character_width=False,
    fix_latin_ligatures=False,
    normalization=None,
    explain=False,
)
_DAMAGE = (
    r"&#?[0-9A-Za-z]{1,24};|[\x00-\x08\x0b-\x1f\x7f-\x{9f}\x{2028}\x{2029}\x{206a}-\x{206f}\x{feff}\x{fff9}-\x{fffc}]"
)
# Entities in entities take a round over the text for each level. Long chains are shortened at once; whatever else is
# nested deeper than the rounds stays as it then is.
_CHAIN = re.compile(r"&(?:(?:amp|AMP|#0{0,9}38|#[xX]0{0,9}26);){8,}")
_ROUNDS = 16
# ftfy costs 10 us for the shortest line. Up to here looking for the lines that need it costs more than it saves.
_FEW_LINES = 8
_FEW_TEXTS, _FEW_CHARACTERS = 512, 4096
"""Up to as many texts, and characters of texts that are not in ASCII, Arrow takes longer than Python."""
_CONTROLS = re.compile(r"[^\t\n\r -~]")
_ODD_SPACE = r"[\t\n\x0b\f\r\x1c-\x1f\x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}]"
_SPACES = f"[ {_ODD_SPACE[1:]}+"
_UNFOLDED = f"{_ODD_SPACE}|  |^ | $"
_PYTHON_DAMAGE = re.compile(re.sub(r"\\x\{(\w+)\}", lambda code: re.escape(chr(int(code[1], 16))), _DAMAGE))


class TextSettings(Settings):
    """What is done to a text before it is tokenised."""

    repair: bool = Field(True, description="Mend mis-decoded text (ftfy).")
    normalise: Literal["NFC", "NFKC", "none"] = Field("NFC", description="Unicode form; white space is folded too.")
    redact: RedactionSettings | None = added(
        None,
        description="Masks personal data, in texts to classify later as in these; {} masks all kinds.",
    )


def cleaned(texts: Sequence[str], settings: TextSettings) -> list[str]:
    """The texts, repaired, normalised and freed of personal data as the settings say."""
    result: list[str]
    if _are_few(texts):
        result = [_cleaned_one(text, settings) for text in texts]
    else:
        array = pa.array(texts, pa.string())
        if settings.repair:
            array = repair(array)
        if settings.normalise != "none":
            array = normalise(array, settings.normalise)
        result = array.to_pylist()
    return result if settings.redact is None else settings.redact.redactor.redact_all(result)


def _cleaned_one(text: str, settings: TextSettings) -> str:
    if settings.repair and _is_suspect(text):
        text = _mended(text)
    if settings.normalise == "none":
        return text
    if not text.isascii():
        # By Arrow here too: Python knows another version of Unicode.
        text = pc.utf8_normalize(pa.array([text], pa.string()), form=settings.normalise)[0].as_py()
    return " ".join(text.split())  # _SPACES is what `split` splits at


def _are_few(texts: Sequence[str]) -> bool:
    return len(texts) <= _FEW_TEXTS and sum(len(text) for text in texts if not text.isascii()) <= _FEW_CHARACTERS


def _is_suspect(text: str) -> bool:
    """`may_need_repair` of one text. Text in ASCII cannot be mis-decoded."""
    return bool(_PYTHON_DAMAGE.search(text) or (not text.isascii() and BADNESS_RE.search(text)))


def may_need_repair(texts: pa.Array) -> NDArray[np.bool_]:
    """Which texts ftfy might change, at a small part of its cost: never false for one that it would change."""
    return _mask(pc.match_substring_regex(texts, _damage()))


@cache
def _damage() -> str:
    """What ftfy mends, for RE2: ftfy's own expression for mis-decoded text, without the layout, and _DAMAGE."""
    plain, inside, pattern = "", False, BADNESS_RE.pattern
    position = 0
    while position < len(pattern):
        sign = pattern[position]
        if sign == "#" and not inside:
            position = pattern.index("\n", position)
        elif sign == "\\":
            plain += pattern[position : position + 2]
            position += 1
        elif inside or not sign.isspace():
            plain += sign
            inside = sign != "]" and (inside or sign == "[")
        position += 1
    # In RE2 these two mean ASCII alone.
    plain = plain.replace(r"\s", _SPACES.removesuffix("+")).replace(r"\w", r"[\pL\pN_]")
    return f"(?m:{plain})|{_DAMAGE}"


def repair(texts: pa.Array) -> pa.Array:
    """The texts as ftfy mends them (see REPAIRS)."""
    damaged = may_need_repair(texts)
    if not damaged.any():
        return texts
    mended = [_mended(text) for text in texts.filter(pa.array(damaged)).to_pylist()]
    return pc.replace_with_mask(texts, pa.array(damaged), pa.array(mended, pa.string()))


def _mended(text: str) -> str:
    """`ftfy.fix_text(text, REPAIRS)`; without its cost where entities and line breaks in ASCII are all there is, nor
    its squared cost where entities are nested by the thousand.
    """
    html = "<" in text  # then ftfy leaves entities alone from that line on
    mended = text
    for _ in range(_ROUNDS):
        if not mended.isascii() or _CONTROLS.search(mended) or (html and "&" in text):
            break
        before = mended
        mended = _unescaped(mended).replace("\r\n", "\n").replace("\r", "\n")
        if mended == before:
            return mended
    lines = re.findall(r"[^\n]*\n|[^\n]+", text)
    damaged = _damaged_lines(lines)
    unescape = True
    known: dict[tuple[str, bool], str] = {}
    for index, line in enumerate(lines):
        unescape = unescape and "<" not in line
        if damaged[index]:
            if (line, unescape) not in known:
                known[line, unescape] = _mended_line(line, unescape)
            lines[index] = known[line, unescape]
    return "".join(lines)


def _damaged_lines(lines: list[str]) -> Sequence[bool]:
    if len(lines) <= _FEW_LINES:
        return [True] * len(lines)
    if _are_few(lines):
        return [_is_suspect(line) for line in lines]
    found: list[bool] = may_need_repair(pa.array(lines, pa.string())).tolist()
    return found


def _mended_line(line: str, unescape: bool) -> str:
    """What `ftfy.fix_and_explain` does with REPAIRS, in a bounded number of rounds."""
    for _ in range(_ROUNDS):
        before = line
        line = ftfy.fix_encoding(_unescaped(line) if unescape else line, REPAIRS)
        for fix in (fix_c1_controls, fix_line_breaks, fix_surrogates, remove_terminal_escapes, remove_control_chars):
            line = fix(line)
        if line == before:
            break
    return line


def _unescaped(text: str) -> str:
    return str(unescape_html(_CHAIN.sub("&amp;", text)))


def normalise(texts: pa.Array, form: str) -> pa.Array:
    """The texts in one Unicode form, with white space folded: words with single spaces between."""
    texts = pc.utf8_normalize(texts, form=form)
    unfolded = pc.match_substring_regex(texts, _UNFOLDED)
    if not pc.any(unfolded).as_py():
        return texts
    folded = pc.utf8_trim(pc.replace_substring_regex(texts.filter(unfolded), _SPACES, " "), " ")
    return pc.replace_with_mask(texts, unfolded, folded)


def redact(texts: pa.Array, redactor: Redactor) -> tuple[pa.Array, dict[str, int]]:
    """The texts without personal data, and how much of each kind there was. What is null stays null."""
    counts: Counter[str] = Counter()
    masked: list[str | None] = []
    changed = False
    for text in texts.to_pylist():
        found = redactor.redact(text) if text is not None else None
        masked.append(found.text if found else None)
        if found and found.counts:
            counts.update(found.counts)
            changed = True
    return pa.array(masked, pa.string()) if changed else texts, dict(counts)


def _mask(values: pa.Array) -> NDArray[np.bool_]:
    return np.asarray(values.to_numpy(zero_copy_only=False), dtype=bool)
