"""Drift is told by an index that is right, over a window that holds the last texts and nothing else."""

import json
import math
import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy.stats import chi2
from tokenizers import Tokenizer, models

from models import drift
from models.drift import (
    NONE,
    OTHER,
    LabelBins,
    Reference,
    compare,
    make_reference,
    psi,
    psi_noise,
    shares,
    unknown_difference,
    unknown_share,
)
from models.engine import unknown_id
from models.labels import LabelColumn
from models.window import CONFIDENCE_EDGES, LENGTH_EDGES, Tally, Window

TOPIC = LabelColumn(name="topic", classes=("bag", "delay", "food"))
TAGS = LabelColumn(name="tags", classes=("new", "old"), multi=True)

COUNTS = st.integers(0, 1000)
PAIRS = st.lists(st.tuples(COUNTS, COUNTS), min_size=1, max_size=20).filter(
    lambda pairs: all(sum(column) for column in zip(*pairs, strict=True))
)


@given(PAIRS, st.randoms())
def test_the_index_is_a_distance(pairs: list[tuple[int, int]], order: random.Random) -> None:
    expected, observed = (shares(column) for column in zip(*pairs, strict=True))
    index = psi(expected, observed)
    assert index >= 0
    assert psi(expected, expected) == 0
    assert index == pytest.approx(psi(observed, expected))
    if any(abs(one - other) > 1e-3 for one, other in zip(expected, observed, strict=True)):
        assert index > 0
    places = list(range(len(pairs)))
    order.shuffle(places)
    assert index == pytest.approx(psi([expected[p] for p in places], [observed[p] for p in places]))


def test_the_index_is_the_one_of_the_books() -> None:
    expected = (0.2 - 0.1) * math.log(0.2 / 0.1) + (0.8 - 0.9) * math.log(0.8 / 0.9)
    assert psi([0.1, 0.9], [0.2, 0.8]) == pytest.approx(expected)
    assert psi([0.0, 1.0], [0.5, 0.5]) == pytest.approx(0.4999 * math.log(5000) - 0.5 * math.log(0.5))
    with pytest.raises(ValueError, match="2 bins were expected but 3 observed"):
        psi([0.5, 0.5], [0.5, 0.25, 0.25])


@pytest.mark.parametrize("bins", [2, 3, 10, 16, 77, 200])
def test_noise_is_what_chance_exceeds_once_in_a_hundred(bins: int) -> None:
    assert psi_noise(bins, 1000, 500) == pytest.approx(chi2.ppf(0.99, bins - 1) * (1 / 1000 + 1 / 500), rel=0.01)
    random = np.random.default_rng(bins)
    expected, observed = (random.multinomial(size, [1 / bins] * bins, size=1000) for size in (20_000, 10_000))
    limit = psi_noise(bins, 20_000, 10_000)
    above = sum(psi(shares(one), shares(two)) > limit for one, two in zip(expected, observed, strict=True))
    assert 0 < above <= 25
    assert psi_noise(1, 1000, 500) == 0


# Sums of them are exact.
EIGHTHS = st.integers(0, 8).map(lambda number: number / 8)
TEXTS = st.lists(
    st.tuples(st.integers(1, 2000), st.integers(0, 5), st.integers(0, 3), EIGHTHS, st.sets(st.integers(0, 2))),
    max_size=120,
)


def naive(texts: Sequence[tuple[int, int, int, float, set[int]]]) -> Tally:
    """The counts by numpy's histograms: [lower, upper) there, (lower, upper] here, hence the turned signs."""

    def binned(values: list[float], edges: Sequence[float]) -> list[int]:
        turned = [-math.inf, *(-edge for edge in reversed(edges)), math.inf]
        return [int(n) for n in np.histogram([-value for value in values], turned)[0][::-1]]

    tally = Tally.empty([4, 3])
    for column, labels in zip(tally.columns, ([{t[2]} for t in texts], [t[4] for t in texts]), strict=True):
        column.labels = [sum(bin in said for said in labels) for bin in range(len(column.labels))]
        column.confidence = binned([t[3] for t in texts], CONFIDENCE_EDGES)
    tally.lengths = binned([t[0] for t in texts], LENGTH_EDGES)
    tally.texts, tally.tokens, tally.unknown = len(texts), sum(t[0] for t in texts), sum(t[1] for t in texts)
    return tally


@given(TEXTS, st.integers(1, 60))
def test_a_window_counts_the_last_texts(texts: list[tuple[int, int, int, float, set[int]]], size: int) -> None:
    window, step = Window([4, 3], size), max(1, size // 10)
    for number, (tokens, unknown, topic, confidence, tags) in enumerate(texts, start=1):
        window.add(tokens, unknown, [((topic,), confidence), (sorted(tags), confidence)])
        assert min(number, size) <= window.counts().texts <= -(-size // step) * step + step - 1
    held = window.counts().texts
    assert window.counts() == naive(texts[len(texts) - held :])
    assert window.totals() == naive(texts)
    assert window.confidence_sums == [sum(t[3] for t in texts)] * 2


def test_a_window_needs_no_more_memory_for_more_texts() -> None:
    window = Window([3], 100)
    for _ in range(5000):
        window.add(8, 0, [((1,), 0.5)])
    assert len(window._full) <= 11
    assert window.totals().texts == 5000


def reference() -> Reference:
    decided = {
        "topic": np.array([0, 0, 1, 1, 1]),
        "tags": np.array([[1, 1], [1, 0], [0, 0], [0, 0], [1, 0]], dtype=bool),
    }
    confidence = {"topic": np.array([0.35, 0.95, 0.95, 1.0, 0.9]), "tags": np.array([0.1, 0.6, 0.5, 0.4, 0.9])}
    return make_reference((TOPIC, TAGS), decided, confidence, np.array([3, 4, 5, 100, 5000]), 51, "validation")


def test_a_reference_holds_shares() -> None:
    found = Reference.model_validate_json(reference().model_dump_json())
    assert (found.texts, found.split) == (5, "validation")
    assert found.columns["topic"].labels == {"bag": 0.4, "delay": 0.6, "food": 0.0, NONE: 0.0}
    assert found.columns["tags"].labels == pytest.approx({"new": 0.5, "old": 1 / 6, NONE: 1 / 3})
    assert found.columns["topic"].confidence == pytest.approx([0, 0, 0, 0.2, 0, 0, 0, 0, 0.2, 0.6])
    assert found.lengths == pytest.approx([0.4, 0.2, *[0] * 7, 0.2, *[0] * 5, 0.2])
    assert found.unknown_tokens == pytest.approx(51 / 5112)
    with pytest.raises(ValidationError):
        Reference.model_validate({**found.model_dump(), "lengths": (0.5, 0.5)})


def test_texts_like_the_reference_have_not_drifted_and_others_have() -> None:
    known = reference()
    bins = {column.name: LabelBins.of(column, known.columns[column.name]) for column in (TOPIC, TAGS)}
    window = Window([len(each.names) for each in bins.values()], 100)
    topics, tags = bins["topic"].place, bins["tags"].place
    same = [("bag", 0.35, ("new", "old"), 0.1, 3), ("bag", 0.95, ("new",), 0.6, 4), ("delay", 0.95, (NONE,), 0.5, 5)]
    same += [("delay", 1.0, (NONE,), 0.4, 100), ("delay", 0.9, ("new",), 0.9, 5000)]
    for topic, sure, tagged, tag_sure, tokens in same * 20:
        window.add(tokens, tokens // 100, [((topics[topic],), sure), ([tags[tag] for tag in tagged], tag_sure)])
    found = compare(known, bins, window.counts())
    signals = [("labels", "topic"), ("confidence", "topic"), ("labels", "tags"), ("confidence", "tags"), ("length", "")]
    assert [(shift.signal, shift.column) for shift in found] == signals
    assert all(shift.psi == pytest.approx(0, abs=1e-3) for shift in found)
    assert unknown_difference(known, window.counts()) == pytest.approx(0)
    for _ in range(110):
        window.add(40, 20, [((topics["food"],), 0.55), ((tags["old"],), 0.55)])
    assert all(shift.psi > 0.25 for shift in compare(known, bins, window.counts()))
    assert unknown_share(window.counts()) == 0.5
    assert unknown_difference(known, window.counts()) == pytest.approx(0.5 - 51 / 5112)


def test_label_bins_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    many = LabelColumn(name="intent", classes=tuple(f"c{number:03}" for number in range(300)))
    common = {"c299": 0.5, "c250": 0.25, "c001": 0.25}
    known = drift.ColumnReference(labels=common, confidence=(0.1,) * 10)
    bins = LabelBins.of(many, known)
    assert len(bins.names) == len(set(bins.names)) == drift.MAX_LABELS + 2
    assert {"c299", "c250", "c001", OTHER, NONE} <= set(bins.names)
    assert [bins.names[bins.place[name]] for name in ("c299", "c298", NONE)] == ["c299", OTHER, NONE]
    assert sum(bins.expected(known)) == pytest.approx(1)
    odd = LabelBins.of(LabelColumn(name="odd", classes=(NONE, "a")), None)
    assert odd.names == (NONE, "a")
    assert LabelBins.of(TOPIC, None).names == ("bag", "delay", "food", NONE)


def test_the_unknown_token_is_the_tokenizers() -> None:
    words = {"[PAD]": 0, "[UNK]": 1, "a": 2}
    assert unknown_id(Tokenizer(models.WordPiece(words, unk_token="[UNK]"))) == 1
    assert unknown_id(Tokenizer(models.WordLevel(words, unk_token="[UNK]"))) == 1
    assert unknown_id(Tokenizer(models.Unigram([("a", -1.0), ("<unk>", 0.0)], 1, False))) == 1
    assert unknown_id(Tokenizer(models.BPE({"a": 0, "b": 1}, []))) is None
    missing = json.loads(Tokenizer(models.WordLevel({"a": 0}, unk_token="[UNK]")).to_str())
    assert unknown_id(Tokenizer.from_str(json.dumps(missing))) is None
