"""Encoders and language models from scratch: transformers' architectures, in sizes that have a name.

| size   | width | layers | heads | parameters beside the embeddings |
|--------|-------|--------|-------|----------------------------------|
| tiny   | 128   | 2      | 2     | 0.4 M                            |
| mini   | 256   | 4      | 4     | 3.2 M                            |
| small  | 512   | 4      | 8     | 12.6 M                           |
| medium | 512   | 8      | 8     | 25.2 M                           |
| base   | 768   | 12     | 12    | 85.1 M                           |

(The sizes of Turc et al. 2019, "Well-Read Students Learn Better", arXiv 1908.08962; parameters of a BERT.)
"""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase

from models.settings import InputError, Settings, first_line

SizeName = Literal["tiny", "mini", "small", "medium", "base"]
SIZES: dict[SizeName, tuple[int, int, int]] = {
    "tiny": (128, 2, 2),
    "mini": (256, 4, 4),
    "small": (512, 4, 8),
    "medium": (512, 8, 8),
    "base": (768, 12, 12),
}
"""Width, layers, heads."""

_GATED = {"modernbert"}
"""Architectures whose inner layers are gated, so that 1.5 times the width takes what 4 times does elsewhere, nearly."""


class ScratchEncoder(Settings):
    """An encoder with fresh weights, of a named size, any number of which can be given by hand."""

    architecture: str = Field("bert", description="A transformers architecture: bert, modernbert, gpt2, t5 ...")
    size: SizeName = Field("mini", description="Sets width, layers and heads, where these are not given.")
    hidden_size: int | None = Field(None, ge=1, description="Width.")
    layers: int | None = Field(None, ge=1, description="Depth.")
    heads: int | None = Field(None, ge=1, description="Attention heads.")
    dropout: float | None = Field(
        None, ge=0, lt=1, description="Dropout probability; by default, the architecture's own."
    )
    config: dict[str, Any] = Field({}, description="Further fields of the architecture's transformers config.")

    @field_validator("architecture")
    @classmethod
    def _known(cls, architecture: str) -> str:
        if architecture not in CONFIG_MAPPING:
            raise ValueError(
                f"{architecture!r} is no architecture of transformers; there are bert, modernbert, gpt2 ..."
            )
        return architecture

    @field_validator("heads")
    @classmethod
    def _divide_width(cls, heads: int | None, info: ValidationInfo) -> int | None:
        if (size := info.data.get("size")) and "hidden_size" in info.data:
            width, own = info.data["hidden_size"] or SIZES[size][0], heads or SIZES[size][2]
            if width % own:
                raise ValueError(f"must divide hidden_size, which is {width}, and {own} does not")
        return heads

    @property
    def shape(self) -> tuple[int, int, int]:
        """Width, layers, heads."""
        width, layers, heads = SIZES[self.size]
        return self.hidden_size or width, self.layers or layers, self.heads or heads


def from_config(auto: Any, config: PreTrainedConfig, section: str) -> Any:
    """A model of a transformers Auto class with fresh weights, as the `section` of a recipe asks for it.

    Raises:
        InputError: the config's numbers do not go together.
    """
    try:
        return auto.from_config(config)
    except Exception as error:  # Architectures check their numbers in any way they like.
        raise InputError(
            f"{section}.encoder: {config.model_type} cannot be made so: {first_line(error)}; change its numbers."
        ) from error


SHIFTED = {
    "camembert",
    "data2vec-text",
    "esm",
    "longformer",
    "mpnet",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
}
"""Architectures that number positions from after their padding's index on, so that they need more of them."""
_PADDING = 1
"""That index where it is not the tokenizer's."""


def scratch_config(
    encoder: ScratchEncoder,
    tokenizer: PreTrainedTokenizerBase,
    positions: int,
    section: str = "finetune",
    **more: Any,
) -> PreTrainedConfig:
    """The config of an encoder for texts of up to `positions` tokens; `more` are fields of its task.

    `section` is the recipe's that asks for it.

    Raises:
        InputError: the architecture has no such fields, or not these values.
    """
    width, layers, heads = encoder.shape
    common = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    own: dict[str, Any] = {"max_position_embeddings": positions}
    match encoder.architecture:
        case "t5" | "mt5" | "umt5":
            # It has no positions, only distances; the decoder begins with padding.
            own = {"d_kv": width // heads, "d_ff": 4 * width, "num_decoder_layers": layers}
            own["decoder_start_token_id"] = tokenizer.pad_token_id
        case "gpt2":
            own["n_inner"] = 4 * width
        case "distilbert":
            own["hidden_dim"] = 4 * width
        case kind if kind in SHIFTED:
            own = {
                "max_position_embeddings": positions + max(tokenizer.pad_token_id or 0, _PADDING) + 1,
                "intermediate_size": 4 * width,
            }
        case architecture:
            inner = 3 * width // 2 if architecture in _GATED else 4 * width
            own["intermediate_size"] = inner
    default = vars(AutoConfig.for_model(encoder.architecture))
    if default.get("num_key_value_heads") is not None:
        own["num_key_value_heads"] = heads
    if "head_dim" in default:
        own["head_dim"] = width // heads
    try:
        config = AutoConfig.for_model(
            encoder.architecture, **{**common, **own, **_special_tokens(tokenizer), **encoder.config, **more}
        )
    except Exception as error:  # Configs check their fields in any way they like.
        raise InputError(
            f"{section}.encoder.config: {encoder.architecture} cannot be made so: {first_line(error)}"
        ) from error
    for name, wanted in {**common, **encoder.config}.items():
        if getattr(config, name, None) != wanted:
            raise InputError(
                f"{section}.encoder: {encoder.architecture} does not take {name}={wanted}; name the number as its "
                "transformers config does, under encoder.config."
            )
    unknown = sorted(set(encoder.config) - set(default))
    if unknown:
        raise InputError(f"{section}.encoder.config: {encoder.architecture} has no setting {unknown[0]!r}.")
    return config


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The vocabulary's size and the special tokens that configs name; BERT's [CLS] and [SEP] begin and end a text."""
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.cls_token_id
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    names: Mapping[str, int | None] = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": begin,
        "eos_token_id": end,
        "cls_token_id": tokenizer.cls_token_id,
        "sep_token_id": tokenizer.sep_token_id,
    }
    return {"vocab_size": len(tokenizer), **{name: value for name, value in names.items() if value is not None}}
