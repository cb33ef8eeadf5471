"""Texts laid end to end are answered as each alone, by every architecture that takes it; others are told apart."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from models.first_token import skip_unread_tokens
from models.unpadded import Unpadded, accept_unpadded

SIZE = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "num_labels": 3,
}
KINDS: dict[str, dict[str, Any]] = {
    "bert": {},
    "electra": {},
    "roberta": {"pad_token_id": 1},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64},
    "albert": {},
    # Layers that see 4 tokens each way, and layers that see all; the mean of all tokens is read.
    "modernbert": {"local_attention": 8, "num_hidden_layers": 4, "classifier_pooling": "mean"},
    "gpt2": {},
    # Two heads of keys and values for four of queries.
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 6},
}
APART: dict[str, dict[str, Any]] = {
    "deberta-v2": {"relative_attention": True, "position_buckets": 8, "pos_att_type": "p2c|c2p"},
    "roformer": {},
    "mpnet": {"pad_token_id": 1},
    "bloom": {"n_layer": 2, "n_head": 2},
    "convbert": {},
    "bart": {},
}
LONGEST = 32
TEXTS = st.lists(st.lists(st.integers(0, 59), min_size=1, max_size=LONGEST), min_size=1, max_size=9)


def build(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SIZE, **KINDS.get(kind, {}), **APART.get(kind, {})})
    model: PreTrainedModel = AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():  # Fresh weights are small: what one text sees of another would hardly show.
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    skip_unread_tokens(model)
    return model


def alone(model: PreTrainedModel, texts: list[list[int]]) -> Tensor:
    with torch.inference_mode():
        return torch.cat([model(input_ids=torch.tensor([text])).logits for text in texts])


@pytest.fixture(scope="module")
def models() -> dict[str, tuple[PreTrainedModel, PreTrainedModel, Unpadded]]:
    """Of each kind a model that is left alone, and one that takes texts end to end."""
    found = {}
    for kind in KINDS:
        unpadded = accept_unpadded(model := build(kind), LONGEST)
        assert unpadded is not None, kind
        found[kind] = build(kind), model, unpadded
    return found


@given(texts=TEXTS)
@settings(max_examples=15, deadline=None)
@pytest.mark.parametrize("kind", KINDS)
def test_each_text_is_answered_as_if_it_were_alone(
    models: dict[str, tuple[PreTrainedModel, PreTrainedModel, Unpadded]], kind: str, texts: list[list[int]]
) -> None:
    plain, _, unpadded = models[kind]
    with torch.inference_mode():
        together = unpadded(texts)
    difference = together.softmax(-1) - alone(plain, texts).softmax(-1)
    assert float(difference.abs().max()) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_the_layers_see_each_token_once_and_nothing_else(
    models: dict[str, tuple[PreTrainedModel, PreTrainedModel, Unpadded]], kind: str
) -> None:
    _, model, unpadded = models[kind]
    rows: list[int] = []
    hooks = [
        module.register_forward_hook(lambda _module, given, _output: rows.append(given[0].shape[:-1].numel()))
        for module in model.base_model.modules()
        if type(module).__name__ in ("Linear", "Conv1D")
    ]
    with torch.inference_mode():
        unpadded([[7] * 30, [8, 9, 10], [11]])
    for hook in hooks:
        hook.remove()
    # The last layer of some is computed for first tokens alone, and so is what comes after it.
    assert set(rows) <= {34, 3}
    assert rows.count(34) > rows.count(3)


@pytest.mark.parametrize("kind", APART)
def test_models_that_cannot_stay_as_they_were(kind: str) -> None:
    model, texts = build(kind), [[9, 5, 2], [7] * 7 + [2]]
    before = alone(model, texts)
    implementation = model.config._attn_implementation
    assert accept_unpadded(model, LONGEST) is None
    assert model.config._attn_implementation == implementation
    assert torch.equal(alone(model, texts), before)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "modernbert"])
def test_the_model_itself_does_what_it_did(
    models: dict[str, tuple[PreTrainedModel, PreTrainedModel, Unpadded]], kind: str
) -> None:
    plain, model, _ = models[kind]
    ids = torch.tensor([[7, 8, 9, 10], [11, 12, 0, 0]])
    given = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    torch.testing.assert_close(model(**given).logits, plain(**given).logits, rtol=1e-5, atol=1e-6)
