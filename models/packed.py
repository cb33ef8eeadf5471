"""Models that read packed rows: several documents in a row, none of which sees another.

What says so is the attention mask that a row comes with: not ones, but each token's document, numbered from 1 in the
row; 0 is padding. `accept_packed` teaches a transformers model to read it: positions begin anew with each document,
and attention is kept within by a mask of blocks; on GPUs that have flash attention by its variable-length kernels, for
which all rows are laid end to end. Models with which this does not work compute documents one by one
(`models.apart`). `wanted` marks the tokens for which something is to be predicted: the head, whose
product with the vocabulary costs as much as all layers of a small model, is spared the others.
"""

import contextlib
import math
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import create_bidirectional_sliding_window_mask, packed_sequence_mask_function
from transformers.utils.import_utils import is_flash_attn_2_available

from models.apart import compute_apart, first_tokens
from models.precision import autocast
from models.settings import InputError, Precision, first_line

_POSITIONS = ("position_embeddings", "embed_positions", "wpe")
_FLASH, _FLASH_CAPABILITY = "flash_attention_2", (8, 0)


def positions_of(documents: Tensor) -> Tensor:
    """Positions of tokens in their documents, [rows, tokens], from the documents' numbers."""
    place = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    # Padding has no positions that could be out of bounds.
    return (place - torch.where(first_tokens(documents), place, 0).cummax(1).values) * (documents > 0)


def together(queries: Tensor, keys: Tensor) -> Tensor:
    """Which tokens may see which, [rows, 1, queries, keys]: those of the same document, and padding whatever it may."""
    queries, keys = queries[:, None, :, None], keys[:, None, None, :]
    return (queries == keys) | (queries == 0)


def accept_packed(
    model: PreTrainedModel, length: int, device: torch.device, precision: Precision, *, causal: bool = False
) -> None:
    """Makes a language model on a CPU read rows of `length` tokens on `device`; what is saved of it stays as it is.

    `causal`: no token may see those after it, for they are what it is to predict.

    What it then says of documents in one row is compared with what it says of each alone; where it differs, it is made
    to compute them one by one.

    Raises:
        InputError: nor does that keep documents apart, tokens see what they are to predict, the model cannot be
            computed in this precision, or it knows no positions up to `length`.
    """
    _check_positions(model, length)
    probe = _Probe(model, length)
    model.config.use_cache = False  # Of no use in training, and transformers looks for documents only without.
    reader = _Reader(model)
    model.register_forward_pre_hook(reader.within_documents, with_kwargs=True)
    if model.base_model is not model:
        model.base_model.register_forward_hook(reader.only_wanted)
    problem = probe.problem()
    if problem and model.base_model is not model and not model.config.is_encoder_decoder:
        reader.apart = True
        compute_apart(model)
        problem = probe.problem()
    if problem:
        raise InputError(f"pretrain.encoder: {model.config.model_type} models {problem}; take another architecture.")
    if causal and probe.sees_ahead():
        raise InputError(
            f"pretrain.objective: {model.config.model_type} models do not learn clm as they come, for their tokens see "
            "those after them; take another architecture."
        )
    if problem := probe.problem(precision):
        raise InputError(
            f"pretrain.precision: {model.config.model_type} models cannot be computed in {precision} ({problem}); set "
            "it to fp32."
        )
    if not reader.apart and _has_flash(model, device, precision):
        os.environ["FLASH_ATTENTION_DETERMINISTIC"] = "1"  # Else its gradients are not the same bits each time.
        model.set_attn_implementation(_FLASH)
        reader.end_to_end = True


def _has_flash(model: PreTrainedModel, device: torch.device, precision: Precision) -> bool:
    if device.type != "cuda" or precision == "fp32" or model.config.is_encoder_decoder:
        return False
    able = torch.cuda.get_device_capability(device) >= _FLASH_CAPABILITY and is_flash_attn_2_available()
    return able and bool(model._supports_flash_attn)


def position_tables(model: PreTrainedModel) -> list[nn.Embedding]:
    """Of the positions that a model has learnt."""
    found = [getattr(module, name, None) for module in model.base_model.modules() for name in _POSITIONS]
    return [table for table in found if isinstance(table, nn.Embedding)]


def first_position(table: nn.Embedding) -> int:
    """RoBERTa and its kin number positions from after their padding's index on."""
    offset = int(getattr(table, "offset", 0))  # BART's kin leave the first ones out.
    return offset if offset or table.padding_idx is None else table.padding_idx + 1


def _check_positions(model: PreTrainedModel, length: int) -> None:
    known = [table.num_embeddings - first_position(table) for table in position_tables(model)]
    if known and min(known) < length:
        raise InputError(
            f"pack.length is {length}, but the encoder (pretrain.encoder) has only {min(known)} positions: lower it, "
            "or take an encoder with more."
        )


class _Reader:
    """The hooks of a model."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._encoder = model.get_encoder() if model.config.is_encoder_decoder else None
        self._causal = getattr(model.config, "is_decoder", False) or type(model).__name__.endswith(
            ("ForCausalLM", "LMHeadModel")
        )
        self._first = max((first_position(table) for table in position_tables(model)), default=0)
        self.end_to_end = False
        """Whether all rows are laid into one, whose documents the attention tells by their positions alone."""
        self.apart = False
        """Whether documents are computed one by one (`models.apart`)."""
        self._wanted: Tensor | None = None

    def within_documents(self, model: Any, positional: tuple[Any, ...], given: dict[str, Any]) -> Any:
        """Says in the model's own arguments what the documents' numbers mean."""
        documents: Tensor = given["attention_mask"]
        self._wanted = given.pop("wanted", None)
        if self.apart:
            return positional, given
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
        if self.end_to_end:
            given |= {name: given[name].flatten()[None] for name in ("input_ids", "position_ids")}
            self._wanted = self._wanted if self._wanted is None else self._wanted.flatten()[None]
        if self.end_to_end or self._causal:
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


class _Probe:
    """Two documents that fill a row: what a model says of each alone, to be compared with what it says of the row."""

    _LONGEST, _SPECIAL = 384, 5
    """It need not be longer than attention windows are, and has none of the first ids, which tend to be special."""

    def __init__(self, model: PreTrainedModel, length: int) -> None:
        self._model = model
        config = model.config.get_text_config()
        self._decoders = model.config.is_encoder_decoder
        # So long that one of them is padded where they are computed one by one.
        longer = 2 ** max(int(math.log2(min(length, self._LONGEST) / 1.75)), 0)
        plain = max(config.vocab_size - self._SPECIAL, 1)
        places = torch.arange(longer + max(longer * 3 // 4, 1))
        ids = places * 7 % plain + min(self._SPECIAL, config.vocab_size - 1)
        self._documents = ids[:longer], ids[longer:]
        try:
            with _asking(model):
                self._alone = torch.cat([self._said(document[None]) for document in self._documents])
        except Exception as error:
            raise InputError(
                f"pretrain.encoder: {model.config.model_type} models cannot read plain texts ({first_line(error)}); "
                "take another architecture."
            ) from error

    def sees_ahead(self) -> bool:
        """Whether what it says of a document's first tokens changes with the last one."""
        ids = self._documents[0].clone()
        with _asking(self._model):
            before = self._said(ids[None], torch.ones_like(ids)[None])
            ids[-1] = self._documents[1][-1]
            after = self._said(ids[None], torch.ones_like(ids)[None])
        return not torch.equal(before[:-1], after[:-1])

    def problem(self, precision: Precision = "fp32") -> str | None:
        """What is wrong with what it says of the row; None where that is the same, or in less than fp32 something."""
        ids = torch.cat(self._documents)[None]
        numbers = torch.cat([torch.full_like(each, place + 1) for place, each in enumerate(self._documents)])[None]
        try:
            with _asking(self._model), autocast(ids.device, precision):
                differs = (self._said(ids, numbers) - self._alone).abs().max()
        except Exception as error:  # Whatever goes wrong is the architecture's fault.
            return f"cannot read packed rows ({first_line(error)})"
        if precision != "fp32":
            return None if differs.isfinite() else "what comes of it is not finite"
        return None if differs <= 1e-3 * self._alone.std() + 2e-6 else "would let documents see each other, or padding"

    def _said(self, ids: Tensor, numbers: Tensor | None = None) -> Tensor:
        given: dict[str, Any] = {"input_ids": ids} | ({} if numbers is None else {"attention_mask": numbers})
        if self._decoders:
            given |= {f"decoder_{name}": value for name, value in given.items()}
        logits: Tensor = self._model(**given).logits[0]
        return logits.float()


@contextlib.contextmanager
def _asking(model: PreTrainedModel) -> Iterator[None]:
    """A block that asks a model, without dropout or gradients."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
