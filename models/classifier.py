"""A classifier: an encoder with one output vector, in which the label columns' classes stand side by side.

On disk it is an ordinary transformers folder (`config.json`, `model.safetensors`, the tokenizer's files), which
`AutoModelForSequenceClassification.from_pretrained` loads, and beside them `classifier.json`, which says which
part of the output belongs to which label column. `load` reads both.
"""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from models.first_token import skip_unread_tokens
from models.labels import LabelColumn, spans
from models.settings import InputError, Settings, first_line
from models.text import TextSettings
from models.weights import naming_damaged_file

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


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, spec: ClassifierSpec, folder: Path) -> None:
    """Writes the classifier; `load` and `AutoModelForSequenceClassification.from_pretrained` read it."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / SPEC).write_text(spec.model_dump_json(indent=2), encoding="utf-8")


def load(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, ClassifierSpec]:
    """The model (float32, in evaluation mode), its tokenizer and its spec.

    Raises:
        InputError: the folder holds no classifier, or one of its files is missing or damaged.
    """
    try:
        spec = ClassifierSpec.model_validate_json((folder / SPEC).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{folder} holds no classifier: there is no {SPEC} in it.") from error
    except ValueError as error:
        raise InputError(f"{folder / SPEC} is damaged: copy or make it again.") from error
    try:
        with naming_damaged_file(folder):
            model = AutoModelForSequenceClassification.from_pretrained(
                folder, dtype=torch.float32, use_safetensors=True
            )
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        raise InputError(f"{folder} holds no classifier that can be loaded: {first_line(error)}") from error
    skip_unread_tokens(model)
    try:
        return model.eval(), AutoTokenizer.from_pretrained(folder), spec
    except Exception as error:  # `tokenizers` raises bare ones.
        raise InputError(f"{folder} holds no tokenizer that can be loaded: {first_line(error)}") from error
