"""A classifier and a prepared dataset of a few kilobytes, made on the spot.

The language has one rule: a text is about animals if it names one, else about tools; `good` makes it glad, `bad` sad.
"""

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from upath import UPath

from cluster.store import Artifact, Record
from models.classifier import save
from models.labels import LabelColumn, spans
from models.spec import ClassifierSpec, label_config
from pipelines.prepared import INDEX, Index, SplitFile, SplitIndex

ANIMALS, TOOLS = ("cat", "dog", "owl"), ("saw", "axe", "awl")
MOODS, REST = ("good", "bad"), ("the", "a", "was", "and", "very")
TOPIC = LabelColumn(name="topic", classes=("animal", "tool"))
MOOD = LabelColumn(name="mood", classes=("glad", "new", "sad"), multi=True)
MAX_LENGTH = 12


def sentence(draw: random.Random) -> tuple[str, int, list[int]]:
    """A text, its topic and its moods."""
    topic, mood = draw.randrange(2), draw.sample(range(2), draw.randrange(3))
    words = [draw.choice((ANIMALS, TOOLS)[topic]), *(MOODS[m] for m in mood), *draw.choices(REST, k=draw.randrange(5))]
    draw.shuffle(words)
    return " ".join(words), topic, sorted({0: 0, 1: 2}[m] for m in mood)


def tokenizer(*, decoder: bool = False) -> PreTrainedTokenizerFast:
    """One token a word; a decoder's adds none, and knows none for padding."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *ANIMALS, *TOOLS, *MOODS, *REST]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    inputs = ["input_ids", "attention_mask"]
    if decoder:
        names = {"unk_token": "[UNK]", "eos_token": "[SEP]", "model_input_names": inputs}
        return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=MAX_LENGTH, **names)
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    names = {**special, "model_input_names": [*inputs, "token_type_ids"]}
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=MAX_LENGTH, **names)


def make_classifier(folder: Path, labels: Sequence[LabelColumn] = (TOPIC,), steps: int = 40) -> Path:
    """A classifier that has learnt the rule, nearly: `steps` batches of it, a second or two."""
    # Matrices this small gain nothing by threads, and lose much by waiting for them on busy cores.
    torch.set_num_threads(1)
    torch.manual_seed(0)
    draw, encoder, labels = random.Random(1), tokenizer(), tuple(labels)
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=len(encoder), **size, max_position_embeddings=32, **label_config(labels))
    model = AutoModelForSequenceClassification.from_config(config).train()
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(steps):
        texts, topics, moods = zip(*(sentence(draw) for _ in range(32)), strict=True)
        logits = model(**encoder(list(texts), padding=True, return_tensors="pt")).logits
        loss = torch.zeros(())
        for column, span in spans(labels):
            if column.multi:
                wanted = torch.zeros(32, len(column.classes))
                for row, held in enumerate(moods):
                    wanted[row, held] = 1
                loss = loss + torch.nn.functional.binary_cross_entropy_with_logits(logits[:, span], wanted)
            else:
                loss = loss + torch.nn.functional.cross_entropy(logits[:, span], torch.tensor(topics))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    folder.mkdir(parents=True, exist_ok=True)
    save(model.eval(), encoder, ClassifierSpec(labels=labels, max_length=MAX_LENGTH), folder)
    return folder


def make_encoder(folder: Path, *, decoder: bool = False, layers: int = 1) -> Path:
    """A BERT, or for `decoder` a GPT-2, with random weights."""
    torch.manual_seed(0)
    vocabulary = len(tokenizer())
    encoder: PreTrainedModel
    if decoder:
        encoder = GPT2Model(GPT2Config(vocab_size=vocabulary, n_embd=32, n_layer=layers, n_head=2, n_positions=32))
    else:
        size = {"hidden_size": 32, "num_hidden_layers": layers, "num_attention_heads": 2, "intermediate_size": 32}
        encoder = BertModel(BertConfig(vocab_size=vocabulary, **size, max_position_embeddings=32))
    encoder.save_pretrained(folder)
    return folder


def make_prepared(
    folder: Path,
    labels: Sequence[LabelColumn] = (TOPIC,),
    rows: dict[str, int] | None = None,
    *,
    noise: float = 0.1,
    missing: float = 0.0,
    chunk_rows: int = 64,
    pair: bool = False,
    decoder: bool = False,
) -> Path:
    """A prepared dataset; a share `noise` of the topics is wrong, a share `missing` is absent.

    For `pair`, each text stands beside another, which says nothing.
    """
    draw, encoder, number = random.Random(2), tokenizer(decoder=decoder), 0
    splits = {}
    for split, count in (rows or {"train": 400, "validation": 200, "test": 200}).items():
        drawn = [sentence(draw) for _ in range(count)]
        topics = [1 - topic if draw.random() < noise else topic for _, topic, _ in drawn]
        topics = [-1 if draw.random() < missing else topic for topic in topics]
        partners = [" ".join(draw.choices(REST, k=2)) if pair else None for _ in drawn]
        encoded = [
            encoder(text, partner, truncation=True) for (text, _, _), partner in zip(drawn, partners, strict=True)
        ]
        ids = [one["input_ids"] for one in encoded]
        columns = {
            "row": pa.array(np.arange(number, number + count)),
            "text": pa.array([text for text, _, _ in drawn], pa.string()),
            "input_ids": pa.array(ids, pa.list_(pa.int32())),
            "length": pa.array([len(one) for one in ids], pa.int32()),
            "truncated": pa.array([False] * count, pa.bool_()),
            "column:channel": pa.array(draw.choices(("web", "mail", None), (90, 9, 1), k=count), pa.string()),
        }
        if pair:
            columns["text_pair"] = pa.array(partners, pa.string())
            columns["token_type_ids"] = pa.array([one["token_type_ids"] for one in encoded], pa.list_(pa.int8()))
        if TOPIC in labels:
            columns["label:topic"] = pa.array(topics, pa.int32())
        if MOOD in labels:
            columns["label:mood"] = pa.array([moods for _, _, moods in drawn], pa.list_(pa.int32()))
        file = folder / split / "part-00000.parquet"
        file.parent.mkdir(parents=True)
        pq.write_table(pa.table(columns), file, row_group_size=chunk_rows)
        files = (SplitFile(name=f"{split}/part-00000.parquet", chunks=-(-count // chunk_rows)),) if count else ()
        splits[split] = SplitIndex(rows=count, chunk_rows=chunk_rows, files=files)
        number += count
    index = Index(labels=tuple(labels), pair=pair, max_length=MAX_LENGTH, splits=splits, columns=("channel",))
    (folder / INDEX).write_text(index.model_dump_json(), encoding="utf-8")
    encoder.save_pretrained(folder / "tokenizer")
    return folder


def artifact(folder: Path, stage: str) -> Artifact:
    """The folder as a finished artifact."""
    record = Record(stage, folder.name, {"seed": 0}, {"data": "d" * 32}, {"torch": "2"}, {})
    return Artifact(UPath(folder), record)
