"""A classifier's texts laid end to end: one row of exactly their tokens, whatever their lengths.

What works token by token (embeddings, products with weights, norms) never sees that there are several texts;
positions begin anew with each of them. Only the attention must know where a text begins and ends (`models.attention`).
So nothing of the encoder's work is padding, and texts need not be of like lengths to share a batch. After the encoder
each text has a row of its own again, for the head to find the tokens that it reads.

A model of the make that reads the first token alone (`models.first_token`) has no padding even there.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from models.attention import UNPADDED, Layout
from models.packed import first_position, position_tables
from models.precision import autocast
from models.settings import Precision

_PLAIN = "sdpa"
_FLASH_CAPABILITY, _FLASH_WIDTH, _FLASH_MULTIPLE = (8, 0), 256, 8
"""What flash attention needs of a GPU, and of a head's width."""

_PROBE_TOKENS, _SPECIAL = 192, 5
"""Longer than usual attention windows reach, and none of the first ids, which tend to be special."""

logger = logging.getLogger(__name__)


class Unpadded:
    """Computes a classifier's texts end to end; the model itself, called as ever, does what it did."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._base = model.base_model
        self._encode = self._base.forward
        tables = position_tables(model)
        self._first = max(map(first_position, tables), default=0)
        # RoBERTa and its kin do not count the padding token, should a text hold it.
        self._uncounted = next((table.padding_idx for table in tables if table.padding_idx is not None), None)
        self._pad = int(model.config.get_text_config().pad_token_id or 0)
        self._now: tuple[dict[str, Any], list[int]] | None = None
        self._use_cache = getattr(model.config, "use_cache", None)
        model.config.use_cache = False  # Nothing comes after a text.
        model.set_attn_implementation(UNPADDED)
        self._base.forward = self._forward
        encoder = getattr(self._base, "encoder", None)
        # What some base models have besides an encoder looks for first tokens, too.
        last = encoder if isinstance(encoder, nn.Module) else self._base
        self._hook = last.register_forward_hook(self._in_rows)

    def undo(self) -> None:
        """Leaves the model as it was."""
        self._hook.remove()
        self._base.forward = self._encode
        self.model.config.use_cache = self._use_cache
        self.model.set_attn_implementation(_PLAIN)

    def __call__(self, ids: Sequence[Sequence[int]], type_ids: Sequence[Sequence[int]] | None = None) -> Tensor:
        """The logits of texts, [texts, total_classes], in the order given."""
        device = self.model.device
        if len(ids) == 1:  # A text that is alone needs nothing of this.
            kinds = {} if type_ids is None else {"token_type_ids": torch.tensor(type_ids).to(device)}
            alone: Tensor = self.model(input_ids=torch.tensor(ids).to(device), **kinds).logits
            return alone
        # Texts of one length stand together.
        order = sorted(range(len(ids)), key=lambda text: len(ids[text]))
        lengths = [len(ids[text]) for text in order]
        counts = torch.tensor(lengths)
        bounds = pad(counts.cumsum(0), (1, 0)).to(torch.int32)
        tokens = torch.tensor([token for text in order for token in ids[text]])
        given = {"input_ids": tokens[None], "position_ids": self._positions(tokens, bounds, counts)[None]}
        if type_ids is not None:
            given["token_type_ids"] = torch.tensor([[kind for text in order for kind in type_ids[text]]])
        moved: dict[str, Any] = {name: rows.to(device, non_blocking=True) for name, rows in given.items()}
        layout = Layout(bounds.to(device, non_blocking=True), bounds)
        # Masks that have four dimensions are left as they are; the attention here looks at none.
        no_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
        self._now = {**moved, "attention_mask": no_mask, "layout": layout}, lengths
        try:
            padded = self._rows(moved["input_ids"][0], lengths, self._pad)
            present = torch.arange(padded.shape[1]) < counts[:, None]
            logits: Tensor = self.model(input_ids=padded, attention_mask=present.long().to(device)).logits
        finally:
            self._now = None
        found = torch.empty_like(logits)
        found[order] = logits
        return found

    def _positions(self, tokens: Tensor, bounds: Tensor, lengths: Tensor) -> Tensor:
        """Of each token in its text, as the model numbers them."""
        counted = torch.ones_like(tokens) if self._uncounted is None else (tokens != self._uncounted).long()
        until = counted.cumsum(0)
        before = (until - counted)[bounds[:-1]].repeat_interleave(lengths)
        return (until - before) * counted + self._first - 1

    def _forward(self, *positional: Any, **named: Any) -> Any:
        if self._now is None:
            return self._encode(*positional, **named)
        given, _ = self._now
        return self._encode(**given, return_dict=True)

    def _in_rows(self, _module: nn.Module, _given: Any, output: Any) -> None:
        """Gives each text a row of its own, unless it has one: then it holds what the head reads, and no more."""
        if self._now is not None and len(output["last_hidden_state"]) != len(self._now[1]):
            output["last_hidden_state"] = self._rows(output["last_hidden_state"][0], self._now[1], 0)

    @staticmethod
    def _rows(values: Tensor, lengths: list[int], fill: int) -> Tensor:
        return pad_sequence(list(values.split(lengths)), batch_first=True, padding_value=fill)


def accept_unpadded(model: PreTrainedModel, max_length: int) -> Unpadded | None:
    """Makes a classifier on a CPU, in float32, compute texts of up to `max_length` tokens end to end.

    None where what it then says of a text is not what it says of the text alone: the model stays as it was.
    """
    if model.config._attn_implementation != _PLAIN or model.config.is_encoder_decoder:
        return None
    texts = _probe_texts(model, max_length)
    # So many that they have more tokens than the model knows positions.
    positions = max((table.num_embeddings for table in position_tables(model)), default=0)
    times = 1 + positions // sum(map(len, texts))
    unpadded = None
    try:
        with torch.inference_mode():
            alone = torch.cat([model(input_ids=torch.tensor([text])).logits for text in texts])
            unpadded = Unpadded(model)
            differs = (unpadded(texts * times) - alone.repeat(times, 1)).abs().max()
            if differs <= 1e-3 * alone.std() + 2e-6:
                return unpadded
    except Exception:  # Whatever goes wrong is the architecture's fault.
        logger.debug("%s models are not computed end to end", model.config.model_type, exc_info=True)
    if unpadded is not None:
        unpadded.undo()
    return None


def agrees(unpadded: Unpadded, max_length: int, precision: Precision) -> bool:
    """Whether texts are answered end to end nearly as padded, where the model is now and in this precision."""
    model = unpadded.model
    texts = _probe_texts(model, min(max_length, _PROBE_TOKENS // 4))
    ids = pad_sequence([torch.tensor(text) for text in texts], batch_first=True)
    present = torch.arange(ids.shape[1]) < torch.tensor([[len(text)] for text in texts])
    try:
        with torch.inference_mode(), autocast(model.device, precision):
            padded = model(input_ids=ids.to(model.device), attention_mask=present.long().to(model.device)).logits
            differs = (unpadded(texts) - padded).abs().max()
            return bool(differs <= 0.1 * padded.float().std() + 0.02)
    except RuntimeError:
        logger.warning("texts are padded: attention for variable lengths does not work here", exc_info=True)
        return False


def has_kernel(model: PreTrainedModel, device: torch.device, precision: Precision) -> bool:
    """Whether there is a fast attention for variable lengths on the device: flash attention on a GPU."""
    if device.type == "cpu":
        return True
    config = model.config.get_text_config()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return (
        device.type == "cuda"
        and precision != "fp32"
        and torch.cuda.get_device_capability(device) >= _FLASH_CAPABILITY
        and torch.backends.cuda.is_flash_attention_available()
        and width <= _FLASH_WIDTH
        and width % _FLASH_MULTIPLE == 0
    )


def _probe_texts(model: PreTrainedModel, max_length: int) -> list[list[int]]:
    longest = min(max_length, _PROBE_TOKENS)
    vocabulary = model.config.get_text_config().vocab_size
    first, plain = min(_SPECIAL, vocabulary - 1), max(vocabulary - _SPECIAL, 1)
    lengths = (longest, 1, max(longest * 3 // 4, 1), max(longest // 3, 1))
    return [[first + (place * 7 + length) % plain for place in range(length)] for length in lengths]
