"""Dropout on a CPU: the share asked for, an unchanged mean, the same masks for the same seed, and plain attention."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from models import dropout
from tests.small_classifiers import CORPUS, SENTIMENT, make_classifier


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_classifier(tmp_path_factory.mktemp("classifier"), (SENTIMENT,))


def make_model(folder: Path, probability: float) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(
        folder, hidden_dropout_prob=probability, attention_probs_dropout_prob=probability
    )
    return AutoModelForSequenceClassification.from_pretrained(folder, config=config)


@given(seed=st.integers(0, 2**63 - 1), probability=st.floats(0.05, 0.95), dtype=st.sampled_from(["float32", "float64"]))
@settings(max_examples=30, deadline=None)
def test_the_share_asked_for_is_dropped_and_the_mean_stays(seed: int, probability: float, dtype: str) -> None:
    values = torch.ones(101, 199, dtype=getattr(torch, dtype))
    dropout.seed(seed)
    out = dropout.dropped(values, probability)
    kept = out != 0
    noise = 6 * (probability * (1 - probability) / values.numel()) ** 0.5
    assert abs(kept.double().mean().item() - (1 - probability)) < noise
    assert torch.allclose(out[kept], torch.tensor(1 / (1 - probability), dtype=out.dtype), rtol=1e-3)
    assert not torch.equal(kept, dropout.dropped(values, probability) != 0), "the next mask is another one"
    dropout.seed(seed)
    assert torch.equal(out, dropout.dropped(values, probability))


def test_none_and_all() -> None:
    values = torch.randn(5, 3)
    assert torch.equal(dropout.dropped(values, 0.0), values)
    assert not dropout.dropped(values, 1.0).any()


def test_the_gradient_passes_where_the_value_did() -> None:
    values = torch.randn(64, 33, requires_grad=True)
    out = dropout.dropped(values, 0.4)
    out.sum().backward()
    assert values.grad is not None
    assert torch.equal(values.grad != 0, out != 0)


def test_with_next_to_no_dropout_a_model_computes_what_it_did(folder: Path) -> None:
    inputs = AutoTokenizer.from_pretrained(folder)(CORPUS, padding=True, return_tensors="pt")
    expected = make_model(folder, 0.0).eval()(**inputs).logits
    # A probability that rounds to none, yet sends the attention along the way that has dropout in it.
    model = make_model(folder, 1e-9).train()
    dropout.use_stream(model)
    torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-5, rtol=1e-4)


def test_a_seed_gives_a_model_s_output_again_and_inference_has_no_dropout(folder: Path) -> None:
    inputs = AutoTokenizer.from_pretrained(folder)(CORPUS, padding=True, return_tensors="pt")
    expected = make_model(folder, 0.3).eval()(**inputs).logits
    model = make_model(folder, 0.3).train()
    dropout.use_stream(model)
    outputs = []
    for seed in (1, 1, 2):
        dropout.seed(seed)
        torch.manual_seed(0 if len(outputs) else 5)  # torch's own stream has no part in it
        outputs.append(model(**inputs).logits)
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[1], outputs[2])
    torch.testing.assert_close(model.eval()(**inputs).logits, expected)


def test_attention_is_dropped_too(folder: Path) -> None:
    inputs = AutoTokenizer.from_pretrained(folder)(CORPUS, padding=True, return_tensors="pt")
    config = AutoConfig.from_pretrained(folder, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.5)
    model = AutoModelForSequenceClassification.from_pretrained(folder, config=config).train()
    dropout.use_stream(model)
    assert not torch.equal(model(**inputs).logits, model.eval()(**inputs).logits)


def test_a_saved_model_does_not_remember(folder: Path, tmp_path: Path) -> None:
    model = make_model(folder, 0.1)
    dropout.use_stream(model)
    model.save_pretrained(tmp_path)
    assert "shoal" not in (tmp_path / "config.json").read_text()
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path).config._attn_implementation == "sdpa"
