"""Datasets from the Hugging Face hub, through `datasets`, written once as Parquet where all nodes can read them."""

import re
from pathlib import Path

import datasets
from huggingface_hub import HfApi, constants
from upath import UPath

from models.settings import InputError
from pipelines.locate import identity
from pipelines.preparing.data import split_name
from pipelines.preparing.sources import HUB

_REFERENCE = re.compile(rf"{HUB}(?P<name>[^@]+)(@(?P<revision>[^@]+))?")
_SHARD_ROWS = 50_000


def _parsed(reference: str) -> tuple[str, str | None]:
    match = _REFERENCE.fullmatch(reference)
    if match is None:
        raise InputError(f"{reference} names no dataset; write hub://OWNER/NAME or hub://OWNER/NAME@REVISION.")
    return match["name"], match["revision"]


def hub_identity(reference: str) -> str:
    """The dataset's id and the commit it stands at, as far as the hub or its local cache tells.

    A local folder in the place of an id is identified by its files.
    """
    name, revision = _parsed(reference)
    if Path(name).is_dir():
        return identity([UPath(Path(name).absolute())])
    if revision:
        return f"{name}@{revision}"
    if not constants.HF_HUB_OFFLINE:
        try:
            return f"{name}@{HfApi().dataset_info(name, timeout=10).sha}"
        except Exception:  # offline, unreachable, private or gone: the cache may know, and loading tells the rest
            pass
    reference_file = Path(constants.HF_HUB_CACHE) / f"datasets--{name.replace('/', '--')}" / "refs" / "main"
    return f"{name}@{reference_file.read_text().strip()}" if reference_file.is_file() else name


def fetch(reference: str, split: str | None, folder: UPath) -> list[tuple[str | None, UPath]]:
    """Writes the dataset as Parquet files below `folder`, or finds them there; each with its given split.

    Raises:
        InputError: the hub has no such dataset, it cannot be reached, or its splits have unknown names.
    """
    name, revision = _parsed(reference)
    done = folder / "done"
    if not done.exists():
        try:
            loaded = datasets.load_dataset(name, revision=revision)
        except Exception as error:  # `datasets` raises a dozen kinds, from connection errors to its own
            raise InputError(f"{reference} cannot be loaded: {str(error).splitlines()[0]}.") from error
        folder.mkdir(parents=True, exist_ok=True)
        for part, data in loaded.items():
            (folder / part).mkdir(parents=True, exist_ok=True)
            for number, start in enumerate(range(0, max(len(data), 1), _SHARD_ROWS)):
                shard = folder / part / f"{number:05d}.parquet"
                with shard.fs.open(shard.path, "wb") as stream:
                    data.select(range(start, min(start + _SHARD_ROWS, len(data)))).to_parquet(stream)
        done.write_text("\n".join(loaded), encoding="utf-8")
    parts = done.read_text(encoding="utf-8").split("\n")
    if split is None and len(parts) > 1 and (unknown := [part for part in parts if split_name(part) is None]):
        raise InputError(f"{reference} has the split {unknown[0]!r}, which is none of train, validation and test.")
    if split is not None and len(parts) > 1:
        parts = [part for part in parts if split_name(part) == split] or parts
    return [
        (split or (split_name(part) if len(parts) > 1 else None), file)
        for part in parts
        for file in sorted((folder / part).iterdir(), key=str)
    ]
