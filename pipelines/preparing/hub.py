"""Datasets from the Hugging Face hub, through `datasets`, written once as Parquet where all nodes can read them."""

import json
import re
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub import HfApi, constants
from upath import UPath

from cluster.store import telling_storage_errors, write_whole
from models.settings import InputError
from pipelines.locate import identity, reason_of
from pipelines.preparing.data import splits_to_read
from pipelines.preparing.exchange import writing_whole
from pipelines.preparing.sources import HUB

_REFERENCE = re.compile(rf"{HUB}(?P<name>[^@]+)(@(?P<revision>[^@]+))?")
_SHARD_ROWS = 50_000
_DONE = "done.json"


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
        InputError: the hub has no such dataset, it cannot be reached, or it has no such split.
        ClusterError: the folder cannot be written.
    """
    done = folder / _DONE
    with telling_storage_errors(str(folder)):
        fetched = done.exists()
    if not fetched:
        _write(_load(reference), folder)
    parts: dict[str, list[str]] = json.loads(done.read_text(encoding="utf-8"))
    wanted = splits_to_read(reference, list(parts), split)
    return [(given, folder / part / shard) for part, given in wanted.items() for shard in parts[part]]


def _load(reference: str) -> Any:
    name, revision = _parsed(reference)
    try:
        return datasets.load_dataset(name, revision=revision)
    except Exception as error:  # `datasets` raises a dozen kinds, from connection errors to its own
        raise InputError(f"{reference} cannot be loaded: {reason_of(error)}.") from error


def _write(loaded: Any, folder: UPath) -> None:
    """Writes the shards, and last their list: what a killed try has left is not in it."""
    shards: dict[str, list[str]] = {}
    with telling_storage_errors(str(folder)):
        for part, data in loaded.items():
            shards[part] = []
            for number, start in enumerate(range(0, max(len(data), 1), _SHARD_ROWS)):
                shards[part].append(f"{number:05d}.parquet")
                with writing_whole(folder / part / shards[part][-1]) as stream:
                    data.select(range(start, min(start + _SHARD_ROWS, len(data)))).to_parquet(stream)
        write_whole(folder / _DONE, json.dumps(shards))
