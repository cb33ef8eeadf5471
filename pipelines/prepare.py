"""prepare: text and labels from anywhere become a clean, split, tokenised, shuffled dataset (Ray Data)."""

from typing import Any, Literal

from pydantic import Field

from models.settings import Settings
from pipelines.sources import DataSettings
from pipelines.stage import Task

NAME = "prepare"
FORMAT = 1


class TokenizerSettings(Settings):
    """A tokenizer to train on the training split, where the encoder starts from scratch."""

    kind: Literal["wordpiece", "bpe", "unigram"] = Field("wordpiece", description="The subword model.")
    vocabulary: int = Field(8000, ge=300, description="Size of the vocabulary.")
    lowercase: bool = Field(True, description="Whether case is dropped.")


class PrepareSettings(Settings):
    """How the text is cleaned, split and tokenised."""

    repair: bool = Field(True, description="Mend mis-decoded text (ftfy).")
    normalise: Literal["NFC", "NFKC", "none"] = Field("NFC", description="Unicode form; white space is folded too.")
    min_characters: int = Field(1, ge=1, description="Shorter texts are rejected.")
    max_characters: int = Field(100_000, ge=1, description="Longer texts are rejected.")
    deduplicate: Literal["exact", "none"] = Field("exact", description="Of equal texts, across splits, one is kept.")
    validation_share: float = Field(0.1, ge=0, lt=1, description="Share of the rows for validation.")
    test_share: float = Field(0.1, ge=0, lt=1, description="Share of the rows for the test.")
    max_length: int = Field(128, ge=4, description="Tokens a text is cut to, special tokens included.")
    tokenizer: TokenizerSettings | None = Field(
        None, description="A tokenizer to train on the data; by default, the encoder's own."
    )
    chunk_rows: int | None = Field(
        None, ge=1, description="Rows in a chunk; by default, about a 48th of the training set, 64 to 4096."
    )
    seed: int = Field(0, description="Seed of the shuffle.")


class PrepareStageSettings(Settings):
    """All that decides what `prepare` writes."""

    data: DataSettings
    prepare: PrepareSettings
    encoder: str | None = Field(None, description="Whose tokenizer is used, where none is trained.")


def externals(settings: PrepareStageSettings) -> dict[str, str]:
    """Identities of the source data and of the encoder's tokenizer."""
    raise NotImplementedError


def run(task: Task) -> dict[str, Any]:
    """Prepares the data into `task.out`."""
    raise NotImplementedError
