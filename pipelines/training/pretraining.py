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
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from upath import UPath

from models.apart import computes_apart
from models.architectures import ScratchEncoder, scratch_config
from models.encoders import copy_dropout, set_dropout
from models.feed import Feed, mix
from models.flops import peak, training_flops
from models.language import Ids, Objective, prediction_loss, prediction_losses
from models.microbatch import Batch
from models.precision import autocast
from models.pretraining import build_language_model, build_objective, keep_the_rest
from models.settings import InputError, Precision
from models.training import LaneTrainer
from pipelines.prepared import Prepared
from pipelines.pretrained import encoder_folder
from pipelines.training.lanes import LaneReader, Ragged
from pipelines.training.lesson import stored_tokenizer

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
        return stored_tokenizer(Prepared(self.packed))

    def build(self, tokenizer: PreTrainedTokenizerBase, device: torch.device, precision: Precision) -> PreTrainedModel:
        """A language model that reads packed rows."""
        settings, encoder = self.settings, self.settings.encoder
        build = partial(
            build_language_model,
            settings.objective,
            tokenizer,
            Prepared(self.packed).index.max_length,
            device,
            precision,
            seed=settings.seed,
            dropout=settings.dropout,
        )
        if isinstance(encoder, ScratchEncoder):
            model = build(config=self._fresh_config(encoder, tokenizer))
        else:
            with encoder_folder(encoder) as folder:
                model = build(pretrained=folder)
        if settings.fsdp and computes_apart(model):
            raise InputError(
                f"pretrain.fsdp: {model.config.model_type} models would mix the documents of a row and compute them "
                "one by one, some workers more often than others, which sharded ones cannot; take another architecture."
            )
        return model

    def _fresh_config(self, encoder: ScratchEncoder, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
        config = scratch_config(encoder, tokenizer, Prepared(self.packed).index.max_length, self.section)
        set_dropout(config, encoder.dropout, self.section)
        return config

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

        def batch(chunk: PackedChunk, items: NDArray[np.int64], place: tuple[int, int, int]) -> Batch:
            lesson = objective.lesson(*chunk.packed(items), mix(feed.draw_seed(*place), _MASKS))
            return Batch(lesson.inputs, {"targets": lesson.targets}, chunk.rows[items].tolist(), max(lesson.count, 1))

        return LaneReader(feed, read, lanes, batch).batch

    def validate(
        self, trainer: LaneTrainer, tokenizer: PreTrainedTokenizerBase, stopped: Callable[[], bool]
    ) -> dict[str, float] | None:
        """Loss in nats a token, perplexity, and bits a byte of text, which compares tokenizers; always the same draws.

        Rows are dealt to the workers, each of which fills its part of one array; all but one hold zeros, so that adding
        them up is exact. Bits are of the text's own tokens: sentinels and ends of documents are left out.
        """
        packed, objective = Prepared(self.packed), self._objective(tokenizer)
        split, rows, pad = packed.index.splits["validation"], self.settings.microbatch, int(tokenizer.pad_token_id)
        measured = min(self.settings.validation_rows, split.rows)
        chunks, per_chunk = -(-measured // split.chunk_rows), -(-split.chunk_rows // rows)
        found = torch.zeros(chunks, per_chunk, 6, dtype=torch.float64, device=trainer.device)
        trainer.model.eval()
        for number in range(-(-chunks // trainer.workers) * trainer.workers):
            if number % trainer.workers == 0 and trainer.hear(stopped()):
                return None
            if number % trainer.workers != trainer.rank:
                continue
            chunk, there = None, 0
            if number < chunks:
                chunk = PackedChunk.read(packed, "validation", range(number, number + 1), pad)
                there = min(len(chunk.rows), measured - number * split.chunk_rows)
            for place in range(per_chunk):
                items = np.arange(place * rows, min((place + 1) * rows, there))
                if chunk is None or not len(items):
                    trainer.idle()
                    continue
                ids, documents = chunk.packed(items)
                lesson = objective.lesson(ids, documents, mix(self.settings.seed, _VALIDATION, number, place))
                inputs = {name: value.to(trainer.device) for name, value in lesson.inputs.items()}
                with torch.no_grad(), autocast(trainer.device, trainer.precision):
                    losses = prediction_losses(trainer.model(**inputs).logits, lesson.targets.to(trainer.device))
                plain = objective.plain_targets(lesson.targets).flatten()
                figures = (
                    float(losses.sum()),
                    lesson.count,
                    float(losses.cpu()[plain].sum()),
                    int(plain.sum()),
                    int(objective.plain(ids, documents).sum()),
                    int((documents > 0).sum()),
                )
                found[number, place] = torch.tensor(figures)
        if trainer.workers > 1:
            dist.all_reduce(found)
        nats, targets, plain_nats, plain_targets, plain_tokens, tokens = (
            math.fsum(part) for part in found.flatten(0, 1).T.tolist()
        )
        loss = nats / max(targets, 1)
        if not math.isfinite(loss):
            raise InputError("the validation loss is not finite: lower pretrain.learning_rate.")
        # The measured rows' share of the split's text is that of their tokens.
        text_bytes = split.bytes * tokens / max(split.tokens, 1)
        bits = plain_nats / max(plain_targets, 1) / math.log(2) * plain_tokens / max(text_bytes, 1)
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "bits_per_byte": bits}

    def score(self, measured: dict[str, float]) -> float:
        """The loss, turned around."""
        return -measured["loss"]

    def cost(self, trainer: LaneTrainer) -> dict[str, float]:
        """FLOPs of a token in training, and of the device in a second, where they are known; `apart` if the model would
        mix the documents of a row and computes them one by one.
        """
        if trainer.sharded:
            return {}
        apart = {"apart": 1.0} if computes_apart(trainer.model) else {}
        inputs = trainer.first_batch.inputs
        flops = training_flops(trainer.model, inputs, trainer.device, trainer.precision)
        tokens = int(inputs["attention_mask"].count_nonzero())
        found = peak(trainer.device, trainer.precision)
        return apart | {"flops_per_token": flops / tokens} | ({"peak_flops": found} if found else {})

    def save(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
        """What `AutoModel` and the objective's Auto class load, with the dropout that the encoder itself has."""
        encoder = self.settings.encoder
        if isinstance(encoder, ScratchEncoder):
            own, state = self._fresh_config(encoder, tokenizer), None
        else:
            with encoder_folder(encoder) as source:
                own, state = AutoConfig.from_pretrained(source, trust_remote_code=False), keep_the_rest(model, source)
        copy_dropout(own, model.config)
        model.config.use_cache = getattr(own, "use_cache", True)
        model.save_pretrained(folder, state_dict=state)
        tokenizer.save_pretrained(folder)

    def _objective(self, tokenizer: PreTrainedTokenizerBase) -> Objective:
        return build_objective(self.settings.objective, tokenizer, self.settings.rate)
