"""The lesson of `pretrain`: a language model learns from packed rows."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from upath import UPath

from cluster.store import local_copy
from models.architectures import ScratchEncoder, scratch_config
from models.feed import Feed, mix
from models.flops import peak, training_flops
from models.language import Ids, Objective, prediction_loss
from models.microbatch import Batch
from models.precision import autocast
from models.pretraining import build_language_model, build_objective
from models.settings import InputError
from models.training import LaneTrainer
from pipelines.prepared import Prepared
from pipelines.pretrained import encoder_folder
from pipelines.training.lanes import LaneReader, Ragged

if TYPE_CHECKING:
    from pipelines.pretrain import PretrainSettings

_MASKS, _VALIDATION = 4, 5
"""What random draws are for, among all that come from one seed."""


@dataclass(frozen=True)
class PackedChunk:
    """Packed rows, ready to be cut into microbatches."""

    rows: NDArray[np.int64]
    lengths: NDArray[np.int64]
    input_ids: Ragged
    starts: Ragged
    pad: int

    @classmethod
    def read(cls, packed: Prepared, split: str, numbers: range, pad: int) -> "PackedChunk":
        """Some stored chunks as one."""
        names = ["row", "length", "input_ids", "starts"]
        table = pa.concat_tables([packed.read_chunk(split, number, names) for number in numbers])
        rows, lengths = (table[name].to_numpy().astype(np.int64) for name in ("row", "length"))
        return cls(rows, lengths, Ragged.of(table["input_ids"]), Ragged.of(table["starts"]), pad)

    def packed(self, items: NDArray[np.int64]) -> tuple[Ids, Ids]:
        """Ids and the numbers of documents, [items, longest], as `models.packed` wants them."""
        width = int(self.lengths[items].max())
        ids = self.input_ids.padded(items, width)
        there = np.arange(width) < self.lengths[items][:, None]
        ids[~there] = self.pad
        begins = np.zeros(ids.shape, np.int64)
        for at, item in enumerate(items):
            begins[at, self.starts.values[self.starts.offsets[item] : self.starts.offsets[item + 1]]] = 1
        return ids, np.cumsum(begins, axis=1) * there


@dataclass(frozen=True)
class Pretraining:
    """Learns an objective from a packed corpus."""

    settings: "PretrainSettings"
    packed: UPath
    section: str = "pretrain"
    length: str = "pack.length"

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Of the packed corpus."""
        with local_copy(Prepared(self.packed).tokenizer_folder) as folder:
            return AutoTokenizer.from_pretrained(folder)

    def build(self, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> PreTrainedModel:
        """A language model that reads packed rows."""
        settings, encoder = self.settings, self.settings.encoder
        build = partial(build_language_model, settings.objective, tokenizer, device, seed=settings.seed)
        if isinstance(encoder, ScratchEncoder):
            positions = Prepared(self.packed).index.max_length
            dropout = encoder.dropout if settings.dropout is None else settings.dropout
            return build(config=scratch_config(encoder, tokenizer, positions), dropout=dropout)
        with encoder_folder(encoder) as folder:
            return build(pretrained=folder, dropout=settings.dropout)

    def loss(self) -> Callable[[Tensor, Mapping[str, Tensor]], Tensor]:
        """Cross-entropy of what is to be predicted."""
        return prediction_loss

    def batches(
        self, feed: Feed, lanes: range, tokenizer: PreTrainedTokenizerBase
    ) -> Callable[[int, int, int], Batch | None]:
        """Rows with something to be predicted, drawn anew for each epoch, step and lane."""
        objective, packed = self._objective(tokenizer), Prepared(self.packed)
        split = packed.index.splits["train"]
        stored = feed.chunk_rows // split.chunk_rows

        def read(number: int) -> PackedChunk:
            numbers = range(number * stored, min((number + 1) * stored, split.chunks))
            return PackedChunk.read(packed, "train", numbers, int(tokenizer.pad_token_id))

        def batch(chunk: PackedChunk, items: NDArray[np.int64], draw_seed: int) -> Batch:
            lesson = objective.lesson(*chunk.packed(items), mix(draw_seed, _MASKS))
            return Batch(lesson.inputs, {"targets": lesson.targets}, chunk.rows[items].tolist(), max(lesson.count, 1))

        return LaneReader(feed, read, lanes, batch).batch

    def validate(
        self, trainer: LaneTrainer, tokenizer: PreTrainedTokenizerBase, stopped: Callable[[], bool]
    ) -> dict[str, float] | None:
        """Loss in nats a token, perplexity, and bits a byte of text, which compares tokenizers; always the same draws.

        Rows are dealt to the workers, each of which fills its part of one array; all but one hold zeros, so that adding
        them up is exact.
        """
        packed, objective = Prepared(self.packed), self._objective(tokenizer)
        split = packed.index.splits["validation"]
        rows = self.settings.microbatch
        per_chunk = -(-split.chunk_rows // rows)
        found = torch.zeros(split.chunks, per_chunk, 3, dtype=torch.float64, device=trainer.device)
        trainer.model.eval()
        for number in range(-(-split.chunks // trainer.workers) * trainer.workers):
            if number % trainer.workers == 0 and trainer.hear(stopped()):
                return None
            if number % trainer.workers != trainer.rank:
                continue
            chunk = None
            if number < split.chunks:
                chunk = PackedChunk.read(packed, "validation", range(number, number + 1), int(tokenizer.pad_token_id))
            for place in range(per_chunk):
                items = np.arange(place * rows, min((place + 1) * rows, len(chunk.rows) if chunk else 0))
                if chunk is None or not len(items):
                    trainer.idle()
                    continue
                ids, documents = chunk.packed(items)
                lesson = objective.lesson(ids, documents, mix(self.settings.seed, _VALIDATION, number, place))
                inputs = {name: value.to(trainer.device) for name, value in lesson.inputs.items()}
                with torch.no_grad(), autocast(trainer.device, trainer.precision):
                    summed = prediction_loss(
                        trainer.model(**inputs).logits, {"targets": lesson.targets.to(trainer.device)}
                    )
                plain = int(objective.plain(ids, documents).sum())
                found[number, place] = torch.tensor([float(summed), lesson.count, plain])
        if trainer.workers > 1:
            dist.all_reduce(found)
        nats, targets, tokens = (math.fsum(part) for part in found.flatten(0, 1).T.tolist())
        loss = nats / max(targets, 1)
        if not math.isfinite(loss):
            raise InputError("the validation loss is not finite: lower pretrain.learning_rate.")
        bits = loss / math.log(2) * tokens / max(split.bytes, 1)
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "bits_per_byte": bits}

    def score(self, measured: dict[str, float]) -> float:
        """The loss, turned around."""
        return -measured["loss"]

    def cost(self, trainer: LaneTrainer) -> dict[str, float]:
        """FLOPs of a token in training, and of the device in a second; empty where they are not known."""
        if trainer.sharded:
            return {}
        inputs = trainer.first_batch.inputs
        flops = training_flops(trainer.model, inputs, trainer.device, trainer.precision)
        tokens = int(inputs["attention_mask"].count_nonzero())
        found = peak(trainer.device, trainer.precision)
        return {"flops_per_token": flops / tokens} | ({"peak_flops": found} if found else {})

    def save(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
        """What `AutoModel` and the objective's Auto class load."""
        model.config.use_cache = type(model.config)().use_cache if hasattr(type(model.config)(), "use_cache") else False
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    def _objective(self, tokenizer: PreTrainedTokenizerBase) -> Objective:
        return build_objective(self.settings.objective, tokenizer, self.settings.rate)
