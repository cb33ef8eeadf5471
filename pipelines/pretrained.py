"""Pretrained encoders: where a recipe's `finetune.encoder` is, and what it is."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from transformers.utils.hub import cached_file
from upath import UPath

from cluster.store import local_copy
from models.settings import InputError
from pipelines.locate import identity, locate

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def is_hub_id(reference: str) -> bool:
    """Whether `reference` names a model of the Hugging Face hub: no path, no URL, and nothing here of that name."""
    return bool(_HUB_ID.fullmatch(reference)) and not Path(reference).exists()


def encoder_identity(reference: str, parts: tuple[str, ...] = ("*.safetensors", "config.json")) -> str:
    """What the encoder is, for fingerprints: a digest of those of its files, or a hub id and its commit.

    Raises:
        InputError: there is no encoder at `reference`.
    """
    if is_hub_id(reference):
        try:
            config = cached_file(reference, "config.json")
        except (OSError, ValueError) as error:
            raise InputError(
                f"finetune.encoder: {reference} is neither a folder here nor an encoder that the hub gives "
                f"({str(error).strip().splitlines()[0]})."
            ) from error
        # .../snapshots/COMMIT/config.json
        return f"{reference}@{Path(str(config)).parent.name}"
    folder = locate(reference)
    if not (folder / "config.json").exists():
        raise InputError(f"finetune.encoder: {reference} is no encoder: there is no config.json in it.")
    files = sorted({file for pattern in parts for file in folder.glob(pattern)}, key=str)
    return identity(files)


@contextlib.contextmanager
def encoder_folder(reference: str) -> Iterator[str]:
    """What transformers' `from_pretrained` takes: a local folder (copied here where it is remote), or the hub id."""
    if is_hub_id(reference):
        yield reference
        return
    with local_copy(UPath(locate(reference))) as folder:
        yield str(folder)
