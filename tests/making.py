"""Small prepared datasets and encoders, made on the spot for tests of the mechanics."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
from upath import UPath

from cluster.store import Artifact, Record, Store
from models.labels import LabelColumn
from pipelines.prepared import INDEX, Index, SplitFile, SplitIndex

WORDS = [f"word{number}" for number in range(60)]
SENTIMENT = LabelColumn(name="sentiment", classes=("negative", "positive"))


def make_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """A word-level tokenizer over `WORDS`, saved as `AutoTokenizer` loads it."""
    vocabulary = {name: number for number, name in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    fast.save_pretrained(folder)
    return fast


def make_encoder(folder: Path, width: int = 32, layers: int = 2) -> Path:
    """A small BERT with random weights and its tokenizer."""
    torch.manual_seed(1)
    tokenizer = make_tokenizer(folder)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=2 * width,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(folder)
    return folder


def make_prepared(store: Store, rows: int = 400, chunk_rows: int = 32, fingerprint: str = "0" * 16) -> Artifact:
    """A prepared dataset of word salads; a text is positive where it has more even words than odd ones."""
    folder = store.folder("prepare", fingerprint)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(Path(folder.path) / "tokenizer")
    random = np.random.default_rng(7)
    splits = {}
    first = 0
    for split, count in (("train", rows), ("validation", rows // 4), ("test", rows // 4)):
        table = _table(random, tokenizer, first, count)
        first += count
        (Path(folder.path) / split).mkdir(exist_ok=True)
        name = f"{split}/part-00000.parquet"
        pq.write_table(table, Path(folder.path) / name, row_group_size=chunk_rows)
        files = (SplitFile(name=name, chunks=-(-count // chunk_rows)),)
        splits[split] = SplitIndex(rows=count, chunk_rows=chunk_rows, files=files)
    index = Index(labels=(SENTIMENT,), max_length=32, splits=splits)
    (folder / INDEX).write_text(index.model_dump_json())
    record = Record("prepare", fingerprint, settings={}, inputs={}, versions={}, metrics={"rows_in": rows * 3 // 2})
    return store.commit(record)


def _table(random: np.random.Generator, tokenizer: PreTrainedTokenizerFast, first: int, count: int) -> pa.Table:
    picks = [random.integers(0, len(WORDS), random.integers(3, 29)) for _ in range(count)]
    texts = [" ".join(WORDS[pick] for pick in text) for text in picks]
    ids = [tokenizer.encode(text) for text in texts]
    return pa.table(
        {
            "row": pa.array(range(first, first + count), pa.int64()),
            "text": texts,
            "input_ids": pa.array(ids, pa.list_(pa.int32())),
            "length": pa.array([len(text) for text in ids], pa.int32()),
            "truncated": [False] * count,
            "label:sentiment": pa.array([int((pick % 2 == 0).mean() > 0.5) for pick in picks], pa.int32()),
        }
    )


def open_store(path: Path) -> Store:
    """A store in a test's own folder."""
    return Store.open(str(path))


def read_json(path: UPath) -> dict[str, object]:
    """A JSON file's content."""
    content: dict[str, object] = json.loads(path.read_text())
    return content
