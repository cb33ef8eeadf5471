"""Several classifiers that answer as one."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.engine import Engine
from models.ensemble import EnsembleEngine
from models.settings import InputError
from models.torch_engine import load_torch_engine
from tests.small_classifiers import CORPUS, SENTIMENT, TOPICS, make_classifier

BOTH = (SENTIMENT, TOPICS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_classifier(tmp_path_factory.mktemp("one"), BOTH)


def engine(folder: Path, temperature: float = 1.0) -> Engine:
    temperatures = {"sentiment": temperature, "topics": temperature}
    return load_torch_engine(folder, precision="fp32", temperature=temperatures)


def test_the_mean_of_the_probabilities_counts(folder: Path) -> None:
    members = [engine(folder, temperature) for temperature in (1.0, 2.0, -5.0)]
    together = EnsembleEngine(members)
    for number, found in enumerate(together.classify(CORPUS)):
        for column in ("sentiment", "topics"):
            each = [list(member.classify(CORPUS)[number].labels[column].probabilities.values()) for member in members]
            assert list(found.labels[column].probabilities.values()) == pytest.approx(np.mean(each, axis=0), abs=1e-5)


def test_one_that_is_sure_of_all_leaves_finite_outputs(folder: Path) -> None:
    sure = engine(folder, 1e-4)
    together = EnsembleEngine([sure, sure])
    assert np.isfinite(together.forward(together.encode(CORPUS))).all()


@pytest.mark.parametrize(
    ("others", "what"),
    [({"labels": (SENTIMENT,)}, "set of labels"), ({"max_length": 16}, "max_length"), ({}, "tokenizer")],
)
def test_members_must_read_and_answer_the_same(folder: Path, tmp_path: Path, others: dict[str, Any], what: str) -> None:
    other = make_classifier(tmp_path / "other", **{"labels": BOTH, **others})
    if what == "tokenizer":
        tokenizer = other / "tokenizer.json"
        tokenizer.write_text(tokenizer.read_text().replace('"late"', '"later"'))
    with pytest.raises(InputError, match=f"member 1 has another {what} than what is served"):
        EnsembleEngine([engine(folder), engine(other)])
