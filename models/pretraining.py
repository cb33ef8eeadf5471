"""Language models to pretrain: fresh ones, or existing encoders that go on learning from other texts."""

from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from models.encoders import set_dropout, set_padding
from models.language import DroppedSpans, MaskedTokens, NextTokens, Objective, ObjectiveName
from models.packed import accept_packed
from models.settings import InputError, first_line
from models.weights import naming_damaged_file

_AUTO = {
    "mlm": (AutoModelForMaskedLM, MODEL_FOR_MASKED_LM_MAPPING_NAMES),
    "clm": (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "span": (AutoModelForSeq2SeqLM, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
}


def build_language_model(
    objective: ObjectiveName,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    *,
    seed: int,
    pretrained: str | Path | None = None,
    config: PreTrainedConfig | None = None,
    dropout: float | None = None,
) -> PreTrainedModel:
    """A language model in training mode that reads packed rows, with pretrained weights or those of a fresh `config`.

    The same arguments give the same weights. Where an encoder comes without the objective's head, a new one is made.

    Raises:
        InputError: `pretrained` is nothing that transformers can load, or learns no such objective, or cannot read
            packed rows; or `dropout` is given and it has none.
    """
    torch.manual_seed(seed)
    auto, _ = _AUTO[objective]
    if config is not None:
        check_objective(objective, config)
        set_dropout(config, dropout, "pretrain")
        model: PreTrainedModel = auto.from_config(config)
    else:
        assert pretrained is not None
        try:
            config = AutoConfig.from_pretrained(pretrained)
            check_objective(objective, config)
            set_dropout(config, dropout, "pretrain")
            with naming_damaged_file(pretrained, "pretrain.encoder: "):
                model = auto.from_pretrained(pretrained, config=config, dtype=torch.float32, use_safetensors=True)
        except (OSError, ValueError, KeyError, StrictDataclassError) as error:
            raise InputError(
                f"pretrain.encoder: {pretrained} is no encoder that can be loaded: {first_line(error)}"
            ) from error
    set_padding(model, tokenizer)
    accept_packed(model, device)
    model.train()
    return model


def check_objective(objective: ObjectiveName, config: PreTrainedConfig) -> None:
    """Raises InputError if it is not what this kind of model learns."""
    kind = config.model_type
    if kind not in _AUTO[objective][1]:
        fitting = [name for name, (_, known) in _AUTO.items() if kind in known]
        advice = f"take {' or '.join(fitting)}" if fitting else "take another architecture"
        raise InputError(f"pretrain.objective: {kind} models do not learn {objective}; {advice}.")


def build_objective(name: ObjectiveName, tokenizer: PreTrainedTokenizerBase, rate: float) -> Objective:
    """The objective by its name; `rate` is the share of tokens that are masked or dropped.

    Raises:
        InputError: the tokenizer lacks the tokens for it.
    """
    match name:
        case "mlm":
            return MaskedTokens(tokenizer, rate)
        case "clm":
            return NextTokens(tokenizer)
        case "span":
            return DroppedSpans(tokenizer, rate)
