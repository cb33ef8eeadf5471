"""A compiled engine answers as one that is not, and compiles nothing more once it has been warmed up."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor import config

from models.settings import InputError
from models.torch_engine import load_torch_engine
from serve.model import warm_up
from tests.small_classifiers import CORPUS, make_classifier

WORDS = " ".join(CORPUS).split()


def answer_and_count(folder: Path, *, unpadded: bool = True) -> int:
    """Asks a compiled engine for texts of all lengths in batches of all sizes; how often that compiled something."""
    plain = load_torch_engine(folder, precision="fp32")
    engine = load_torch_engine(folder, precision="fp32", compile=True)
    assert (engine.max_padding is None) == unpadded
    warm_up(engine, 256)
    before = counters["stats"]["unique_graphs"]
    assert before > 0, "nothing is compiled at all"
    draw = np.random.default_rng(0)

    def ask() -> None:
        for size in (1, 2, 3, 1, 9, 30, 8, 1):
            for most in (1, 6, 40):
                counts = draw.integers(0, most, size)
                encoded = engine.encode([" ".join(draw.choice(WORDS, count)) for count in counts])
                np.testing.assert_allclose(engine.logits(encoded), plain.logits(encoded), atol=1e-4)

    with ThreadPoolExecutor(1) as thread:  # As in a replica: it is warmed up in one thread and asked in another.
        thread.submit(ask).result()
    return int(counters["stats"]["unique_graphs"] - before)


@pytest.fixture
def traced_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """What of torch.compile tells whether there is code for a batch, without the making of it, which takes a minute."""
    compile = torch.nn.Module.compile

    def without_inductor(module: torch.nn.Module, **given: Any) -> None:
        compile(module, backend="eager", **given)

    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch.nn.Module, "compile", without_inductor)


@pytest.mark.parametrize("decoder", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_requests_compile_nothing(tmp_path: Path, traced_only: None, decoder: bool) -> None:
    assert answer_and_count(make_classifier(tmp_path, decoder=decoder)) == 0


@pytest.mark.slow
def test_the_same_where_texts_are_grouped_by_length(
    tmp_path: Path, traced_only: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("models.torch_engine.accept_unpadded", lambda *_: None)
    assert answer_and_count(make_classifier(tmp_path), unpadded=False) == 0


@pytest.mark.slow
@pytest.mark.parametrize("decoder", [False, True])
def test_the_same_in_earnest(tmp_path: Path, decoder: bool) -> None:
    torch._dynamo.reset()
    counters.clear()
    assert answer_and_count(make_classifier(tmp_path, decoder=decoder)) == 0


def test_without_a_compiler_it_is_told(tmp_path: Path) -> None:
    folder, sentence = make_classifier(tmp_path), r"^serve\.compile is true, but .* no C\+\+ compiler.*: install g\+\+"
    with (
        config.patch({"cpp.cxx": ("no-such-compiler",)}),  # type: ignore[no-untyped-call]
        pytest.raises(InputError, match=sentence),
    ):
        load_torch_engine(folder, compile=True)
