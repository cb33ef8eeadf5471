"""A classifier: an encoder with one output vector, in which the label columns' classes stand side by side.

On disk it is an ordinary transformers folder (`config.json`, `model.safetensors`, the tokenizer's files), which
`AutoModelForSequenceClassification.from_pretrained` loads, and beside them `classifier.json`, which says which
part of the output belongs to which label column. `load` reads both.
"""

from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from models.first_token import skip_unread_tokens
from models.settings import InputError, first_line
from models.spec import SPEC, ClassifierSpec, read_spec
from models.weights import naming_damaged_file


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
    spec = read_spec(folder)
    try:
        with naming_damaged_file(folder):
            model = AutoModelForSequenceClassification.from_pretrained(
                folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
            )
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        raise InputError(f"{folder} holds no classifier that can be loaded: {first_line(error)}") from error
    skip_unread_tokens(model)
    try:
        return model.eval(), AutoTokenizer.from_pretrained(folder, trust_remote_code=False), spec
    except Exception as error:  # `tokenizers` raises bare ones.
        raise InputError(f"{folder} holds no tokenizer that can be loaded: {first_line(error)}") from error
