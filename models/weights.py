"""Weights on disk (safetensors): a file that is damaged is told by its name."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open

from models.settings import InputError


@contextlib.contextmanager
def naming_damaged_file(folder: str | Path, what: str = "") -> Iterator[None]:
    """Tells which file of a transformers folder is damaged where the block cannot read its weights.

    Args:
        folder: a local folder, or a hub id.
        what: begins the sentence, for example with the setting that named the folder.

    Raises:
        InputError: a weights file is cut off or overwritten.
    """
    try:
        yield
    except SafetensorError as error:
        files = (file for file in sorted(Path(folder).glob("*.safetensors")) if _is_damaged(file))
        place = next(files, f"the weights of {folder}")
        reason = str(error).rpartition(": ")[2]
        raise InputError(f"{what}{place} is damaged ({reason}): copy or make it again.") from error


def _is_damaged(file: Path) -> bool:
    try:
        with safe_open(file, framework="pt"):
            return False
    except SafetensorError:
        return True
