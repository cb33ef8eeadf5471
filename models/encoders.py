"""Encoders with a classification head: from pretrained weights, or from scratch."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from models.architectures import from_config
from models.first_token import skip_unread_tokens
from models.labels import LabelColumn
from models.pruning import keep_layers
from models.settings import InputError, first_line
from models.spec import label_config
from models.weights import naming_damaged_file

_DROPOUT = re.compile(r"(dropout|dropout_prob|dropout_rate|pdrop)$")
"""How the dropout probabilities of transformers' configs end: attention_dropout, hidden_dropout_prob, attn_pdrop ..."""


def build_classifier(
    labels: Sequence[LabelColumn],
    *,
    seed: int,
    pretrained: str | Path | None = None,
    fresh: Callable[..., PreTrainedConfig] | None = None,
    dropout: float | None = None,
    head_only: bool = False,
    layers: int | Sequence[int] | None = None,
) -> PreTrainedModel:
    """A classifier in training mode, with the pretrained encoder's weights or, without one, fresh ones.

    The same arguments give the same weights, also those of the new head. `fresh` makes the config of a fresh encoder,
    with the fields that it is given. `dropout` replaces every dropout probability of the encoder; `head_only` freezes
    the encoder (and its dropout). `layers`: those of a pretrained encoder that it keeps (`models.pruning.keep_layers`).

    Raises:
        InputError: `pretrained` is no encoder that transformers can load, or the encoder knows no dropout, or has not
            these layers.
    """
    torch.manual_seed(seed)
    settings = label_config(tuple(labels))
    if fresh is not None:
        config = fresh(**settings)
        set_dropout(config, dropout)
        model: PreTrainedModel = from_config(AutoModelForSequenceClassification, config, "finetune")
    else:
        assert pretrained is not None
        try:
            config = AutoConfig.from_pretrained(pretrained, trust_remote_code=False, **settings)
            set_dropout(config, dropout)
            with naming_damaged_file(pretrained, "finetune.encoder: "):
                model = AutoModelForSequenceClassification.from_pretrained(
                    pretrained,
                    config=config,
                    dtype=torch.float32,
                    use_safetensors=True,
                    trust_remote_code=False,
                    ignore_mismatched_sizes=True,
                )
        except (OSError, ValueError, KeyError, StrictDataclassError) as error:
            raise InputError(
                f"finetune.encoder: {pretrained} is no encoder that can be loaded: {first_line(error)}"
            ) from error
    if layers is not None:
        model = keep_layers(model, layers)
    skip_unread_tokens(model)
    model.base_model.requires_grad_(not head_only)
    set_training(model)
    return model


def set_training(model: PreTrainedModel) -> None:
    """Puts a model into training mode; a frozen encoder stays as it is for inference, without dropout."""
    model.train()
    if not any(p.requires_grad for p in model.base_model.parameters()):
        model.base_model.eval()


def set_padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Gives the model and its tokenizer the same padding id, and returns it.

    It is the tokenizer's, else the model's, else that of the end of a text: a decoder such as GPT-2 has none of its
    own. Decoders find a text's last token by it and refuse batches without one.
    """
    config = model.config.get_text_config()
    known = (tokenizer.pad_token_id, config.pad_token_id, tokenizer.eos_token_id)
    # Some configs say -1 for none.
    pad = next((id for id in known if id is not None and id >= 0), 0)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    config.pad_token_id = model.config.pad_token_id = pad
    return int(pad)


def set_dropout(config: PreTrainedConfig, dropout: float | None, section: str = "finetune") -> None:
    """Replaces every dropout probability of a config, under whatever name; None leaves them.

    `section` is the recipe's, where it was asked for.

    Raises:
        InputError: the config has none.
    """
    if dropout is None:
        return
    found = False
    for part in (config, config.get_text_config()):
        for name, value in vars(part).items():
            if _DROPOUT.search(name) and not isinstance(value, bool):
                setattr(part, name, dropout)
                found = True
    if not found:
        raise InputError(f"{section}.dropout: the encoder ({config.model_type}) has no dropout to set; leave it out.")


def copy_dropout(source: PreTrainedConfig, target: PreTrainedConfig) -> None:
    """Gives a config every dropout probability of another one of its kind."""
    for ours, theirs in ((target, source), (target.get_text_config(), source.get_text_config())):
        for name, value in vars(theirs).items():
            if _DROPOUT.search(name) and not isinstance(value, bool):
                setattr(ours, name, value)
