"""What a classifier's weights do not say of themselves: its label columns, and how texts become tokens.

Apart from `models.classifier`, so that what answers without torch need not import it.
"""

from pathlib import Path
from typing import Any

from models.labels import LabelColumn, spans
from models.settings import Settings, read_settings
from models.text import TextSettings

SPEC = "classifier.json"


class ClassifierSpec(Settings):
    """What a classifier's weights do not say of themselves."""

    labels: tuple[LabelColumn, ...]
    max_length: int
    """Tokens a text is cut to, special tokens included."""
    pair: bool = False
    text: TextSettings = TextSettings()
    """How the training texts were cleaned, and so every text is before it is tokenised."""


def class_names(labels: tuple[LabelColumn, ...]) -> list[str]:
    """The names of the logits: plain classes for one column, COLUMN/CLASS for several."""
    return [
        f"{column.name}/{name}" if len(labels) > 1 else name for column, _ in spans(labels) for name in column.classes
    ]


def label_config(labels: tuple[LabelColumn, ...]) -> dict[str, Any]:
    """The part of a transformers config that names the logits and tells how they are to be read."""
    names = class_names(labels)
    exclusive = len(labels) == 1 and not labels[0].multi
    return {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: index for index, name in enumerate(names)},
        "problem_type": "single_label_classification" if exclusive else "multi_label_classification",
    }


def read_spec(folder: Path) -> ClassifierSpec:
    """The spec of the classifier in a local folder.

    Raises:
        InputError: there is none, or it is damaged.
    """
    return read_settings(ClassifierSpec, folder / SPEC, "classifier")
