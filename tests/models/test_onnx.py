"""A classifier as ONNX answers as torch does, whatever stands beside a text, and loads only what was exported."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.engine import Engine
from models.onnx_engine import OnnxEngine, load_onnx_engine
from models.onnx_export import export_onnx
from models.settings import InputError
from models.torch_engine import load_torch_engine
from tests.small_classifiers import CORPUS, SENTIMENT, TOPICS, make_classifier

WORDS = " ".join(CORPUS).split()
TEXTS = st.lists(st.lists(st.sampled_from([*WORDS, "", "é", "🎉"]), max_size=50).map(" ".join), min_size=1, max_size=6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_classifier(tmp_path_factory.mktemp("classifier"), (SENTIMENT, TOPICS))


@pytest.fixture(scope="module")
def exports(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exports")
    export_onnx(folder, {"fp32": out / "fp32", "int8": out / "int8"})
    return out


@pytest.fixture(scope="module")
def torch_engine(folder: Path) -> Engine:
    return load_torch_engine(folder, precision="fp32", temperature={"sentiment": 2.0})


@pytest.fixture(scope="module")
def full(exports: Path) -> OnnxEngine:
    return load_onnx_engine(exports / "fp32", temperature={"sentiment": 2.0})


@pytest.fixture(scope="module")
def eighth(exports: Path) -> OnnxEngine:
    return load_onnx_engine(exports / "int8")


@given(texts=TEXTS)
def test_float32_answers_as_torch(texts: list[str], torch_engine: Engine, full: OnnxEngine) -> None:
    assert full.encode(texts) == torch_engine.encode(texts)
    encoded = full.encode(texts)
    np.testing.assert_allclose(full.logits(encoded), torch_engine.logits(encoded), atol=2e-5)
    for ours, theirs in zip(full.classify(texts), torch_engine.classify(texts), strict=True):
        assert (ours.tokens, ours.truncated) == (theirs.tokens, theirs.truncated)
        for name, prediction in theirs.labels.items():
            assert ours.labels[name].probabilities == pytest.approx(prediction.probabilities, abs=1e-5)


@given(texts=TEXTS)
def test_an_int8_answer_does_not_depend_on_the_neighbours(texts: list[str], eighth: OnnxEngine) -> None:
    encoded = eighth.encode(texts)
    for item, row in zip(encoded, eighth.logits(encoded), strict=True):
        assert np.array_equal(eighth.forward([item])[0], row)


def test_int8_is_near(torch_engine: Engine, eighth: OnnxEngine) -> None:
    """Random weights have outliers that no trained model has, so texts are judged as a whole, not one by one."""
    draw = random.Random(0)
    words = sorted({word for text in CORPUS for word in text.split()} | {"?", "qq", "LATE!"})
    encoded = eighth.encode(["", *(" ".join(draw.choices(words, k=draw.randint(1, 12))) for _ in range(200))])
    ours, theirs = eighth.logits(encoded), torch_engine.logits(encoded)
    assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] > 0.93
    assert np.square(ours - theirs).mean() < 0.1 * theirs.var()


def test_int8_weights_are_smaller(exports: Path) -> None:
    sizes = [(exports / each / "model.onnx.data").stat().st_size for each in ("int8", "fp32")]
    assert sizes[0] < 0.5 * sizes[1]


@pytest.mark.parametrize("kind", ["pair", "decoder"])
def test_pairs_and_decoders(kind: str, tmp_path: Path) -> None:
    pair = kind == "pair"
    folder = make_classifier(tmp_path / "classifier", pair=pair, decoder=kind == "decoder")
    export_onnx(folder, {"fp32": tmp_path / "onnx"})
    ours, theirs = load_onnx_engine(tmp_path / "onnx"), load_torch_engine(folder, precision="fp32")
    texts = ["the flight was late", "", "lovely " * 40]
    partners = ["they lost my bag", "good food", "late"] if pair else None
    encoded = ours.encode(texts, partners)
    assert encoded == theirs.encode(texts, partners)
    np.testing.assert_allclose(ours.logits(encoded), theirs.logits(encoded), atol=2e-5)


def test_it_needs_neither_torch_nor_transformers(exports: Path) -> None:
    script = (
        "import sys, pathlib; from models.onnx_engine import load_onnx_engine;"
        "load_onnx_engine(pathlib.Path(sys.argv[1])).classify(['the flight was late']);"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script, str(exports / "int8")], check=True, cwd=Path(__file__).parents[2])


def test_a_file_that_is_not_the_exported_one_is_refused(exports: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(exports / "int8", tmp_path / "broken")
    weights = broken / "model.onnx.data"
    content = bytearray(weights.read_bytes())
    content[100] ^= 1
    weights.write_bytes(content)
    with pytest.raises(InputError, match=r"model\.onnx\.data is damaged or changed"):
        load_onnx_engine(broken)
    weights.unlink()
    with pytest.raises(InputError, match=r"model\.onnx\.data is missing"):
        load_onnx_engine(broken)
    (broken / "onnx.json").write_text(json.dumps({"precision": "int4"}))
    with pytest.raises(InputError, match=r"onnx\.json is damaged"):
        load_onnx_engine(broken)
    with pytest.raises(InputError, match=r"holds no exported classifier"):
        load_onnx_engine(tmp_path)
