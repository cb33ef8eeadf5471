"""The tokenizer of a packed corpus."""

import tempfile
from pathlib import Path

from tokenizers import Tokenizer
from transformers import AutoTokenizer

from cluster.store import local_copy
from models.settings import InputError
from pipelines.preparing.dataset_tokenizer import copy_tokenizer, train_tokenizer
from pipelines.preparing.gather_pass import sample_texts
from pipelines.stage import Task


def copy_corpus_tokenizer(task: Task) -> None:
    """Puts the tokenizer of the encoder that goes on learning into the artifact."""
    settings = task.settings
    done = task.work / "tokenizer.done"
    if not done.exists():
        with tempfile.TemporaryDirectory() as scratch:
            copy_tokenizer(
                settings.encoder, settings.pack.length, task.out / "tokenizer", Path(scratch), "pack.length", "pretrain"
            )
        done.touch()


def train_corpus_tokenizer(task: Task, train_rows: list[int]) -> None:
    """Trains the corpus's own tokenizer on texts of the training split.

    Raises:
        InputError: the texts do not give as large a vocabulary as is wanted.
    """
    settings, tokenizer = task.settings, task.settings.pack.tokenizer
    done = task.work / "tokenizer.done"
    if done.exists():
        return
    texts = list(sample_texts(task.work, train_rows, pair=False))
    with tempfile.TemporaryDirectory() as scratch:
        size = train_tokenizer(
            tokenizer,
            settings.pack.length,
            texts,
            task.out / "tokenizer",
            Path(scratch),
            sentinels=settings.sentinels,
        )
    if size < tokenizer.vocabulary:
        raise InputError(
            f"pack.tokenizer.vocabulary is {tokenizer.vocabulary:,}, but the texts give only {size:,} tokens: lower "
            "it, or give more texts."
        )
    done.touch()


def end_and_unknown(task: Task) -> tuple[int | None, int]:
    """What must be put after each document: the tokenizer's end, where it puts nothing there by itself; and what
    stands for what it does not know, -1 for nothing.
    """
    with local_copy(task.out / "tokenizer") as folder:
        bare = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    ends = bare.num_special_tokens_to_add(False) > 0 or tokenizer.eos_token_id is None
    return None if ends else int(tokenizer.eos_token_id), int(
        -1 if tokenizer.unk_token_id is None else tokenizer.unk_token_id
    )
