"""The baseline every classifier must beat: TF-IDF and a linear support vector machine, on the same split.

It takes seconds and no GPU. A fine-tuned encoder that does not beat it has a fault, or is not needed.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from sklearn.dummy import DummyClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.multiclass import OneVsRestClassifier
from sklearn.svm import LinearSVC

from models.labels import LabelColumn
from pipelines.evaluating.scoring import label_arrays
from pipelines.metrics import decision_metrics, labelled, truth
from pipelines.prepared import Prepared

TRAIN_ROWS = 100_000
"""Rows it learns from at most: the first of the (shuffled) training set."""
_FEATURES = 300_000
# Words in scripts without spaces between them are longer than any word.
_SPACED_WORD = 20


def measure_baseline(prepared: Prepared, split: str) -> dict[str, dict[str, float]]:
    """The baseline's metrics on the split, by label column; a column without labels has none."""
    columns = prepared.index.labels
    train, measured = _read_train(prepared), _read(prepared, split)
    texts = _texts(train)
    vectorizer = _vectorizer(texts)
    features = vectorizer.fit_transform(texts)
    measured_features = vectorizer.transform(_texts(measured))
    known, wanted = label_arrays(train, columns), label_arrays(measured, columns)
    found: dict[str, dict[str, float]] = {}
    for column in columns:
        has, asked = labelled(known[column.name]), labelled(wanted[column.name])
        found[column.name] = {}
        if has.any() and asked.any():
            decided = _decide(column, features[has], truth(known[column.name][has]), measured_features[asked])
            found[column.name] = decision_metrics(decided, truth(wanted[column.name][asked]), len(column.classes))
    return found


def _decide(column: LabelColumn, features: Any, labels: npt.NDArray[Any], asked: Any) -> npt.NDArray[Any]:
    if column.multi:
        model = OneVsRestClassifier(LinearSVC())
        with warnings.catch_warnings():
            # A class that no, or every, row of the training set has.
            warnings.filterwarnings("ignore", "Label .* is present in all training|Label not .* is present")
            model.fit(features, labels.astype(int))
        return np.asarray(model.predict(asked)).astype(bool)
    model = LinearSVC() if len(np.unique(labels)) > 1 else DummyClassifier()
    return np.asarray(model.fit(features, labels).predict(asked))


def _vectorizer(texts: Sequence[str]) -> TfidfVectorizer:
    sample = texts[:1000]
    words = sum(len(text.split()) for text in sample)
    shared = {"sublinear_tf": True, "max_features": _FEATURES, "dtype": np.float32}
    if sum(map(len, sample)) > _SPACED_WORD * max(words, 1):
        return TfidfVectorizer(analyzer="char", ngram_range=(1, 2), **shared)
    return TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"(?u)\b\w+\b", **shared)


def _texts(rows: pa.Table) -> list[str]:
    texts: list[str] = rows["text"].to_pylist()
    if "text_pair" not in rows.column_names:
        return texts
    return [f"{text} {pair}" for text, pair in zip(texts, rows["text_pair"].to_pylist(), strict=True)]


def _columns(prepared: Prepared) -> list[str]:
    index = prepared.index
    return ["text", *(["text_pair"] if index.pair else []), *(f"label:{column.name}" for column in index.labels)]


def _read(prepared: Prepared, split: str) -> pa.Table:
    return prepared.read_split(split, _columns(prepared))


def _read_train(prepared: Prepared) -> pa.Table:
    index = prepared.index.splits["train"]
    chunks = min(-(-TRAIN_ROWS // index.chunk_rows), index.chunks)
    return pa.concat_tables([prepared.read_chunk("train", chunk, _columns(prepared)) for chunk in range(chunks)])
