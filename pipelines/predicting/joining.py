"""The answered parts become the output, in the source's order, and are counted once more on the way."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from upath import UPath

from cluster.store import ClusterError
from models.spec import ClassifierSpec
from pipelines.predicting.answering import UNREADABLE
from pipelines.predicting.tables import conform, unified_schema
from pipelines.predicting.whole_output import Kind, whole_output
from pipelines.progress import Progress


@dataclass
class Joined:
    """The rows of the output, and those of them without an answer or with a cut text."""

    rows: int = 0
    missing: int = 0
    unreadable: int = 0
    truncated: int = 0


def join(
    folder: UPath, parts: Mapping[str, int], target: UPath, kind: Kind, spec: ClassifierSpec, progress: Progress
) -> Joined:
    """Joins the named parts of `folder` into the output; `parts` tells how many rows each has.

    Raises:
        ClusterError: a part is not there or has another number of rows.
    """
    paths = {folder / name: rows for name, rows in sorted(parts.items())}
    schema = unified_schema(_schema(path) for path in paths)
    answered = f"predicted:{spec.labels[0].name}"
    joined = Joined()
    with whole_output(target, kind, schema) as writer, progress.step("join", len(parts)) as step:
        for position, (path, rows) in enumerate(paths.items()):
            with _open(path) as stream:
                stored = pq.read_table(stream)
            if len(stored) != rows:
                raise ClusterError(
                    f"{path} has {len(stored):,} rows where {rows:,} were read; remove {folder} and run the same "
                    "command again."
                )
            table = conform(stored, schema)
            writer.write(table)
            unreadable = int(stored.schema.metadata[UNREADABLE])
            joined.rows += rows
            joined.unreadable += unreadable
            joined.missing += table[answered].null_count - unreadable
            joined.truncated += pc.sum(table["truncated"]).as_py() or 0
            step.update(position + 1)
    return joined


def _schema(path: UPath) -> pa.Schema:
    with _open(path) as stream:
        return pq.read_schema(stream)


@contextlib.contextmanager
def _open(path: UPath) -> Iterator[object]:
    try:
        with path.fs.open(path.path, "rb") as stream:
            yield stream
    except FileNotFoundError as error:
        raise ClusterError(
            f"{path} was answered but is not there; on several machines the output must be where all of them can "
            "write: run the same command again, or with --out s3://BUCKET/NAME."
        ) from error
    except (pa.ArrowException, OSError) as error:
        if getattr(error, "errno", None):
            raise  # The place, not the content.
        raise ClusterError(f"{path} is damaged; remove it and run the same command again.") from error
