"""predict: a classifier's answers for files of any size (Ray Data, engines in an actor pool).

One reader a file cuts it into parts of some thousand rows; engines, as many as the cluster has room for, answer a
part each and write it below `OUT.partial`. At the end the parts are joined, in the source's order, into the
output, which appears whole or not at all. After a crash the same command answers only the parts that are missing:
a part's rows are decided by the source alone. On several machines OUT must be where all of them can write.

The output has the source's columns and those of `pipelines.predicting.predictions`, and `truncated`: whether the
text was cut. Rows without a text keep their place, with null answers.
"""

import hashlib
import json
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
import ray.data
from ray.data import ActorPoolStrategy
from upath import UPath

from cluster.store import ClusterError, local_copy, remove_tree, telling_storage_errors, write_whole
from models.classifier import SPEC, ClassifierSpec
from models.engine import Encoded, load_engine
from models.labels import total_classes
from models.precision import Precision
from models.settings import InputError
from pipelines.locate import identity
from pipelines.predicting.predictions import prediction_columns
from pipelines.predicting.whole_output import Kind, kind_of, whole_output
from pipelines.preparing.data import DataSettings
from pipelines.preparing.formats import Source
from pipelines.preparing.sources import find_sources, sources_identity
from pipelines.predicting.tables import as_text, conform, read_schema, read_tables, unified_schema, write_parquet
from pipelines.progress import Progress

PART_ROWS = 2048
_FORMAT = 1
_SMALL_BYTES = 2**20
# Fractions, so that as many engines as there are cores leave room for a reader: else they would wait for each other.
_ENGINE_CPUS, _READER_CPUS = 0.9, 0.05


@dataclass(frozen=True)
class Predicted:
    """What was written, and how it went."""

    out: str
    rows: int
    missing: int
    """Rows without a text, whose answers are null."""
    truncated: int
    """Texts that were cut to the classifier's length."""
    seconds: float


@dataclass(frozen=True)
class _Plan:
    """What each process needs to know."""

    folder: str
    model: str
    temperature: dict[str, float]
    text: str
    text_pair: str | None
    every_class: bool
    precision: Precision


def predict_file(
    source: str,
    out: str,
    model_folder: UPath,
    temperature: Mapping[str, float] | None = None,
    *,
    text: str,
    text_pair: str | None = None,
    progress: Progress,
    every_class: bool = False,
    precision: Precision = "bf16",
) -> Predicted:
    """Classifies every row of `source` into `out`.

    Args:
        source: a file, folder, glob, URL, `hub://` or `package://` reference: csv, tsv, jsonl, Parquet, text, datasets.
        out: a name ending in .parquet or .csv makes one file, any other a folder of Parquet files.
        model_folder: the classifier, as `finetune` writes it.
        temperature: by label column, from `evaluate`'s calibration.json.
        text: the column with the text; of .txt files, which have no columns, each line is one.
        text_pair: the column with the second text, for a classifier of pairs.
        progress: where the user is told how far it is.
        every_class: whether each class's probability is written, not only the likeliest one's.
        precision: of the computation; bf16 only where the hardware has it.

    Raises:
        InputError: the source cannot be read or lacks the column, or `out` cannot be made of it.
        ClusterError: the output cannot be written.
    """
    started = time.monotonic()
    target = UPath(out) if "://" in out else UPath(Path(out).expanduser().absolute())
    kind = kind_of(target)
    spec = _spec(model_folder)
    _check(target, kind, spec, text_pair)
    if source.lower().endswith((".txt", ".text")):
        text = "text"
    settings = DataSettings(source=source, text=text, text_pair=text_pair)
    folder = target.with_name(f"{target.name}.partial")
    plan = _Plan(str(folder), str(model_folder), dict(temperature or {}), text, text_pair, every_class, precision)
    _resume(folder, [_FORMAT, asdict(plan), sources_identity(settings), identity([model_folder])])
    sources = find_sources(settings, folder / "fetched")
    _check_names(sources, spec, plan)
    with telling_storage_errors(str(folder)):
        finished = {entry.name for entry in folder.iterdir()}
        _run(sources, plan, finished, progress)
        parts = sorted(entry for entry in folder.iterdir() if entry.name.startswith("part-"))
    if not parts:
        raise InputError(f"{source} has no rows.")
    with telling_storage_errors(str(target)):
        rows, missing, truncated = _join(parts, target, kind, spec, progress)
    remove_tree(folder)
    return Predicted(str(target), rows, missing, truncated, round(time.monotonic() - started, 1))


def _spec(model: UPath) -> ClassifierSpec:
    try:
        return ClassifierSpec.model_validate_json((model / SPEC).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{model} holds no classifier: there is no {SPEC} in it.") from error


def _check(target: UPath, kind: Kind, spec: ClassifierSpec, text_pair: str | None) -> None:
    if kind == "folder" and target.exists():
        raise InputError(f"{target} exists already; remove it or choose another place for the predictions.")
    if kind != "folder" and target.is_dir():
        raise InputError(f"{target} is a folder; choose another name for the predictions.")
    if spec.pair and text_pair is None:
        raise InputError("the classifier takes pairs of texts: name the column with the second one, too (text_pair).")
    if not spec.pair and text_pair is not None:
        raise InputError(f"the classifier takes single texts, so there is no use for text_pair={text_pair!r}.")


def _check_names(sources: list[Source], spec: ClassifierSpec, plan: _Plan) -> None:
    """Refuses a source with a column that the output would have twice."""
    width = total_classes(spec.labels)
    added = [*prediction_columns(spec.labels, np.zeros((0, width)), {}, every_class=plan.every_class), "truncated"]
    for source in sources:
        if twice := [name for name in added if name in source.columns]:
            raise InputError(f"{source.path} has a column {twice[0]!r} already, which the predictions add; rename it.")


def _resume(folder: UPath, decides: list[Any]) -> None:
    """Keeps the finished parts of an earlier try at the same thing; clears away those of another."""
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
    marker = folder / "plan.sha256"
    with telling_storage_errors(str(folder)):
        with suppress(FileNotFoundError, NotADirectoryError):
            if marker.read_text(encoding="utf-8") == digest:
                return
        remove_tree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(marker, digest)


def _run(sources: list[Source], plan: _Plan, finished: set[str], progress: Progress) -> None:
    """Answers every part that is not finished."""
    small = sum(source.size for source in sources) <= _SMALL_BYTES
    total = sum(source.rows for source in sources) if all(source.rows for source in sources) else None
    done, started = 0, time.monotonic()
    with progress.step("predict", total) as step:
        for row in _answer_here(sources, plan, finished) if small else _answer_on_cluster(sources, plan, finished):
            if row["mistake"]:
                raise (ClusterError if row["kind"] == "ClusterError" else InputError)(row["mistake"])
            done += int(row["rows"])
            step.update(done, f"{done / (time.monotonic() - started):,.0f} texts/s")


def _answer_here(sources: list[Source], plan: _Plan, finished: set[str]) -> Iterator[dict[str, Any]]:
    """Answers in this process: for what takes less time than starting others."""
    answerer = _Answerer(plan, threads=None)
    for file in _files(sources):
        for part in _read_parts({name: [value] for name, value in file.items()}, finished):
            yield {name: values[0] for name, values in answerer(part).items()}


def _answer_on_cluster(sources: list[Source], plan: _Plan, finished: set[str]) -> Iterator[dict[str, Any]]:
    """Answers in a pool of engines, one for each GPU or else each CPU."""
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    resources: dict[str, float] = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0))
    files = _files(sources)
    data: Any = ray.data.from_items(files, override_num_blocks=len(files))
    # Each part is a block of its own: so the engines share them out and few wait in memory.
    data.context.target_max_block_size = 1
    data.context.enable_progress_bars = False
    parts = data.map_batches(
        _read_parts, fn_args=(finished,), batch_size=1, num_cpus=_READER_CPUS, batch_format="numpy"
    )
    answers = parts.map_batches(
        _Answerer,
        fn_constructor_args=(plan,),
        batch_size=1,
        batch_format="numpy",
        compute=ActorPoolStrategy(min_size=1, max_size=gpus or max(1, int(resources.get("CPU", 1)))),
        num_cpus=_ENGINE_CPUS,
        num_gpus=1 if gpus else 0,
    )
    yield from answers.iter_rows()


def _files(sources: list[Source]) -> list[dict[str, Any]]:
    return [{"number": number, "source": json.dumps(asdict(source))} for number, source in enumerate(sources)]


def _read_parts(batch: Mapping[str, Any], finished: set[str]) -> Iterator[dict[str, Any]]:
    """The parts of one file, each as one row: its name and its table as Arrow's bytes."""
    source = Source(**json.loads(batch["source"][0]))
    number = int(batch["number"][0])
    try:
        for position, table in enumerate(read_tables(source, PART_ROWS)):
            name = f"part-{number:06d}-{position:08d}.parquet"
            if name not in finished:
                sink = pa.BufferOutputStream()
                with pa.ipc.new_stream(sink, table.schema) as writer:
                    writer.write_table(table)
                yield {"name": [name], "table": [sink.getvalue().to_pybytes()], "mistake": [""]}
    except InputError as error:
        # Told through the data: raised here, Ray would wrap it in several others.
        yield {"name": [""], "table": [b""], "mistake": [str(error)]}


class _Answerer:
    """An actor with a loaded engine."""

    def __init__(self, plan: _Plan, threads: int | None = 1) -> None:
        self.plan = plan
        with local_copy(UPath(plan.model)) as folder:
            self.engine = load_engine(folder, precision=plan.precision, threads=threads)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Answers one part and writes it."""
        if batch["mistake"][0]:
            return {"rows": [0], "mistake": [batch["mistake"][0]], "kind": ["InputError"]}
        table = pa.ipc.open_stream(batch["table"][0]).read_all()
        path = UPath(self.plan.folder) / str(batch["name"][0])
        try:
            with telling_storage_errors(self.plan.folder):
                write_parquet(self.answer(table), path)
        except (InputError, ClusterError) as error:
            return {"rows": [0], "mistake": [str(error)], "kind": [type(error).__name__]}
        return {"rows": [len(table)], "mistake": [""], "kind": [""]}

    def answer(self, table: pa.Table) -> pa.Table:
        """The table with the predictions' columns added."""
        plan, labels = self.plan, self.engine.spec.labels
        texts = _texts(table, plan.text)
        pairs = _texts(table, plan.text_pair) if plan.text_pair else None
        present = np.array([bool(text and text.strip()) for text in texts], bool)
        if pairs is not None:
            present &= np.array([pair is not None for pair in pairs], bool)
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
        return table


def _texts(table: pa.Table, name: str) -> list[str | None]:
    if name not in table.column_names:
        # Of jsonl: none of the part's objects has the key.
        return [None] * len(table)
    return [as_text(value) for value in table[name].to_pylist()]


def _join(
    parts: list[UPath], target: UPath, kind: Kind, spec: ClassifierSpec, progress: Progress
) -> tuple[int, int, int]:
    """Joins the parts into the output; tells its rows, those without a text, and the texts cut."""
    schema = unified_schema(read_schema(part) for part in parts)
    answered = f"predicted:{spec.labels[0].name}"
    rows = missing = truncated = 0
    with whole_output(target, kind, schema) as writer, progress.step("join", len(parts)) as step:
        for position, part in enumerate(parts):
            with part.fs.open(part.path, "rb") as stream:
                table = conform(pq.read_table(stream), schema)
            writer.write(table)
            rows += len(table)
            missing += table[answered].null_count
            truncated += pc.sum(table["truncated"]).as_py() or 0
            step.update(position + 1)
    return rows, missing, truncated
