"""What a language model is pretrained to predict: masked tokens, next tokens, or dropped spans.

Each objective turns packed rows, `ids` and `documents` (both [rows, tokens]; see `models.packed`), into a model's
inputs and targets. Random draws come from a seed alone (numpy's SFC64, whose raw stream is fixed), so the same
(seed, epoch, step, lane) is masked alike wherever and whenever it is run.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from models.settings import InputError

ObjectiveName = Literal["mlm", "clm", "span"]
Ids = NDArray[np.int64]
_NOTHING = -100
_MASKED_OF_TEN, _OTHER_OF_TEN = 8, 1
_SPAN = 3.0


def uniform(seed: int, count: int) -> NDArray[np.float64]:
    """Numbers in [0, 1), of which each has 32 random bits."""
    bits = np.random.SFC64(seed).random_raw(-(-count // 2)).view(np.uint32)[:count]
    return bits.astype(np.float64) / 2.0**32


def prediction_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats of each target, [targets]; zero where there is nothing to predict."""
    return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), ignore_index=_NOTHING, reduction="none")


def prediction_loss(logits: Tensor, labels: Mapping[str, Tensor]) -> Tensor:
    """Their sum."""
    return prediction_losses(logits, labels["targets"]).sum()


@dataclass(frozen=True)
class Lesson:
    """A microbatch to learn from: the model's keyword arguments, and what it should predict."""

    inputs: dict[str, Tensor]
    targets: Tensor
    """Token ids, -100 where nothing is to be predicted."""

    @property
    def count(self) -> int:
        """How many tokens are to be predicted."""
        return int((self.targets != _NOTHING).sum())


class Objective(ABC):
    """Knows the special tokens of one tokenizer, which no objective hides."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._vocabulary = len(tokenizer)
        self._special = np.zeros(self._vocabulary, bool)
        self._special[tokenizer.all_special_ids] = True
        if tokenizer.unk_token_id is not None:  # It stands for text.
            self._special[tokenizer.unk_token_id] = False

    @abstractmethod
    def lesson(self, ids: Ids, documents: Ids, seed: int) -> Lesson:
        """What is to be learnt from packed rows."""

    def plain(self, ids: Ids, documents: Ids) -> NDArray[np.bool_]:
        """Which tokens are neither special nor padding."""
        return ~self._special[ids] & (documents > 0)

    def plain_targets(self, targets: Tensor) -> Tensor:
        """Which targets are neither special nor nothing."""
        special = torch.from_numpy(self._special)[targets.clamp(min=0)]
        return ~special & (targets != _NOTHING)


class MaskedTokens(Objective):
    """BERT's (Devlin et al. 2019, arXiv 1810.04805): a share of the tokens is to be told from the others.

    Of these, 80% are hidden behind the mask token, 10% are replaced by a random one, and 10% stay. A microbatch has
    one at least.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rate: float) -> None:
        super().__init__(tokenizer)
        if tokenizer.mask_token_id is None:
            raise InputError("pretrain.objective: mlm needs a mask token, and this tokenizer has none; take clm.")
        self._mask, self._rate = int(tokenizer.mask_token_id), rate
        self._others = np.flatnonzero(~self._special)

    def lesson(self, ids: Ids, documents: Ids, seed: int) -> Lesson:
        draws = uniform(seed, 3 * ids.size).reshape(3, *ids.shape)
        plain = self.plain(ids, documents)
        wanted = plain & (draws[0] < self._rate)
        if plain.any() and not wanted.any():
            wanted.flat[np.argmin(np.where(plain, draws[0], 1.0))] = True
        kind = draws[1] * 10
        hidden = ids.copy()
        hidden[wanted & (kind < _MASKED_OF_TEN)] = self._mask
        other = wanted & (kind >= _MASKED_OF_TEN) & (kind < _MASKED_OF_TEN + _OTHER_OF_TEN)
        hidden[other] = self._others[(draws[2][other] * len(self._others)).astype(np.int64)]
        inputs = {"input_ids": hidden, "attention_mask": documents, "wanted": wanted}
        return Lesson({name: torch.from_numpy(value) for name, value in inputs.items()}, torch.from_numpy(ids[wanted]))


class NextTokens(Objective):
    """GPT's (Radford et al. 2018): each token of a document is to be told from those before it."""

    def lesson(self, ids: Ids, documents: Ids, seed: int) -> Lesson:
        followed = np.zeros(ids.shape, bool)
        followed[:, :-1] = (documents[:, 1:] == documents[:, :-1]) & (documents[:, 1:] > 0)
        targets = np.roll(ids, -1, axis=1)[followed]
        inputs = {"input_ids": ids, "attention_mask": documents, "wanted": followed}
        return Lesson({name: torch.from_numpy(value) for name, value in inputs.items()}, torch.from_numpy(targets))


class DroppedSpans(Objective):
    """T5's (Raffel et al. 2020, arXiv 1910.10683): spans are replaced by a sentinel each and are to be told in order.

    Spans have 3 tokens on average; where they begin and end is drawn as there: the dropped and the kept tokens of a
    document are each cut into as many parts at random. A document's sentinels count from the first one. Rows of full
    length lose about a tenth, each a little more or less: up to a few tokens at a row's end are padding.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rate: float) -> None:
        super().__init__(tokenizer)
        names = (f"<extra_id_{number}>" for number in range(self._vocabulary))
        known = tokenizer.get_vocab()
        self._sentinels = []
        for name in names:
            if name not in known:
                break
            self._sentinels.append(known[name])
        if not self._sentinels:
            raise InputError(
                "pretrain.objective: span needs the tokens <extra_id_0>, <extra_id_1> ..., and this tokenizer has "
                "none; take T5's tokenizer or train one."
            )
        self._rate = rate
        end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
        self._end = [] if end is None else [int(end)]
        self._pad = int(tokenizer.pad_token_id or 0)

    def lesson(self, ids: Ids, documents: Ids, seed: int) -> Lesson:
        draws = uniform(seed, 2 * ids.size).reshape(2, *ids.shape)
        plain = self.plain(ids, documents)
        rows = [self._row(*row) for row in zip(ids, documents, plain, draws[0], draws[1], strict=True)]
        kept, told = zip(*rows, strict=True)
        inputs, targets = _joined(list(kept), self._pad), _joined(list(told), _NOTHING)
        shifted = np.full_like(targets[0], self._pad)
        shifted[:, 1:] = np.where(targets[0][:, :-1] == _NOTHING, self._pad, targets[0][:, :-1])
        begins = np.ones(shifted.shape, bool)
        begins[:, 1:] = targets[1][:, 1:] != targets[1][:, :-1]
        shifted[begins] = self._pad  # As T5's decoder begins.
        arrays = {
            "input_ids": inputs[0],
            "attention_mask": inputs[1],
            "decoder_input_ids": shifted,
            "decoder_attention_mask": targets[1],
        }
        return Lesson({name: torch.from_numpy(value) for name, value in arrays.items()}, torch.from_numpy(targets[0]))

    def _row(
        self, ids: Ids, documents: Ids, plain: NDArray[np.bool_], *draws: NDArray[np.float64]
    ) -> tuple[list[tuple[int, list[int]]], list[tuple[int, list[int]]]]:
        """For each document of a row, its number with what is kept of it, and with what is to be told."""
        kept, told = [], []
        for number in range(1, int(documents.max(initial=0)) + 1):
            places = np.flatnonzero(documents == number)
            inside = places[plain[places]]
            dropped = self._dropped(len(inside), draws[0][inside], draws[1][inside])
            drop = np.zeros(len(ids), bool)
            drop[inside] = dropped
            source: list[int] = []
            target: list[int] = []
            spans, before = 0, False
            for place in places.tolist():
                # A special token in the middle of a text ends a span, so that there may be more of them than wanted.
                begins = drop[place] and not before
                before = bool(drop[place]) and not (begins and spans == len(self._sentinels))
                if before:
                    if begins:
                        source.append(self._sentinels[spans])
                        target.append(self._sentinels[spans])
                        spans += 1
                    target.append(int(ids[place]))
                else:
                    source.append(int(ids[place]))
            kept.append((number, source))
            if target:
                told.append((number, target + self._end))
        return kept, told

    def _dropped(self, count: int, *draws: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Which of a document's tokens are dropped."""
        if count < 2:
            return np.zeros(count, bool)
        noise = min(max(round(count * self._rate), 1), count - 1)
        spans = min(max(round(noise / _SPAN), 1), count - noise, len(self._sentinels))
        parts = np.empty(2 * spans, np.int64)
        parts[0::2] = _cut(count - noise, spans, draws[0])
        parts[1::2] = _cut(noise, spans, draws[1])
        return np.repeat(np.arange(2 * spans) % 2 == 1, parts)


def _cut(total: int, parts: int, draws: NDArray[np.float64]) -> Ids:
    """Sizes of `parts` parts of `total`, none empty, each way to cut equally likely."""
    cuts = np.sort(np.argsort(draws[: total - 1], kind="stable")[: parts - 1]) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))


def _joined(rows: list[list[tuple[int, list[int]]]], fill: int) -> tuple[Ids, Ids]:
    """Documents side by side, [rows, longest], and their numbers."""
    width = max(1, max(sum(len(ids) for _, ids in row) for row in rows))
    values, numbers = np.full((len(rows), width), fill, np.int64), np.zeros((len(rows), width), np.int64)
    for at, row in enumerate(rows):
        place = 0
        for number, ids in row:
            values[at, place : place + len(ids)] = ids
            numbers[at, place : place + len(ids)] = number
            place += len(ids)
    return values, numbers
