"""predict: a classifier's answers for files of any size (Ray Data, engines in an actor pool).

One reader a file cuts it into parts of some thousand rows; engines, as many as the cluster has room for, answer a
part each and write it below `OUT.partial`. At the end the parts are joined, in the source's order, into the
output, which appears whole or not at all. After a crash the same command answers only the parts that are missing:
a part's rows are decided by the source alone. On several machines OUT must be where all of them can write.

The output has the source's columns and those of `pipelines.predicting.predictions`, and `truncated`: whether the
text was cut. Rows without a text keep their place, with null answers; so do those whose text is not UTF-8, which
`pipelines.predicting.reading` tells. How the source is read, `pipelines.predicting.ways` decides.
"""

import hashlib
import json
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray
import ray.data
from ray.data import ActorPoolStrategy
from upath import UPath

from cluster.store import ClusterError, is_local, remove_tree, telling_storage_errors, write_whole
from models.settings import InputError, Precision
from models.spec import SPEC, ClassifierSpec
from pipelines.locate import identity
from pipelines.predicting.answering import Answerer, AnswerPlan, as_rows, check_names, read_parts
from pipelines.predicting.joining import join
from pipelines.predicting.predictions import added_columns
from pipelines.predicting.ways import Given, files_to_predict, input_identity, ways_to_read
from pipelines.predicting.whole_output import Kind, is_there, kind_of
from pipelines.preparing.data import DataSettings
from pipelines.preparing.sources import HUB
from pipelines.progress import Progress

PART_ROWS = 2048
_FORMAT = 3
_SMALL_BYTES = 2**20
_MARKER = "plan.sha256"
# Fractions, so that as many engines as there are cores leave room for a reader: else they would wait for each other.
_ENGINE_CPUS, _READER_CPUS = 0.9, 0.05


@dataclass(frozen=True)
class Predicted:
    """What was written, and how it went."""

    out: str
    rows: int
    missing: int
    """Rows without a text, whose answers are null."""
    unreadable: int
    """Rows whose text is not UTF-8, whose answers are null, too."""
    skipped: int
    """Lines after the headers that were left out."""
    truncated: int
    """Texts that were cut to the classifier's length."""
    seconds: float

    @property
    def sentence(self) -> str:
        """The same for people."""
        told = [f"{self.missing:,} without a text", f"{self.truncated:,} cut to the classifier's length"]
        if self.unreadable:
            told.append(f"{self.unreadable:,} not UTF-8 and so without an answer (--undecodable replace answers them)")
        if self.skipped:
            told.append(f"{self.skipped:,} lines skipped (--skip-rows 0 reads them)")
        return f"{self.rows:,} rows to {self.out} in {self.seconds:,.1f} s; {', '.join(told)}."


def predict_file(
    source: str,
    out: str,
    model_folder: UPath,
    temperature: Mapping[str, float] | None = None,
    *,
    data: DataSettings,
    rules: Mapping[str, Any] | None = None,
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
        data: the recipe's: the columns with the text and the second text, and how files are read.
        rules: of `format`, `undecodable`, `quotes` and `skip_rows`, those that count above the recipe.
        progress: where the user is told how far it is.
        every_class: whether each class's probability is written, not only the likeliest one's.
        precision: of the computation; bf16 only where the hardware has it.

    Raises:
        InputError: the source cannot be read or lacks the column, or `out` cannot be made of it.
        ClusterError: the output cannot be written, or a part of it was lost.
    """
    started = time.monotonic()
    target = UPath(out) if "://" in out else UPath(Path(out).expanduser().absolute())
    kind = kind_of(target)
    spec = _spec(model_folder)
    # A listing remembered from before another process wrote would hide what is there.
    target.fs.invalidate_cache()
    _check(target, kind, spec, data.text_pair)
    ways = ways_to_read(source, data, rules or {})
    _check_apart(target, ways)
    folder = target.with_name(f"{target.name}.partial")
    plan = AnswerPlan(str(folder), str(model_folder), dict(temperature or {}), data.text_pair, every_class, precision)
    decides = [_FORMAT, PART_ROWS, asdict(plan), input_identity(source, ways), identity([model_folder])]
    _resume(folder, decides)
    files = files_to_predict(ways, folder / "fetched")
    added = added_columns(spec.labels, every_class=every_class)
    for each, _ in files:
        check_names(each.path, each.columns, added)
    with telling_storage_errors(str(folder), "--out PATH"):
        finished = {entry.name for entry in folder.iterdir()}
    parts = _run(files, plan, finished, progress)
    if not parts:
        _clear(folder)
        raise InputError(f"{source} has no rows.")
    folder.fs.invalidate_cache()
    with telling_storage_errors(str(target), "--out PATH"):
        joined = join(folder, parts, target, kind, spec, progress)
    _clear(folder)
    skipped = sum(settings.skip_rows for source, settings in files if source.format in ("csv", "tsv"))
    seconds = round(time.monotonic() - started, 1)
    return Predicted(str(target), **asdict(joined), skipped=skipped, seconds=seconds)


def _spec(model: UPath) -> ClassifierSpec:
    try:
        return ClassifierSpec.model_validate_json((model / SPEC).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{model} holds no classifier: there is no {SPEC} in it.") from error


def _check(target: UPath, kind: Kind, spec: ClassifierSpec, text_pair: str | None) -> None:
    if kind == "folder" and is_there(target):
        raise InputError(f"{target} exists already; remove it or choose another place for the predictions.")
    if kind != "folder" and target.is_dir():
        raise InputError(f"{target} is a folder; choose another name for the predictions.")
    if spec.pair and text_pair is None:
        raise InputError("the classifier takes pairs of texts: name the column with the second one, too (text_pair).")
    if not spec.pair and text_pair is not None:
        raise InputError(f"the classifier takes single texts, so there is no use for text_pair={text_pair!r}.")


def _check_apart(target: UPath, ways: list[DataSettings]) -> None:
    """Refuses to replace what is read."""
    for place in (str(way.source) for way in ways):
        if not place.startswith(HUB) and _resolved(UPath(place)) == _resolved(target):
            raise InputError(f"{target} is a file to classify; choose another name for the predictions.")


def _resolved(path: UPath) -> str:
    return str(Path(path.path).resolve()) if is_local(path) else str(path)


def _resume(folder: UPath, decides: list[Any]) -> None:
    """Keeps the finished parts of an earlier try at the same thing; clears away those of another."""
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
    marker = folder / _MARKER
    with telling_storage_errors(str(folder), "--out PATH"):
        if marker.exists():
            if marker.read_text(encoding="utf-8") == digest:
                return
            _clear(folder)
        elif folder.exists() and (folder.is_file() or any(not _is_begun(entry) for entry in folder.iterdir())):
            raise InputError(
                f"{folder} is not of an earlier try, and predict keeps its unfinished parts there; remove it or choose "
                "another name with --out PATH."
            )
        if is_local(folder):  # An object store needs no folders, and s3fs would make a missing bucket.
            folder.mkdir(parents=True, exist_ok=True)
        write_whole(marker, digest)


def _is_begun(entry: UPath) -> bool:
    """Whether a file is what is left of a marker's writing that a kill broke off."""
    return entry.name.startswith(f".{_MARKER}.")


def _clear(folder: UPath) -> None:
    """Removes the folder of an earlier try; its marker last, so that what a kill leaves is known as such."""
    with telling_storage_errors(str(folder), "--out PATH"):
        if first := [entry.path for entry in folder.iterdir() if entry.name != _MARKER]:
            folder.fs.rm(first, recursive=True)
        remove_tree(folder)


def _run(files: list[Given], plan: AnswerPlan, finished: set[str], progress: Progress) -> dict[str, int]:
    """Answers every part that is not finished; gives the rows of each part, by name.

    Raises:
        ClusterError: fewer parts or rows were answered than the readers counted.
    """
    small = sum(source.size for source, _ in files) <= _SMALL_BYTES
    total = sum(source.rows for source, _ in files) if all(source.rows for source, _ in files) else None
    answers = _answer_here if small else _answer_on_cluster
    parts: dict[str, int] = {}
    counted: list[tuple[int, int]] = []
    done, answered, started = 0, 0, time.monotonic()
    with progress.step("predict", total) as step:
        for row in answers(files, plan, finished):
            if row["mistake"]:
                raise (ClusterError if row["kind"] == "ClusterError" else InputError)(row["mistake"])
            if not row["name"]:
                counted.append((int(row["parts"]), int(row["rows"])))
                continue
            parts[row["name"]] = int(row["rows"])
            answered += 0 if row["name"] in finished else int(row["rows"])
            done += int(row["rows"])
            step.update(done, f"{answered / (time.monotonic() - started):,.0f} texts/s")
    read = [sum(column) for column in zip(*counted, strict=True)] or [0, 0]
    if len(counted) < len(files) or read != [len(parts), done]:
        raise ClusterError(
            f"{read[1]:,} rows in {read[0]:,} parts were read from {len(counted)} of {len(files)} files, but "
            f"{done:,} in {len(parts):,} were answered; run the same command again."
        )
    return parts


def _answer_here(files: list[Given], plan: AnswerPlan, finished: set[str]) -> Iterator[dict[str, Any]]:
    """Answers in this process: for what takes less time than starting others."""
    answerer = Answerer(plan, threads=None)
    for file in as_rows(files):
        for part in read_parts({name: [value] for name, value in file.items()}, PART_ROWS, finished):
            yield {name: values[0] for name, values in answerer(part).items()}


def _answer_on_cluster(files: list[Given], plan: AnswerPlan, finished: set[str]) -> Iterator[dict[str, Any]]:
    """Answers in a pool of engines, one for each GPU or else each CPU."""
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    resources: dict[str, float] = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0))
    data: Any = ray.data.from_items(as_rows(files), override_num_blocks=len(files))
    # Each part is a block of its own: so the engines share them out and few wait in memory.
    data.context.target_max_block_size = 1
    data.context.enable_progress_bars = False
    parts = data.map_batches(
        read_parts, fn_args=(PART_ROWS, finished), batch_size=1, num_cpus=_READER_CPUS, batch_format="numpy"
    )
    answers = parts.map_batches(
        Answerer,
        fn_constructor_args=(plan,),
        batch_size=1,
        batch_format="numpy",
        compute=ActorPoolStrategy(min_size=1, max_size=gpus or max(1, int(resources.get("CPU", 1)))),
        num_cpus=_ENGINE_CPUS,
        num_gpus=1 if gpus else 0,
    )
    yield from answers.iter_rows()
