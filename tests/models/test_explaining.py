"""Attributions add up, and name the words that a classifier goes by."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from models import explaining
from models.classifier import save
from models.explaining import Explainer, Explanation, UnexplainableError
from models.settings import InputError
from models.spec import ClassifierSpec, label_config
from models.torch_engine import load_torch_engine
from tests.pipelines import tiny
from tests.small_classifiers import CORPUS, SENTIMENT, TOPICS, make_classifier, train_tokenizer

TEMPERATURE = {"sentiment": 2.0}


def make_other(folder: Path, architecture: str, **more: Any) -> Path:
    """A classifier of another architecture, with random weights."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer()
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = AutoConfig.for_model(
        architecture,
        vocab_size=len(tokenizer),
        pad_token_id=0,
        max_position_embeddings=64,
        initializer_range=0.3,
        **{**sizes, **more},
        **label_config((SENTIMENT, TOPICS)),
    )
    folder.mkdir()
    model = AutoModelForSequenceClassification.from_config(config)
    save(model, tokenizer, ClassifierSpec(labels=(SENTIMENT, TOPICS), max_length=32), folder)
    return folder


MAKERS: dict[str, Callable[[Path], Path]] = {
    "bert": lambda folder: make_classifier(folder, (SENTIMENT, TOPICS)),
    "pair": lambda folder: make_classifier(folder, (SENTIMENT, TOPICS), pair=True),
    "gpt2": lambda folder: make_classifier(folder, (SENTIMENT, TOPICS), decoder=True),
    "gpt2-pair": lambda folder: make_classifier(folder, (SENTIMENT, TOPICS), decoder=True, pair=True),
    "roberta": lambda folder: make_other(folder, "roberta"),
    "distilbert": lambda folder: make_other(folder, "distilbert", dim=32, n_layers=2, n_heads=4, hidden_dim=64),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("classifiers")
    return {name: make(folder / name) for name, make in MAKERS.items()}


@pytest.fixture(scope="module")
def explainers(folders: dict[str, Path]) -> dict[str, Explainer]:
    return {name: Explainer(folder, TEMPERATURE, threads=1) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Explainer:
    """Of a classifier that has learnt to tell texts that name a tool from others."""
    return Explainer(tiny.make_classifier(tmp_path_factory.mktemp("tools")))


@pytest.fixture(scope="module")
def moods(tmp_path_factory: pytest.TempPathFactory) -> Explainer:
    """Of a classifier that has learnt that `bad` makes a text sad."""
    return Explainer(tiny.make_classifier(tmp_path_factory.mktemp("moods"), (tiny.MOOD,), steps=150))


def by_word(explanation: Explanation) -> dict[str, float]:
    return {word.text: word.attribution for word in explanation.words}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize(("column", "label"), [("sentiment", None), ("sentiment", "neutral"), ("topics", "delay")])
def test_attributions_add_up_to_what_the_text_brings(
    explainers: dict[str, Explainer], folders: dict[str, Path], name: str, column: str, label: str | None
) -> None:
    pair = "Lovely\n crew &amp; food" if "pair" in name else None
    found = explainers[name].explain("The  flight was LATE again!", pair, column, label)
    assert found.relative_error < 0.05
    assert found.error == pytest.approx(abs(found.total - found.difference))
    assert found.relative_error == pytest.approx(found.error / max(abs(found.difference), 0.02))
    assert sum(word.attribution for word in found.words) == pytest.approx(found.total, abs=1e-6)
    assert abs(found.difference) > 1e-3
    assert (found.text, found.pair) == ("The flight was LATE again!", "Lovely crew & food" if pair else None)
    for word in found.words:
        text = found.pair if word.source == "pair" else found.text
        assert text is not None
        assert text[word.start : word.end] == word.text
    expected = ["The", "flight", "was", "LATE", "again", "!", *(["Lovely", "crew", "&", "food"] if pair else [])]
    assert [word.text for word in found.words] == expected
    engine = load_torch_engine(folders[name], precision="fp32", temperature=TEMPERATURE)
    (answer,) = engine.classify(["The flight was LATE again!"], None if pair is None else [pair])
    prediction = answer.labels[column]
    assert found.probability == pytest.approx(prediction.probabilities[found.label], abs=1e-5)
    assert found.label == (label or prediction.label)
    assert (found.tokens, found.truncated, found.column) == (answer.tokens, False, column)


FRAMES = ["the {} was very good", "very {} and a", "{}", "the cat and the {} a"]


@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("tool", tiny.TOOLS)
def test_the_word_that_decides_is_named(tools: Explainer, tool: str, frame: str) -> None:
    found = tools.explain(frame.format(tool))
    assert (found.label, found.difference > 1) == ("tool", True)
    attributions = by_word(found)
    assert attributions.pop(tool) > 3 * sum(map(abs, attributions.values()))
    against = by_word(tools.explain(frame.format(tool), label="animal"))
    assert against.pop(tool) < -3 * sum(map(abs, against.values()))


@pytest.mark.parametrize("frame", FRAMES)
def test_the_word_that_decides_is_named_for_a_multi_label_column(moods: Explainer, frame: str) -> None:
    found = moods.explain(frame.format("bad"))
    assert (found.label, found.difference > 1) == ("sad", True)
    attributions = by_word(found)
    assert attributions.pop("bad") > 3 * sum(map(abs, attributions.values()))
    without = moods.explain(frame.format("the"), label="sad")
    assert all(abs(word.attribution) < 0.1 * found.total for word in without.words)


def test_the_difference_is_the_logits(explainers: dict[str, Explainer]) -> None:
    """BERT takes nothing from the ids but embeddings, so that its baseline can be asked for as a text."""
    engine = explainers["bert"]._engine
    (encoded,) = engine.encode(CORPUS[:1])
    padding = [number if number in (2, 3) else 0 for number in encoded.ids]
    inputs = engine.inputs([encoded])
    with torch.no_grad():
        text, baseline = (
            engine.model(**{**inputs, "input_ids": torch.tensor([ids])}).logits[0] for ids in (encoded.ids, padding)
        )
    found = explainers["bert"].explain(CORPUS[0], column="topics", label="food")
    assert found.difference == pytest.approx(float(text[5] - baseline[5]), abs=1e-5)


def test_the_likeliest_class_of_a_multi_label_column(explainers: dict[str, Explainer]) -> None:
    found = explainers["bert"].explain("late", column="topics")
    probabilities = {each: explainers["bert"].explain("late", column="topics", label=each) for each in TOPICS.classes}
    assert found.label == max(probabilities, key=lambda each: probabilities[each].probability)


def test_a_last_layer_that_works_for_one_token_is_explained_alike(folders: dict[str, Path]) -> None:
    short, whole = Explainer(folders["bert"]), Explainer(folders["bert"])
    del whole._engine.model.base_model.encoder.layer[-1].forward
    assert "forward" in vars(short._engine.model.base_model.encoder.layer[-1])
    one, other = (by_word(each.explain(CORPUS[1], column="topics", label="bag")) for each in (short, whole))
    assert one == pytest.approx(other, abs=1e-5)


def test_steps_are_doubled_until_the_error_is_small(
    moods: Explainer, explainers: dict[str, Explainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert explainers["bert"].explain(CORPUS[0], column="topics").steps == 16
    rough = moods.explain("the cat was bad", steps=2, max_steps=2)
    assert (rough.steps, rough.relative_error > 0.05) == (2, True)
    fine = moods.explain("the cat was bad", steps=2)
    assert (fine.steps > 2, fine.relative_error < 0.05) == (True, True)
    monkeypatch.setattr(explaining, "TOLERANCE", 0.0)
    assert moods.explain("the cat was bad", steps=2, max_steps=24).steps == 24


def test_memory_is_bounded_and_what_is_found_is_the_same(folders: dict[str, Path]) -> None:
    sizes: list[int] = []
    explainer = Explainer(folders["bert"], batch_tokens=48)
    explainer._engine.model.get_input_embeddings().register_forward_hook(
        lambda _module, _given, output: sizes.append(output.shape[0] * output.shape[1])
    )
    small = explainer.explain(CORPUS[0], column="topics")
    assert max(sizes) == 42  # six times seven tokens
    large = Explainer(folders["bert"], batch_tokens=4096).explain(CORPUS[0], column="topics")
    assert by_word(small) == pytest.approx(by_word(large), abs=1e-5)


def test_a_long_text_is_explained_as_far_as_it_is_read(tmp_path: Path) -> None:
    explainer = Explainer(make_classifier(tmp_path, max_length=512))
    text = "late bags\n" * 5000
    found = explainer.explain(text, steps=2, max_steps=2)
    assert (found.tokens, found.truncated) == (512, True)
    assert found.words[-1].end <= len(found.text) < len(text)
    assert sum(word.attribution for word in found.words) == pytest.approx(found.total, abs=1e-6)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_a_text_of_nothing_has_no_words(explainers: dict[str, Explainer], name: str) -> None:
    found = explainers[name].explain("\x00", column="topics")
    assert found.words == ()
    assert (found.total, found.difference, found.error) == (0, 0, 0)


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({}, "column is missing: the classifier has several, sentiment and topics; name one."),
        ({"column": "mood"}, "column: there is no label column 'mood'; there is sentiment and topics."),
        ({"column": "topics", "label": "late"}, "the column topics has no class 'late'; its classes are bag, delay"),
        ({"column": "topics", "pair": "crew"}, "the classifier takes single texts"),
    ],
)
def test_what_there_is_not_is_told(explainers: dict[str, Explainer], asked: dict[str, str], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        explainers["bert"].explain("late", **asked)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="pairs of texts"):
        explainers["pair"].explain("late", column="topics")


def test_numbers_that_are_none_are_told(tmp_path: Path) -> None:
    explainer = Explainer(make_classifier(tmp_path))
    with torch.no_grad():
        explainer._engine.model.classifier.bias.fill_(np.nan)
    with pytest.raises(InputError, match="no finite numbers"):
        explainer.explain("late")


def test_a_model_that_reads_each_text_twice_is_told(tmp_path: Path) -> None:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
    explainer = Explainer(make_other(tmp_path / "t5", "t5", **sizes, decoder_start_token_id=0, eos_token_id=3))
    with pytest.raises(UnexplainableError, match="t5 classifiers cannot be explained"):
        explainer.explain("late", column="topics")


def test_it_can_be_given_up(moods: Explainer) -> None:
    left = 3

    def before_batch() -> None:
        nonlocal left
        left -= 1
        if not left:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        moods.explain("bad cat", before_batch=before_batch)
    assert left == 0
    assert moods.explain("bad cat").label == "sad"
