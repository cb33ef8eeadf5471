"""Pretrained encoders: where a recipe's `finetune.encoder` is, and what it is.

`prepare`, which takes its tokenizer, and `finetune`, which takes its weights, find it here by the same rules.
"""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from transformers.utils.hub import cached_file
from upath import UPath

from cluster.store import local_copy
from models.settings import InputError
from pipelines.locate import identity, locate, reason_of, telling_read_errors

PRETRAINED = "pretrain"
"""As an encoder: the one that the recipe itself pretrains; and the name of that stage."""

WEIGHT_FILES = ("*.safetensors", "config.json")
TOKENIZER_FILES = (
    "config.json",
    *(f"{name}*" for name in ("token", "vocab", "merges", "special_tokens", "added_tokens", "spiece", "sentencepiece")),
)
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def is_hub_id(reference: str) -> bool:
    """Whether `reference` names a model of the Hugging Face hub: no path, no URL, and nothing here of that name."""
    return bool(_HUB_ID.fullmatch(reference)) and not Path(reference).exists()


def encoder_identity(reference: str, parts: tuple[str, ...] = WEIGHT_FILES, section: str = "finetune") -> str:
    """What the encoder is, for fingerprints: a digest of those of its files, or a hub id and its commit.

    `section` is the recipe's that names it.

    Raises:
        InputError: there is no encoder at `reference`.
    """
    if is_hub_id(reference):
        try:
            config = cached_file(reference, "config.json")
        except (OSError, ValueError) as error:
            raise InputError(
                f"{section}.encoder: {reference} is neither a folder here nor an encoder that the hub gives "
                f"({reason_of(error)})."
            ) from error
        # .../snapshots/COMMIT/config.json
        return f"{reference}@{Path(str(config)).parent.name}"
    folder = _folder(reference, section)
    with telling_read_errors(reference):
        files = sorted({file for pattern in parts for file in folder.glob(pattern) if file.is_file()}, key=str)
    return identity(files)


@contextlib.contextmanager
def encoder_folder(reference: str, section: str = "finetune") -> Iterator[str]:
    """What transformers' `from_pretrained` takes: a local folder (copied here where it is remote), or the hub id.

    Raises:
        InputError: there is no encoder at `reference`.
    """
    if is_hub_id(reference):
        yield reference
        return
    with local_copy(_folder(reference, section)) as folder:
        yield str(folder)


def _folder(reference: str, section: str = "finetune") -> UPath:
    try:
        folder = locate(reference)
        with telling_read_errors(reference):
            if (folder / "config.json").exists():
                return folder
    except InputError as error:
        raise InputError(f"{section}.encoder: {error}") from error
    raise InputError(f"{section}.encoder: {reference} is no encoder: there is no config.json in it.")
