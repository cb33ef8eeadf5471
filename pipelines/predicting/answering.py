"""The parts of the files to predict, from reading them to their answers: what a cluster's processes do.

What goes from one to the next is a row of Ray Data: a part's `name` and its `table` as Arrow's bytes (none where an
earlier try answered it), or, without a name, how many `parts` and `rows` a file has, or a `mistake`, told through
the data because Ray would wrap an exception in several others.
"""

import json
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from upath import UPath

from cluster.store import ClusterError, local_copy, telling_storage_errors
from models.engine import Encoded
from models.labels import total_classes
from models.settings import InputError, Precision
from models.torch_engine import load_torch_engine
from pipelines.predicting.predictions import added_columns, prediction_columns
from pipelines.predicting.reading import read_tables, textless_rows, unreadable_rows
from pipelines.predicting.tables import write_parquet
from pipelines.predicting.ways import Given
from pipelines.preparing.data import DataSettings
from pipelines.preparing.formats import Source

UNREADABLE = b"shoal.unreadable_rows"
"""Under this key a part's Parquet metadata tell how many of its rows have a text that is not UTF-8."""


@dataclass(frozen=True)
class AnswerPlan:
    """What each process needs to know."""

    folder: str
    model: str
    temperature: dict[str, float]
    text_pair: str | None
    every_class: bool
    precision: Precision


def check_names(path: str, names: Sequence[str], added: Container[str]) -> None:
    """Refuses a source with a column that the output would have twice.

    Raises:
        InputError: names the column.
    """
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"{path} names the column {twice[0]!r} twice; rename one.")
    if twice := [name for name in names if name in added]:
        raise InputError(f"{path} has a column {twice[0]!r} already, which the predictions add; rename it.")


def as_rows(files: list[Given]) -> list[dict[str, Any]]:
    """The files as rows that `read_parts` takes."""
    return [
        {"number": number, "source": json.dumps(asdict(source)), "settings": settings.model_dump_json()}
        for number, (source, settings) in enumerate(files)
    ]


def read_parts(batch: Mapping[str, Any], part_rows: int, finished: set[str]) -> Iterator[dict[str, Any]]:
    """The parts of one file, `part_rows` in each; at the end, how many there were."""
    source = Source(**json.loads(batch["source"][0]))
    settings = DataSettings.model_validate_json(batch["settings"][0])
    number, parts, rows = int(batch["number"][0]), 0, 0
    try:
        for table in read_tables(source, settings, part_rows):
            name = f"part-{number:06d}-{parts:08d}.parquet"
            content = b"" if name in finished else _as_bytes(table)
            parts, rows = parts + 1, rows + len(table)
            yield _row(name=name, path=source.path, text=settings.text, table=content, rows=len(table))
        if source.rows and rows != source.rows:
            raise InputError(f"{source.path} is damaged: it should have {source.rows:,} rows, but has {rows:,}.")
        yield _row(parts=parts, rows=rows)
    except InputError as error:
        yield _row(mistake=str(error))


def _row(
    name: str = "",
    path: str = "",
    text: str = "",
    table: bytes = b"",
    rows: int = 0,
    parts: int = 0,
    mistake: str = "",
) -> dict[str, Any]:
    row = {"name": name, "path": path, "text": text, "table": table, "rows": rows, "parts": parts, "mistake": mistake}
    return {key: [value] for key, value in row.items()}


def _as_bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    content: bytes = sink.getvalue().to_pybytes()
    return content


class Answerer:
    """An actor with a loaded engine."""

    def __init__(self, plan: AnswerPlan, threads: int | None = 1) -> None:
        self.plan = plan
        with local_copy(UPath(plan.model)) as folder:
            self.engine = load_torch_engine(folder, precision=plan.precision, threads=threads)
        self.added = added_columns(self.engine.spec.labels, every_class=plan.every_class)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Answers one part and writes it; tells its name and rows."""
        told = {name: [batch[name][0]] for name in ("name", "rows", "parts", "mistake")}
        kind = "InputError"
        if batch["table"][0]:
            table = pa.ipc.open_stream(batch["table"][0]).read_all()
            target = UPath(self.plan.folder) / str(batch["name"][0])
            try:
                check_names(str(batch["path"][0]), table.column_names, self.added)
                with telling_storage_errors(self.plan.folder, "--out PATH"):
                    write_parquet(self.answer(table, str(batch["text"][0])), target)
            except (InputError, ClusterError) as error:
                told["mistake"], kind = [str(error)], type(error).__name__
        return {**told, "kind": [kind]}

    def answer(self, table: pa.Table, text: str) -> pa.Table:
        """The table with the predictions' columns added."""
        plan, labels = self.plan, self.engine.spec.labels
        texts = _texts(table, text)
        pairs = _texts(table, plan.text_pair) if plan.text_pair else None
        present = np.array([bool(each and each.strip()) for each in texts], bool)
        if pairs is not None:
            present &= np.array([pair is not None for pair in pairs], bool)
        unreadable = unreadable_rows(table)
        present[unreadable + textless_rows(table)] = False
        which = np.flatnonzero(present)
        asked = [pairs[i] or "" for i in which] if pairs is not None else None
        encoded: list[Encoded] = self.engine.encode([texts[i] or "" for i in which], asked) if len(which) else []
        logits = np.zeros((len(table), total_classes(labels)), np.float32)
        logits[which] = self.engine.logits(encoded)
        if not np.isfinite(logits).all():
            raise InputError(f"the classifier {plan.model} gives numbers that are not finite: its training has failed.")
        truncated = np.zeros(len(table), bool)
        truncated[which] = [one.truncated for one in encoded]
        found = prediction_columns(labels, logits, plan.temperature, every_class=plan.every_class, present=present)
        for name, values in {**found, "truncated": pa.array(truncated, mask=~present)}.items():
            table = table.append_column(name, values)
        return table.replace_schema_metadata({UNREADABLE: str(len(unreadable))})


def _texts(table: pa.Table, name: str) -> list[str | None]:
    if name not in table.column_names:
        # Of jsonl: none of the part's objects has the key.
        return [None] * len(table)
    texts: list[str | None] = table[name].to_pylist()
    return texts
