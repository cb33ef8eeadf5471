"""Encoders with a classification head: from pretrained weights, or from scratch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from models.classifier import label_config
from models.labels import LabelColumn
from models.settings import InputError


def build_classifier(
    labels: Sequence[LabelColumn],
    *,
    seed: int,
    pretrained: str | Path | None = None,
    architecture: str = "bert",
    shape: dict[str, Any] | None = None,
    dropout: float | None = None,
    head_only: bool = False,
) -> PreTrainedModel:
    """A classifier in training mode, with the pretrained encoder's weights or, without one, fresh ones.

    The same arguments give the same weights, also those of the new head. `dropout` replaces every dropout
    probability of the encoder; `head_only` freezes the encoder (and its dropout).

    Raises:
        InputError: `pretrained` is no encoder that transformers can load.
    """
    torch.manual_seed(seed)
    settings = label_config(tuple(labels))
    if pretrained is None:
        shape = dict(shape or {})
        shape.setdefault("intermediate_size", 4 * shape.get("hidden_size", 256))
        config = AutoConfig.for_model(architecture, **shape, **settings)
        _set_dropout(config, dropout)
        model: PreTrainedModel = AutoModelForSequenceClassification.from_config(config)
    else:
        try:
            config = AutoConfig.from_pretrained(pretrained, **settings)
            _set_dropout(config, dropout)
            model = AutoModelForSequenceClassification.from_pretrained(
                pretrained, config=config, dtype=torch.float32, use_safetensors=True, ignore_mismatched_sizes=True
            )
        except (OSError, ValueError, KeyError) as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise InputError(f"finetune.encoder: {pretrained} is no encoder that can be loaded: {reason}") from error
    model.base_model.requires_grad_(not head_only)
    set_training(model)
    return model


def set_training(model: PreTrainedModel) -> None:
    """Puts a model into training mode; a frozen encoder stays as it is for inference, without dropout."""
    model.train()
    if not any(p.requires_grad for p in model.base_model.parameters()):
        model.base_model.eval()


def _set_dropout(config: Any, dropout: float | None) -> None:
    if dropout is None:
        return
    for name in vars(config):
        if "dropout" in name and isinstance(getattr(config, name), float):
            setattr(config, name, dropout)
