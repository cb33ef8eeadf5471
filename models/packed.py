"""Models that read packed rows: several documents in a row, none of which sees another.

What says so is the attention mask that a row comes with: not ones, but each token's document, numbered from 1 in the
row; 0 is padding. `accept_packed` teaches a transformers model to read it: positions begin anew with each document,
and attention is kept within, by a mask of blocks or, with flash attention on a GPU, by its variable-length kernels,
which transformers chooses by the positions alone. `wanted` marks the tokens for which something is to be predicted:
the head, whose product with the vocabulary costs as much as all layers of a small model, is spared the others.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import create_bidirectional_sliding_window_mask, packed_sequence_mask_function
from transformers.utils.import_utils import is_flash_attn_2_available

from models.settings import InputError, first_line

_FLASH = "flash_attention_2"


def positions_of(documents: Tensor) -> Tensor:
    """Positions of tokens in their documents, [rows, tokens], from the documents' numbers."""
    place = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    # Padding has no positions that could be out of bounds.
    return (place - torch.where(begins, place, 0).cummax(1).values) * (documents > 0)


def together(queries: Tensor, keys: Tensor) -> Tensor:
    """Which tokens may see which, [rows, 1, queries, keys]: those of the same document, and padding whatever it may."""
    queries, keys = queries[:, None, :, None], keys[:, None, None, :]
    return (queries == keys) | (queries == 0)


def accept_packed(model: PreTrainedModel, device: torch.device) -> None:
    """Makes a language model read packed rows; its weights, and what is saved of it, stay as they are.

    Raises:
        InputError: this kind of model cannot be made to keep documents apart.
    """
    expected = _alone(model)
    if device.type == "cuda" and is_flash_attn_2_available() and model._supports_flash_attn:
        model.set_attn_implementation(_FLASH)
    model.config.use_cache = False  # Of no use in training, and transformers looks for documents only without.
    reader = _Reader(model)
    model.register_forward_pre_hook(reader.within_documents, with_kwargs=True)
    if model.base_model is not model:
        model.base_model.register_forward_hook(reader.only_wanted)
    if model.config._attn_implementation != _FLASH:  # Which wants a GPU and half precision.
        _check_apart(model, expected)


class _Reader:
    """The hooks of a model."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._encoder = model.get_encoder() if model.config.is_encoder_decoder else None
        self._causal = getattr(model.config, "is_decoder", False) or type(model).__name__.endswith(
            ("ForCausalLM", "LMHeadModel")
        )
        # RoBERTa and its kin number positions from after their padding's index on.
        tables = (getattr(module, "position_embeddings", None) for module in model.base_model.modules())
        known = [table.padding_idx for table in tables if isinstance(table, nn.Embedding)]
        self._first = known[0] + 1 if known and known[0] is not None else 0
        self._wanted: Tensor | None = None

    def within_documents(self, model: Any, positional: tuple[Any, ...], given: dict[str, Any]) -> Any:
        """Says in the model's own arguments what the documents' numbers mean."""
        documents: Tensor = given["attention_mask"]
        self._wanted = given.pop("wanted", None)
        config = model.config
        if self._encoder is not None:
            targets: Tensor = given["decoder_attention_mask"]
            earlier = torch.ones(targets.shape[1], targets.shape[1], dtype=torch.bool, device=targets.device).tril()
            given["encoder_outputs"] = self._encoder(
                input_ids=given.pop("input_ids"), attention_mask=together(documents, documents)
            )
            given["attention_mask"] = together(targets, documents)
            given["decoder_attention_mask"] = together(targets, targets) & earlier
            return positional, given
        given |= {"position_ids": positions_of(documents) + self._first, "attention_mask": None}
        if self._causal or config._attn_implementation == _FLASH:
            return positional, given  # Documents are told by their positions.
        mask = together(documents, documents)
        given["attention_mask"] = mask
        if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
            near = create_bidirectional_sliding_window_mask(
                config,
                torch.empty(*documents.shape, 1, device=documents.device),
                None,
                and_mask_function=packed_sequence_mask_function(documents),
            )
            given["attention_mask"] = {"full_attention": mask, "sliding_attention": near}
        return positional, given

    def only_wanted(self, _base: Any, _: tuple[Any, ...], output: Any) -> Any:
        """Leaves of the last hidden states those for which something is to be predicted: [1, wanted, width]."""
        if self._wanted is not None:
            output["last_hidden_state"] = output["last_hidden_state"][self._wanted][None]
        return output


_PROBES = ((5, 6, 7), (8, 9))
"""Two documents; their tokens are above the special ones of most vocabularies."""


def _probes(model: PreTrainedModel) -> list[Tensor]:
    vocabulary = model.config.get_text_config().vocab_size
    device = next(model.parameters()).device
    return [torch.tensor([probe], device=device) % vocabulary for probe in _PROBES]


@torch.no_grad()
def _alone(model: PreTrainedModel) -> Tensor:
    """What the model says of each document in a row of its own."""
    training = model.training
    model.eval()
    decoders = model.config.is_encoder_decoder
    said = [
        model(input_ids=ids, **({"decoder_input_ids": ids} if decoders else {})).logits[0] for ids in _probes(model)
    ]
    model.train(training)
    return torch.cat(said)


@torch.no_grad()
def _check_apart(model: PreTrainedModel, expected: Tensor) -> None:
    """Compares with what it says of the documents in one row."""
    training = model.training
    model.eval()
    ids = torch.cat(_probes(model), 1)
    numbers = torch.tensor([[n + 1 for n, probe in enumerate(_PROBES) for _ in probe]], device=ids.device)
    more = {"decoder_input_ids": ids, "decoder_attention_mask": numbers} if model.config.is_encoder_decoder else {}
    try:
        same = torch.allclose(model(input_ids=ids, attention_mask=numbers, **more).logits[0], expected, atol=1e-3)
    except (RuntimeError, TypeError, ValueError, KeyError) as error:
        raise InputError(
            f"pretrain.encoder: {model.config.model_type} models cannot read packed rows ({first_line(error)}); "
            "take another architecture."
        ) from error
    if not same:
        raise InputError(
            f"pretrain.encoder: in {model.config.model_type} models, documents in one row would see each other; take "
            "another architecture."
        )
    model.train(training)
