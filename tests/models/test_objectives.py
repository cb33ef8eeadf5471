"""What is minimised: sums over texts and columns, in which a missing label has no part."""

import pytest
import torch
from torch.nn import functional as F

from models.labels import LabelColumn
from models.objectives import ClassificationObjective, balanced_weights

TOPIC = LabelColumn(name="topic", classes=("a", "b", "c"))
TAGS = LabelColumn(name="tags", classes=("x", "y"), multi=True)
LOGITS = torch.tensor([[1.0, -2.0, 0.5, 3.0, -1.0], [0.0, 1.0, 2.0, -0.5, 0.25]])


def test_columns_and_texts_add_up() -> None:
    labels = {"topic": torch.tensor([0, 2]), "tags": torch.tensor([[1, 0], [1, 1]])}
    expected = F.cross_entropy(LOGITS[:, :3], labels["topic"], reduction="sum")
    expected = expected + F.binary_cross_entropy_with_logits(LOGITS[:, 3:], labels["tags"].float(), reduction="sum")
    torch.testing.assert_close(ClassificationObjective((TOPIC, TAGS))(LOGITS, labels), expected)


def test_a_missing_label_adds_nothing() -> None:
    objective = ClassificationObjective((TOPIC, TAGS), label_smoothing=0.1)
    only_first = {"topic": torch.tensor([0, -1]), "tags": torch.tensor([[1, 0], [-1, -1]])}
    alone = {"topic": torch.tensor([0]), "tags": torch.tensor([[1, 0]])}
    torch.testing.assert_close(objective(LOGITS, only_first), objective(LOGITS[:1], alone))
    nothing = {"topic": torch.tensor([-1, -1]), "tags": torch.full((2, 2), -1)}
    assert objective(LOGITS, nothing) == 0


def test_balanced_weights_have_a_mean_of_one_over_the_texts() -> None:
    counts = [90, 9, 1, 0]
    weights = balanced_weights(counts)
    assert sum(count * weight for count, weight in zip(counts, weights, strict=True)) == pytest.approx(100)
    assert weights[0] < weights[1] < weights[2]
    assert weights[3] == 0.0
