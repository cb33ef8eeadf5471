"""Heads are removed by what the loss depends on; the rest computes as if they had said nothing."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from models.first_token import skip_unread_tokens
from models.heads import head_importance, least_important, remove_heads
from models.labels import LabelColumn
from models.objectives import ClassificationObjective
from models.settings import InputError

COLUMN = LabelColumn(name="topic", classes=("a", "b", "c"))
HEADS, SIZE = 4, 8


def classifier(architecture: str = "bert") -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": HEADS, "intermediate_size": 64}
    config = AutoConfig.for_model(
        architecture, num_labels=3, vocab_size=50, initializer_range=0.3, pad_token_id=0, **sizes
    )
    model: PreTrainedModel = AutoModelForSequenceClassification.from_config(config)
    skip_unread_tokens(model)
    return model.eval()


def inputs() -> dict[str, torch.Tensor]:
    mask = torch.tensor([[1] * 8, [1] * 5 + [0] * 3, [1] * 8])
    return {"input_ids": torch.arange(5, 29).view(3, 8) * mask, "attention_mask": mask}


def silenced(model: PreTrainedModel, removed: list[list[int]]) -> PreTrainedModel:
    """The same model, with the output projections of the heads zero."""
    model = copy.deepcopy(model)
    skip_unread_tokens(model)
    for layer, heads in zip(model.base_model.encoder.layer, removed, strict=True):
        for head in heads:
            layer.attention.output.dense.weight.data[:, head * SIZE : (head + 1) * SIZE] = 0
    return model


@pytest.mark.parametrize("architecture", ["bert", "camembert", "electra", "roberta", "xlm-roberta"])
def test_the_rest_computes_as_if_they_had_said_nothing(architecture: str) -> None:
    model, removed = classifier(architecture), [[0, 2], [], [1, 2, 3]]
    expected = silenced(model, removed)(**inputs()).logits
    before = sum(each.numel() for each in model.parameters())
    whole = model(**inputs()).logits
    remove_heads(model, removed)
    torch.testing.assert_close(model(**inputs()).logits, expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(expected, whole, atol=1e-3)
    assert before - sum(each.numel() for each in model.parameters()) == 5 * (4 * 32 * SIZE + 3 * SIZE)


def test_a_heads_importance_is_the_loss_that_its_mask_moves() -> None:
    """Compared with finite differences, text by text."""
    model, labels = classifier(), torch.tensor([0, 2, 1])
    loss = ClassificationObjective((COLUMN,))
    found = head_importance(model, [(inputs(), {"topic": labels})], loss)
    expected = torch.zeros(3, HEADS)
    for layer in range(3):
        weight = model.base_model.encoder.layer[layer].attention.output.dense.weight.data
        for head in range(HEADS):
            own, moved = weight[:, head * SIZE : (head + 1) * SIZE], []
            whole = own.clone()
            for mask in (0.99, 1.01):
                own.copy_(whole * mask)
                with torch.no_grad():
                    moved.append(torch.nn.functional.cross_entropy(model(**inputs()).logits, labels, reduction="none"))
            own.copy_(whole)
            expected[layer, head] = ((moved[1] - moved[0]) / 0.02).abs().sum()
    torch.testing.assert_close(found, expected / expected.norm(dim=1, keepdim=True), atol=2e-2, rtol=2e-2)
    assert all(not hooks._forward_pre_hooks for hooks in model.modules())


@given(
    importance=st.lists(st.lists(st.floats(0, 1), min_size=4, max_size=4), min_size=1, max_size=5),
    share=st.floats(0, 0.99),
)
def test_the_least_important_go_and_each_layer_keeps_its_best(importance: list[list[float]], share: float) -> None:
    values = torch.tensor(importance)
    removed = least_important(values, share)
    count = sum(map(len, removed))
    assert count == min(int(share * values.numel()), values.numel() - len(values))
    gone = {(layer, head) for layer, heads in enumerate(removed) for head in heads}
    best = {(layer, head) for layer, head in enumerate(values.argmax(1).tolist())}
    assert not gone & best
    kept = {(layer, head) for layer in range(len(values)) for head in range(4)} - gone - best
    if gone and kept:
        assert max(float(values[place]) for place in gone) <= min(float(values[place]) for place in kept)


def test_other_architectures_are_told() -> None:
    config = AutoConfig.for_model("distilbert", vocab_size=50, dim=32, n_layers=2, n_heads=4, hidden_dim=64)
    model = AutoModelForSequenceClassification.from_config(config)
    with pytest.raises(
        InputError, match=r"^heads of distilbert models cannot be removed, only those of bert, camembert"
    ):
        remove_heads(model, [[0], []])
