"""Classifiers with random weights, made on the spot, for tests of what computes and serves them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForSequenceClassification, BertConfig, GPT2Config, PreTrainedConfig
from transformers import PreTrainedTokenizerFast as FastTokenizer

from models.classifier import save
from models.drift import make_reference
from models.engine import Engine
from models.labels import LabelColumn
from models.spec import ClassifierSpec, label_config

SENTIMENT = LabelColumn(name="sentiment", classes=("negative", "neutral", "positive"))
TOPICS = LabelColumn(name="topics", classes=("bag", "delay", "food", "price"), multi=True)

CORPUS = ["the flight was late again", "lovely crew and good food", "they lost my bag and would not help"]


def train_tokenizer(*, decoder: bool = False) -> FastTokenizer:
    """A small WordPiece tokenizer; a decoder's adds no special tokens.

    Its vocabulary is put together, not trained: a trainer breaks ties in another order each time, and with random
    weights another id is another model.
    """
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    words = sorted({word for text in CORPUS for word in text.split()})
    characters = sorted(set("".join(words)))
    pieces = dict.fromkeys([*special, *characters, *(f"##{character}" for character in characters), *words])
    tokenizer = Tokenizer(WordPiece({piece: id for id, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = BertNormalizer()
    tokenizer.pre_tokenizer = BertPreTokenizer()
    if not decoder:
        tokenizer.post_processor = TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
        )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token"), special, strict=True))
    inputs = ["input_ids", "attention_mask"] + ([] if decoder else ["token_type_ids"])
    return FastTokenizer(tokenizer_object=tokenizer, model_input_names=inputs, **names)


def make_classifier(
    folder: Path,
    labels: Sequence[LabelColumn] = (SENTIMENT,),
    *,
    pair: bool = False,
    max_length: int = 32,
    decoder: bool = False,
) -> Path:
    """A two-layer BERT (or GPT-2, for `decoder`) of width 32 whose answers differ from text to text."""
    torch.manual_seed(3)
    tokenizer = train_tokenizer(decoder=decoder)
    vocabulary = len(tokenizer)
    columns = tuple(labels)
    config: PreTrainedConfig
    if decoder:
        config = GPT2Config(vocab_size=vocabulary, n_embd=32, n_layer=2, n_head=4, **label_config(columns))
    else:
        config = BertConfig(
            vocab_size=vocabulary,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=max(64, max_length),
            initializer_range=0.3,
            **label_config(columns),
        )
    model = AutoModelForSequenceClassification.from_config(config)
    folder.mkdir(parents=True, exist_ok=True)
    save(model, tokenizer, ClassifierSpec(labels=columns, max_length=max_length, pair=pair), folder)
    return folder


def reference_by(engine: Engine, texts: Sequence[str]) -> dict[str, Any]:
    """What an evaluation on the texts would leave for telling drift."""
    encoded = engine.encode(texts)
    logits = engine.logits(encoded)
    found = engine.probabilities(logits)
    decided = {
        column.name: found[column.name] >= 0.5 if column.multi else found[column.name].argmax(axis=1)
        for column in engine.spec.labels
    }
    confidence = {name: values.max(axis=1) for name, values in found.items()}
    lengths = np.array([len(item.ids) for item in encoded])
    unknown = sum(item.ids.count(1) for item in encoded)
    return make_reference(engine.spec.labels, decided, confidence, lengths, unknown, "validation").model_dump()
