"""The engine: the same answers whatever stands beside a text, in the order given, as transformers itself gives."""

import random
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from models.redaction import RedactionSettings
from models.settings import InputError
from models.text import TextSettings
from models.torch_engine import TorchEngine, load_torch_engine
from tests.small_classifiers import CORPUS, SENTIMENT, TOPICS, make_classifier

WORDS = " ".join(CORPUS).split()
TEXTS = st.lists(st.lists(st.sampled_from(WORDS), max_size=50).map(" ".join), min_size=1, max_size=12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_classifier(tmp_path_factory.mktemp("classifier"), (SENTIMENT, TOPICS))


@pytest.fixture(scope="module")
def engine(folder: Path) -> TorchEngine:
    return load_torch_engine(folder, precision="fp32", temperature={"sentiment": 2.0})


@given(texts=TEXTS, budget=st.integers(1, 200))
@settings(max_examples=40, deadline=None)
def test_outputs_do_not_depend_on_the_batch(engine: TorchEngine, texts: list[str], budget: int) -> None:
    encoded = engine.encode(texts)
    together = engine.logits(encoded, budget)
    alone = np.concatenate([engine.forward([item]) for item in encoded])
    np.testing.assert_allclose(together, alone, atol=1e-5)


LINES = st.lists(st.sampled_from([*CORPUS, "Ã©tÃ© &amp; co", "<b>", "\x00", "", "q" * 150]), max_size=200)


@given(lines=LINES, ending=st.sampled_from(["\n", "\r\n"]))
@settings(max_examples=40, deadline=None)
def test_a_long_text_is_read_as_a_whole_one(engine: TorchEngine, lines: list[str], ending: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        text = ending.join(lines)
        opened = engine.encode([text])
        patch.setattr(TorchEngine, "_opening", lambda _, text, tokens: text)
        assert engine.encode([text]) == opened


NUMBERS = ["4111 1111", "1111 1111", "DE89 3704 0044", "0532 0130 00", "late bags"]


def test_a_long_text_is_masked_as_a_whole_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = load_torch_engine(folder, precision="fp32")
    engine.spec = engine.spec.model_copy(
        update={"text": TextSettings(redact=RedactionSettings(kinds=("card", "iban")))}
    )
    monkeypatch.setattr("models.engine._OPENING", 4)
    monkeypatch.setattr("models.engine._SPARE", 0)  # The tokenizer needs none; what is masked has a reach of its own.
    draw = random.Random(1)
    texts = ["\n".join(draw.choices(NUMBERS, k=100)) for _ in range(60)]
    opened = engine.encode(texts)
    monkeypatch.setattr(TorchEngine, "_opening", lambda _, text, tokens: text)
    assert opened == engine.encode(texts)


def test_of_a_long_text_only_the_beginning_costs_anything(engine: TorchEngine) -> None:
    text = "".join(f"â€œ{number} late bags\n" for number in range(100_000))
    started = time.monotonic()
    (encoded,) = engine.encode([text])
    assert time.monotonic() - started < 0.2  # its repair alone takes 1.5 s
    assert encoded.truncated
    assert len(encoded.ids) == 32


def test_outputs_are_those_of_transformers(folder: Path, engine: TorchEngine) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    inputs = AutoTokenizer.from_pretrained(folder)(CORPUS, padding=True, return_tensors="pt")
    with torch.inference_mode():
        expected = model(**inputs).logits.numpy()
    np.testing.assert_allclose(engine.logits(engine.encode(CORPUS)), expected, atol=1e-5)


def test_bf16_is_near_fp32_where_the_hardware_has_it(folder: Path, engine: TorchEngine) -> None:
    half = load_torch_engine(folder, precision="bf16")
    encoded = engine.encode(CORPUS)
    np.testing.assert_allclose(half.logits(encoded), engine.logits(encoded), atol=0.1)


def test_probabilities_by_column(engine: TorchEngine) -> None:
    logits = np.array([[0.0, 2.0, 4.0, -1.0, 0.0, 1.0, 50.0]], dtype=np.float32)
    found = engine.probabilities(logits)
    softened = np.exp([0.0, 1.0, 2.0])  # the temperature is 2
    np.testing.assert_allclose(found["sentiment"][0], softened / softened.sum(), rtol=1e-5)
    np.testing.assert_allclose(found["topics"][0], 1 / (1 + np.exp([1.0, 0.0, -1.0, -50.0])), rtol=1e-5)


def test_answers_name_classes(engine: TorchEngine) -> None:
    long = " ".join(WORDS * 5)
    short, cut = engine.classify(["lovely crew", long])
    sentiment = short.labels["sentiment"]
    assert sentiment.label == max(sentiment.probabilities, key=sentiment.probabilities.__getitem__)
    assert list(sentiment.probabilities) == list(SENTIMENT.classes)
    assert sum(sentiment.probabilities.values()) == pytest.approx(1, abs=1e-5)
    topics = short.labels["topics"]
    assert topics.label == [name for name, value in topics.probabilities.items() if value >= 0.5]
    assert (short.truncated, cut.truncated, cut.tokens) == (False, True, 32)


def test_numbers_that_are_none_are_not_answered(engine: TorchEngine) -> None:
    logits = np.array([[np.nan, 2.0, 4.0, -1.0, 0.0, 1.0, 2.0]], dtype=np.float32)
    (answer,) = engine.answers(engine.encode(["late"]), logits)
    assert answer.labels["sentiment"].label is None
    assert answer.labels["sentiment"].probabilities == {}
    assert answer.labels["topics"].label == ["delay", "food", "price"]


def test_a_pair_is_read_with_its_partner(tmp_path: Path) -> None:
    engine = load_torch_engine(make_classifier(tmp_path, pair=True, max_length=8), precision="fp32")
    first, swapped, long = engine.encode(["good", "crew", "late " * 9], ["crew", "good", "bag " * 9])
    assert first.type_ids is not None
    assert len(first.type_ids) == len(first.ids)
    assert set(first.type_ids) == {0, 1}
    assert (first.truncated, long.truncated, len(long.ids)) == (False, True, 8)
    outputs = engine.logits([first, swapped, long])
    assert not np.allclose(outputs[0], outputs[1], atol=1e-3)
    with pytest.raises(InputError, match="pairs of texts"):
        engine.encode(["good"])
    with pytest.raises(InputError, match="2 texts but 1"):
        engine.encode(["good", "bad"], ["crew"])


def test_a_decoder_reads_its_last_token_and_the_empty_text(tmp_path: Path) -> None:
    engine = load_torch_engine(make_classifier(tmp_path, decoder=True), precision="fp32")
    encoded = engine.encode(["", "late", "the flight was late again"])
    together = engine.forward(encoded)
    alone = np.concatenate([engine.forward([item]) for item in encoded])
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_no_texts_give_no_outputs(engine: TorchEngine) -> None:
    assert engine.logits(engine.encode([])).shape == (0, 7)
    assert engine.classify([]) == []


def test_progress_is_told(engine: TorchEngine) -> None:
    told: list[int] = []
    engine.logits(engine.encode(CORPUS * 4), batch_tokens=32, progress=told.append)
    assert told == sorted(set(told))
    assert told[-1] == 12


def test_a_folder_without_classifier_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no classifier: there is no classifier\.json"):
        load_torch_engine(tmp_path)
