"""What a student learns from a teacher, beside its labels or without."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from models.distillation import TEACHER, DistillationObjective, teacher_order
from models.labels import LabelColumn, spans
from models.objectives import ClassificationObjective
from models.settings import InputError

TOPIC = LabelColumn(name="topic", classes=("a", "b", "c"))
TAGS = LabelColumn(name="tags", classes=("x", "y"), multi=True)
COLUMNS = (TOPIC, TAGS)
OWN = torch.tensor([[1.0, -2.0, 0.5, 3.0, -1.0], [0.0, 1.0, 2.0, -0.5, 0.25]])
TEACHERS = torch.tensor([[2.0, 0.0, -1.0, 1.0, 1.0], [-1.0, 0.5, 3.0, 2.0, -2.0]])
LABELS = {"topic": torch.tensor([0, 2]), "tags": torch.tensor([[1, 0], [1, 1]])}
UNLABELLED = {"topic": torch.tensor([-1, -1]), "tags": torch.full((2, 2), -1)}


def objective(weight: float, temperature: float = 2.0) -> DistillationObjective:
    return DistillationObjective(ClassificationObjective(COLUMNS), COLUMNS, weight, temperature)


def test_without_weight_it_is_the_labels_loss() -> None:
    torch.testing.assert_close(
        objective(0.0)(OWN, {**LABELS, TEACHER: TEACHERS}), ClassificationObjective(COLUMNS)(OWN, LABELS)
    )


def test_it_is_the_divergence_at_the_temperature_and_the_loss_of_the_labels() -> None:
    wanted = torch.zeros(())
    for one, other in zip(TEACHERS[:, :3], OWN[:, :3], strict=True):
        p, q = torch.softmax(one / 3, 0), torch.softmax(other / 3, 0)
        wanted = wanted + 9 * (p * (p / q).log()).sum()
    wanted = wanted + F.binary_cross_entropy(OWN[:, 3:].sigmoid(), TEACHERS[:, 3:].sigmoid(), reduction="sum")
    expected = 0.7 * wanted + 0.3 * ClassificationObjective(COLUMNS)(OWN, LABELS)
    torch.testing.assert_close(objective(0.7, 3.0)(OWN, {**LABELS, TEACHER: TEACHERS}), expected)


@given(weight=st.floats(0.05, 1), temperature=st.floats(0.5, 20))
@settings(max_examples=25)
def test_a_text_without_labels_learns_from_the_teacher_alone(weight: float, temperature: float) -> None:
    """Descent of the loss brings each column's probabilities to the teacher's."""
    logits = OWN.double().requires_grad_()
    loss = objective(weight, temperature)(logits, {**UNLABELLED, TEACHER: TEACHERS})
    loss.backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert (logits.grad.abs().sum(1) > 1e-3).all()
    same = TEACHERS.double().requires_grad_()
    objective(weight, temperature)(same, {**UNLABELLED, TEACHER: TEACHERS}).backward()  # type: ignore[no-untyped-call]
    assert same.grad is not None
    assert same.grad.abs().max() < 1e-5, "at the teacher's own logits there is nothing left to learn"


def test_gradients_are_about_as_large_at_any_temperature() -> None:
    sizes = []
    for temperature in (4.0, 40.0):
        logits = OWN.clone().requires_grad_()
        objective(1.0, temperature)(logits, {**UNLABELLED, TEACHER: TEACHERS}).backward()  # type: ignore[no-untyped-call]
        assert logits.grad is not None
        sizes.append(float(logits.grad[:, :3].norm()))
    assert sizes[1] == pytest.approx(sizes[0], rel=0.3)


@given(order=st.permutations(range(2)), topics=st.permutations("abc"), tags=st.permutations("xy"))
@settings(max_examples=25)
def test_columns_and_classes_are_found_by_name(order: list[int], topics: list[str], tags: list[str]) -> None:
    theirs = [
        LabelColumn(name="topic", classes=tuple(topics)),
        LabelColumn(name="tags", classes=tuple(tags), multi=True),
    ]
    teachers = [theirs[place] for place in order]
    names = [(column.name, name) for column, _ in spans(teachers) for name in column.classes]
    wanted = [(column.name, name) for column, _ in spans(COLUMNS) for name in column.classes]
    assert [names[place] for place in teacher_order(COLUMNS, teachers)] == wanted


@pytest.mark.parametrize(
    ("teachers", "told"),
    [
        ((TOPIC,), "it predicts 'topic', not 'topic' and 'tags'."),
        ((TOPIC, TAGS.model_copy(update={"multi": False})), "it gives one class for each text in the column tags"),
        ((TOPIC, TAGS.model_copy(update={"classes": ("x", "z")})), "a class that the teacher does not know, 'y'."),
        ((TOPIC, TAGS.model_copy(update={"classes": ("w", "x", "y")})), "a class that the data does not have, 'w'."),
    ],
)
def test_a_teacher_of_something_else_is_told(teachers: tuple[LabelColumn, ...], told: str) -> None:
    with pytest.raises(InputError) as error:
        teacher_order(COLUMNS, teachers)
    assert told in str(error.value)
