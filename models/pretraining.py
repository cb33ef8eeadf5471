"""Language models to pretrain: fresh ones, or existing encoders that go on learning from other texts."""

from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
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

from models.architectures import from_config
from models.encoders import set_dropout, set_padding
from models.language import DroppedSpans, MaskedTokens, NextTokens, Objective, ObjectiveName
from models.packed import accept_packed
from models.settings import InputError, Precision, first_line
from models.weights import naming_damaged_file

_AUTO = {
    "mlm": (AutoModelForMaskedLM, MODEL_FOR_MASKED_LM_MAPPING_NAMES),
    "clm": (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "span": (AutoModelForSeq2SeqLM, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
}


def build_language_model(
    objective: ObjectiveName,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    device: torch.device,
    precision: Precision,
    *,
    seed: int,
    pretrained: str | Path | None = None,
    config: PreTrainedConfig | None = None,
    dropout: float | None = None,
) -> PreTrainedModel:
    """A language model in training mode that reads packed rows of `length` tokens, for `device` but not yet on it.

    It has pretrained weights or, with a `config`, fresh ones.

    The same arguments give the same weights. Where an encoder comes without the objective's head, a new one is made.

    Raises:
        InputError: `pretrained` is nothing that transformers can load, or learns no such objective, or cannot read
            packed rows; or `dropout` is given and it has none.
    """
    torch.manual_seed(seed)
    auto, _ = _AUTO[objective]
    model: PreTrainedModel
    if config is not None:
        check_objective(objective, config.model_type)
        set_dropout(config, dropout, "pretrain")
        model = fresh_model(objective, config)
    else:
        assert pretrained is not None
        try:
            config = AutoConfig.from_pretrained(pretrained, trust_remote_code=False)
            check_objective(objective, config.model_type)
            set_dropout(config, dropout, "pretrain")
            with naming_damaged_file(pretrained, "pretrain.encoder: "):
                model = auto.from_pretrained(
                    pretrained, config=config, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
                )
        except (OSError, ValueError, KeyError, StrictDataclassError) as error:
            raise InputError(
                f"pretrain.encoder: {pretrained} is no encoder that can be loaded: {first_line(error)}"
            ) from error
    set_padding(model, tokenizer)
    accept_packed(model, length, device, precision, causal=objective == "clm")
    model.train()
    return model


def fresh_model(objective: ObjectiveName, config: PreTrainedConfig) -> PreTrainedModel:
    """A model with fresh weights.

    Raises:
        InputError: the config's numbers do not go together.
    """
    model: PreTrainedModel = from_config(_AUTO[objective][0], config, "pretrain")
    return model


def objective_problem(objective: ObjectiveName, kind: str) -> str | None:
    """What to say where it is not what this kind of model learns."""
    fitting = [name for name, (_, known) in _AUTO.items() if kind in known]
    if "mlm" in fitting and "clm" in fitting:  # Encoders that can be told to be decoders, which no config here does.
        fitting.remove("clm")
    if objective in fitting:
        return None
    advice = f"take {' or '.join(fitting)}" if fitting else "take another architecture"
    return f"{kind} models do not learn {objective}; {advice}"


def check_objective(objective: ObjectiveName, kind: str) -> None:
    """Raises InputError if it is not what this kind of model learns."""
    if problem := objective_problem(objective, kind):
        raise InputError(f"pretrain.objective: {problem}.")


def keep_the_rest(model: PreTrainedModel, source: str | Path) -> dict[str, Tensor]:
    """The model's weights to save, and those of the encoder that it was made from which it has no place for.

    A language model has no pooler, say, but a classifier made of it later may want the one that there was.
    """
    state: dict[str, Tensor] = dict(model.state_dict())
    if model.base_model is not model:
        before = AutoModel.from_pretrained(
            source, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
        ).state_dict()
        prefix = model.base_model_prefix
        state |= {f"{prefix}.{name}": value for name, value in before.items() if f"{prefix}.{name}" not in state}
    return state


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
